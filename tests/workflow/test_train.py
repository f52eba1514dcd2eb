"""train: what lies in the run's folder afterwards, and what is said on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from captune.config import Config
from captune.errors import CaptuneError
from captune.workflow.evaluate import evaluate
from captune.workflow.train import Outcome, default_out, train


def test_the_metrics_file_is_exactly_what_train_returns(outcome: Outcome) -> None:
    path = outcome.run.folder / "metrics.json"
    assert json.loads(path.read_text(encoding="utf-8")) == outcome.metrics
    assert (outcome.metrics["split"], outcome.metrics["images"]) == ("val", 8)


def test_a_run_holds_weights_descriptions_history_pictures_and_page(outcome: Outcome) -> None:
    names = {path.name for path in outcome.run.folder.iterdir()}
    assert names >= {
        "config.json",
        "best_model.safetensors",
        "preprocess.json",
        "image_encoder.json",
        "text_encoder.json",
        "history.jsonl",
        "metrics.json",
        "training_curves.png",
        "before_after.png",
        "retrieval.png",
        "zero_shot.png",
        "report.html",
    }
    assert outcome.page == outcome.run.folder / "report.html"


def test_the_page_has_the_model_before_after_stage_one_and_at_the_end(outcome: Outcome) -> None:
    page = outcome.page.read_text(encoding="utf-8")
    table = page.split("<h2>Results</h2>")[1].split("</table>")[0]
    at_the_end, after_one = table.split("after stage 1 (backbone frozen)")
    assert "this run" in at_the_end and "before training" in after_one
    measured = evaluate(f"{outcome.run.folder}@stage-1")
    assert f"<td>{measured['rsum']:.1f}<br>" in after_one.split("before training")[0]


def test_nothing_in_a_run_is_pickled(outcome: Outcome) -> None:
    """Torch's own files are zip archives, plain pickles begin with the byte 0x80."""
    for path in outcome.run.folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"), path


def test_validating_on_training_images_is_said_before_training_starts(
    coco: Path,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise CaptuneError("training starts here")

    monkeypatch.setattr("captune.workflow.train.fit", stop)
    config = tiny_config.replace(val_split="train")
    with pytest.raises(CaptuneError, match="training starts here"):
        train(str(coco), config=config, out=tmp_path / "run")
    assert "24 images of train are in train too" in capsys.readouterr().err


def test_the_first_line_names_the_recipe_once_whatever_the_tables_have_to_say(
    coco: Path, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train2014", "val2014"):
        next((coco / split).iterdir()).unlink()
    train(str(coco), config=tiny_config.replace(head_epochs=1), out=tmp_path / "run")
    said = capsys.readouterr().err.splitlines()
    recipes = [number for number, line in enumerate(said) if line.startswith("recipe ")]
    assert recipes == [0] and " head_epochs=1 " in said[0], said
    assert all("images are not there" in line for line in said[1:3])


def test_an_unreadable_image_is_named_counted_and_skipped(
    coco: Path, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One to train on and one to validate on; the page is written all the same."""
    broken = [sorted((coco / split).iterdir())[0] for split in ("train2014", "val2014")]
    for path in broken:
        path.write_bytes(b"no picture")
    found = train(str(coco), config=tiny_config, out=tmp_path / "run")
    said = capsys.readouterr().err
    assert all(path.name in said for path in broken)
    assert found.run.history()[0]["unreadable_images"] == 1
    assert (found.metrics["images"], found.metrics["unreadable_images"]) == (7, 1)
    assert found.page.is_file()


def test_a_tower_that_cannot_be_loaded_leaves_the_folder_free(
    coco: Path, tiny_config: Config, tmp_path: Path
) -> None:
    """Otherwise the advice of the error, other towers, meets a folder that is occupied."""
    wrong = tiny_config.replace(image_encoder=str(tmp_path / "no-such-tower"))
    with pytest.raises(CaptuneError, match="no-such-tower"):
        train(str(coco), config=wrong, out=tmp_path / "run")
    assert train(str(coco), config=tiny_config, out=tmp_path / "run").page.is_file()


@pytest.mark.parametrize(
    ("data", "flags", "expected"),
    [
        ("photos.csv", {}, "photos"),
        ("photos.csv", {"use_batch_norm": True}, "photos_bn"),
        ("coco2014", {"use_attention_pooling": True}, "coco2014_attn"),
        ("coco2014/", {"use_batch_norm": True, "use_attention_pooling": True}, "coco2014_bn_attn"),
        (".", {}, "here"),
        ("../here", {}, "here"),
    ],
)
def test_the_default_folder_is_named_after_data_and_flags(
    data: str,
    flags: dict[str, bool],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = tmp_path / "here"
    (here / "coco2014").mkdir(parents=True)
    (here / "photos.csv").touch()
    monkeypatch.chdir(here)
    assert default_out(data, Config(**flags)) == Path("runs") / expected
