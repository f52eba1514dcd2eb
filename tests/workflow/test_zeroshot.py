"""Zero-shot classification of a labelled set, from data on disk to figures, picture and page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from captune.data.labelled import open_labelled
from captune.errors import CaptuneError
from captune.evaluation.zeroshot import TEMPLATES, classify, read_templates
from captune.training.run import Run
from captune.workflow import zeroshot as zeroshot_module
from captune.workflow.opening import OwnTowers
from captune.workflow.zeroshot import zero_shot


def test_figures_equal_those_of_labels_given_one_by_one(run: Path, colours: Path) -> None:
    found = zero_shot(str(run), str(colours), probe=False).metrics
    labelled = open_labelled(colours)
    model = Run.open(run).load_model()
    paths = [labelled.table.path(row) for row in range(12)]
    said = [p.label for p in classify(model, paths, labelled.names)]
    right = [labelled.names[t] == s for t, s in zip(labelled.target.tolist(), said, strict=True)]
    assert found["zero_shot"]["top1"] == pytest.approx(100 * sum(right) / 12)
    assert found["zero_shot"]["top5"] == 100.0
    assert sum(count for _, _, count in found["confusion"]) == found["images"] == 12
    assert sum(n for true, called, n in found["confusion"] if true == called) == sum(right)
    assert found["baselines"]["chance"]["top1"] == pytest.approx(100 / 3)
    assert found["baselines"]["majority"]["top1"] == pytest.approx(100 / 3)
    assert found["baselines"]["majority"]["learnt_from"] == "the training split"
    assert found["templates"] == list(TEMPLATES) and found["images_seen_in_training"] == 0


def test_the_probe_is_of_the_backbone_before_training(run: Path, colours: Path) -> None:
    found = zero_shot(str(run), str(colours)).metrics["baselines"]["linear_probe"]
    assert (found["images"], found["learnt_from"]) == (15, "the training split")
    model = Run.open(run).load_model()
    weight = next(iter(model.image_encoder.parameters()))
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 1  # as if trained
    model.save_pretrained(run)
    opened = zeroshot_module.open_model(str(run))
    backbone = zeroshot_module._frozen_backbone(opened, OwnTowers())
    first = (next(iter(m.image_encoder.parameters())) for m in (opened.model, backbone))
    assert [torch.equal(found, before) for found in first] == [False, True]


def test_a_backbone_that_cannot_be_had_leaves_the_probe_out_and_says_so(
    run: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "config.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    stated["config"]["image_encoder"] = str(run / "gone")
    path.write_text(json.dumps(stated), encoding="utf-8")
    outcome = zero_shot(str(run), str(colours))
    reason = outcome.metrics["baselines"]["linear_probe"]["left_out"]
    assert "gone" in reason and f"no linear probe: {reason}" in capsys.readouterr().err
    assert outcome.page is not None and "No linear probe" in outcome.page.read_text("utf-8")


def test_files_lie_in_the_run_or_where_they_are_wanted(
    run: Path, colours: Path, tmp_path: Path
) -> None:
    outcome = zero_shot(str(run), str(colours), probe=False)
    assert outcome.page == run / "classification.html"
    assert (run / "confusion.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((run / "classification.json").read_text(encoding="utf-8"))
    assert written == outcome.metrics and written["format_version"] == 1
    elsewhere = zero_shot(str(run), str(colours), probe=False, out=str(tmp_path / "there"))
    assert elsewhere.page == tmp_path / "there" / "classification.html"


def test_another_checkpoint_leaves_the_run_s_files_alone(run: Path, colours: Path) -> None:
    best = zero_shot(str(run), str(colours), probe=False).metrics
    outcome = zero_shot(f"{run}@stage-1", str(colours), probe=False)
    assert outcome.page is None and outcome.metrics["model"] == f"{run}@stage-1"
    assert json.loads((run / "classification.json").read_text(encoding="utf-8")) == best


def test_a_clip_has_no_folder_of_its_own(tiny_clip: Path, colours: Path) -> None:
    outcome = zero_shot(str(tiny_clip), str(colours))
    assert outcome.page is None
    assert outcome.metrics["baselines"]["linear_probe"]["images"] == 15


def test_other_words_and_prompts_move_the_figures(run: Path, colours: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    text = "# squares\n\na {} square on a ground\nthere is {}\n"
    path.write_text(text, encoding="utf-8-sig")  # as editors on Windows write it
    prompts = read_templates(path)
    assert prompts == ["a {} square on a ground", "there is {}"]
    plain = zero_shot(str(run), str(colours), probe=False).metrics
    other = zero_shot(
        str(run), str(colours), probe=False, templates=prompts, names={"red": "crimson"}
    ).metrics
    assert other["templates"] == prompts
    assert other["calibration"]["before"]["nll"] != plain["calibration"]["before"]["nll"]
    assert [row["class"] for row in other["per_class"]] == ["blue", "green", "red"]


@pytest.mark.parametrize(
    ("text", "words"), [("", "no template"), ("a photo", "'a photo' has no {}")]
)
def test_prompts_of_another_form_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CaptuneError, match=words):
        read_templates(path)


def test_pictures_that_cannot_be_read_are_left_out_of_every_figure(
    run: Path, colours: Path
) -> None:
    (colours / "test" / "red" / "0.jpg").write_bytes(b"no picture")
    (colours / "train" / "red" / "0.jpg").write_bytes(b"no picture")
    found = zero_shot(str(run), str(colours)).metrics
    assert (found["images"], found["unreadable_images"]) == (11, 1)
    assert found["baselines"]["linear_probe"]["images"] == 14


def test_the_page_names_what_was_confused_and_loads_nothing(run: Path, colours: Path) -> None:
    outcome = zero_shot(str(run), str(colours))
    assert outcome.page is not None
    page = outcome.page.read_text(encoding="utf-8")
    assert 'src="http' not in page and page.count("<img") == page.count("alt=")
    for row in outcome.metrics["worst_confusions"]:
        assert f"{row['class']} called {row['called']}" in page
    for line in ("zero-shot", "chance", "majority", "linear probe"):
        assert line in page
