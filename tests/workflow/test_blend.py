"""blend: each alpha measured as evaluate does, the best kept as a run, resumable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from captune.config import Config
from captune.errors import CaptuneError
from captune.training.blending import blend_weights
from captune.training.run import Run
from captune.workflow import blend as blend_module
from captune.workflow.blend import blend
from captune.workflow.evaluate import evaluate, measure, search
from captune.workflow.train import train

SIX = [(d, f"R@{k}") for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that are measured."""
    names: list[str] = []

    def spy(opened: Any, table: Any) -> Any:
        names.append(opened.name)
        return measure(opened, table)

    monkeypatch.setattr(blend_module, "measure", spy)
    return names


def told(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "blend.json").read_text(encoding="utf-8")))


def test_the_ends_are_what_evaluate_says_of_the_two(run: Path, epoch: str, tmp_path: Path) -> None:
    found = blend(epoch, str(run), steps=3, out=tmp_path / "blend").told
    assert [row["alpha"] for row in found["rows"]] == [0.0, 0.5, 1.0]
    assert [model["model"] for model in found["models"]] == [epoch, str(run)]
    for name, row, model in zip(
        (epoch, str(run)), (found["rows"][0], found["rows"][2]), found["models"], strict=True
    ):
        result = evaluate(name)
        assert row["fingerprint"] == model["fingerprint"] == result["fingerprints"]["model"]
        assert row["rsum"] == pytest.approx(result["rsum"])
        assert row["intervals"] == result["intervals"]
        assert all(row[d][key] == pytest.approx(result[d][key]) for d, key in SIX)


def test_the_best_is_a_run_that_every_command_opens(run: Path, epoch: str, tmp_path: Path) -> None:
    folder = tmp_path / "blend"
    found = blend(str(run), epoch, steps=5, out=folder).told
    best = found["best"]
    assert best["rsum"] == max(row["rsum"] for row in found["rows"])
    result = evaluate(str(folder))
    assert result["rsum"] == pytest.approx(best["rsum"])
    assert result["fingerprints"]["model"] == best["fingerprint"]
    first = load_file(run / "best_model.safetensors")
    second = load_file(run / "checkpoints" / "epoch-31.safetensors")
    kept, expected = (
        load_file(folder / "best_model.safetensors"),
        blend_weights(first, second, best["alpha"]),
    )
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[key], expected[key]) for key in kept)
    assert len(search(str(folder), "a red square")) == 5
    assert Run.open(folder).config == Run.open(run).config
    assert (folder / "blend.png").is_file() and told(folder) == found


def test_the_difference_to_both_ends_is_that_of_against(
    run: Path, epoch: str, tmp_path: Path
) -> None:
    folder = tmp_path / "blend"
    best = blend(str(run), epoch, steps=3, out=folder).told["best"]
    for key, name in (("less_first", str(run)), ("less_second", epoch)):
        assert evaluate(str(folder), against=name)["against"]["difference"] == best[key]


def test_the_split_that_chose_alpha_is_said_and_remembered(
    run: Path, epoch: str, tmp_path: Path
) -> None:
    found = blend(str(run), epoch, split="fresh", steps=2, out=tmp_path / "blend")
    assert (found.told["split"], found.told["images"]) == ("fresh", 6)
    assert found.told["notes"] == [
        "alpha was chosen on fresh: the best one's figures there are slightly optimistic, report "
        "a test split"
    ]
    result = evaluate(str(tmp_path / "blend"), split="fresh")
    assert (result["images_seen_in_training"], result["images_seen_in_selection"]) == (0, 6)
    assert "the blend's alpha was chosen on 6 of these images" in result["notes"][0]
    trained = blend(str(run), epoch, split="train", steps=2, out=tmp_path / "trained").told["notes"]
    assert "24 of these images were trained on" in trained[0] and "chosen on train" in trained[1]
    assert evaluate(str(tmp_path / "trained"), split="val")["images_seen_in_selection"] == 8


def test_alphas_that_were_measured_are_not_measured_again(
    run: Path, epoch: str, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after three of five; what remains is measured, and what the differences need."""
    whole = blend(str(run), epoch, steps=5, out=tmp_path / "whole").told
    assert measured == [f"alpha {alpha:g}" for alpha in (0, 0.25, 0.5, 0.75, 1)]
    real = blend_module.write_json

    def stops(path: Path, value: Any) -> None:
        real(path, value)
        if len(value["rows"]) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(blend_module, "write_json", stops)
        with pytest.raises(KeyboardInterrupt):
            blend(str(run), epoch, steps=5, out=tmp_path / "blend")
    assert [row["alpha"] for row in told(tmp_path / "blend")["rows"]] == [0.0, 0.25, 0.5]
    measured.clear()
    again = blend(str(run), epoch, steps=5, out=tmp_path / "blend").told
    assert measured[:2] == ["alpha 0.75", "alpha 1"] and len(set(measured)) == len(measured)
    assert again == whole
    measured.clear()
    assert blend(str(run), epoch, steps=5, out=tmp_path / "blend").told == whole
    assert measured == []


def test_an_occupied_folder_is_refused_with_a_free_name(
    run: Path, epoch: str, tmp_path: Path
) -> None:
    folder = tmp_path / "blend"
    blend(str(run), epoch, steps=2, out=folder)
    for call, words in (
        ({"steps": 3}, "another blend .steps differ"),
        ({"steps": 2, "split": "fresh"}, "another blend .split differ"),
    ):
        with pytest.raises(CaptuneError, match=rf"{words}.*--out .*blend-2"):
            blend(str(run), epoch, out=folder, **call)  # type: ignore[arg-type]
    with pytest.raises(CaptuneError, match=r"another blend \(models differ"):
        blend(epoch, str(run), steps=2, out=folder)
    with pytest.raises(CaptuneError, match=r"not empty and holds no blend.*--out .*run-2"):
        blend(str(run), epoch, steps=2, out=run)
    (folder / "blend.json").write_text('{"format_version": 1}', encoding="utf-8")
    with pytest.raises(CaptuneError, match="is damaged"):
        blend(str(run), epoch, steps=2, out=folder)


def test_zero_shot_clip_and_the_run_it_became(
    tiny_clip: Path, data: str, tiny_config: Config, tmp_path: Path
) -> None:
    """The very case of the paper: alpha 0 is CLIP as it is."""
    both = {"image_encoder": str(tiny_clip), "text_encoder": str(tiny_clip)}
    config = tiny_config.replace(**both, head_epochs=0, image_size=0, learning_rate=1e-3)
    tuned = train(data, config=config, out=tmp_path / "tuned").run.folder
    found = blend(str(tiny_clip), str(tuned), steps=3, out=tmp_path / "blend").told
    for place, result in ((0, evaluate(str(tiny_clip), data=data)), (2, evaluate(str(tuned)))):
        assert found["rows"][place]["rsum"] == pytest.approx(result["rsum"])
        assert found["rows"][place]["fingerprint"] == result["fingerprints"]["model"]
    assert found["rows"][1]["fingerprint"] not in {m["fingerprint"] for m in found["models"]}
    assert evaluate(str(tmp_path / "blend"))["rsum"] == pytest.approx(found["best"]["rsum"])


def test_a_clip_comes_first_and_its_run_second(tiny_clip: Path, run: Path, data: str) -> None:
    with pytest.raises(CaptuneError, match="is no run: name the CLIP first"):
        blend(str(run), str(tiny_clip))
    with pytest.raises(CaptuneError, match=r"cannot be blended.*the text tower"):
        blend(str(tiny_clip), str(run))


def test_models_of_other_flags_leave_no_folder(run: Path, epoch: str, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    stated = json.loads((other / "preprocess.json").read_text(encoding="utf-8"))
    (other / "preprocess.json").write_text(json.dumps({**stated, "image_size": 48}), "utf-8")
    with pytest.raises(CaptuneError, match="differ in preprocessing"):
        blend(str(other), str(run), out=tmp_path / "blend")
    assert not (tmp_path / "blend").exists()


def test_the_default_folder_is_named_after_the_second(
    run: Path, epoch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert blend("run", "run@epoch-31", steps=2).folder == Path("runs") / "run-blend"
