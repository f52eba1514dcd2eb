"""What a command is given: a run, one of its checkpoints, a CLIP, or none of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from captune.errors import CaptuneError
from captune.models import weights_digest
from captune.training.run import Run
from captune.workflow.evaluate import evaluate, search
from captune.workflow.opening import open_model
from captune.workflow.train import Outcome


def test_a_checkpoint_is_opened_by_its_name(run: Path) -> None:
    opened = open_model(f"{run}@stage-1")
    saved = load_file(run / "checkpoints" / "stage-1.safetensors")
    state = opened.model.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in saved)
    assert (opened.name, opened.checkpoint) == (f"{run}@stage-1", "stage-1")
    assert not opened.model.training


def test_at_best_is_the_run_itself(run: Path) -> None:
    best, plain = open_model(f"{run}@best"), open_model(str(run))
    assert best.name == plain.name == str(run)
    assert weights_digest(best.model) == weights_digest(plain.model)


def test_a_checkpoint_leaves_the_metrics_of_the_best_model_alone(run: Path, epoch: str) -> None:
    before = (run / "metrics.json").read_bytes()
    result = evaluate(epoch)
    assert (run / "metrics.json").read_bytes() == before
    assert result["model"] == epoch
    assert result["fingerprints"]["model"] != json.loads(before)["fingerprints"]["model"]


def test_before_and_after_side_by_side(run: Path, epoch: str) -> None:
    result = evaluate(str(run), against=epoch)
    against = result["against"]
    assert (result["model"], against["model"]) == (str(run), epoch)
    assert against["rsum"] == pytest.approx(evaluate(epoch)["rsum"])
    difference = against["difference"]["rsum"]
    assert difference["value"] == pytest.approx(result["rsum"] - against["rsum"])
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8")) == result


def test_a_checkpoint_keeps_its_embeddings_beside_those_of_the_best_model(
    run: Path, epoch: str
) -> None:
    shutil.rmtree(run / "embeddings", ignore_errors=True)
    search(str(run), "a red square")
    search(epoch, "a red square")
    assert len(list((run / "embeddings").iterdir())) == 2


def test_a_wrong_checkpoint_says_which_there_are(run: Path) -> None:
    with pytest.raises(CaptuneError, match=r"no checkpoint 'stage1': there are stage-1, best"):
        evaluate(f"{run}@stage1")


def test_a_folder_with_an_at_in_its_name_still_opens(outcome: Outcome, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(outcome.run.folder, tmp_path / "run@stage-1"))
    assert open_model(str(folder)).name == str(folder)
    again = open_model(f"{folder}@stage-1")
    assert again.run is not None and again.run.folder == folder
    assert Run.open(folder).folder == folder


def test_a_clip_has_no_checkpoints(tiny_clip: Path) -> None:
    with pytest.raises(CaptuneError, match=r"is no run here, so it holds no checkpoint 'stage-1'"):
        open_model(f"{tiny_clip}@stage-1")


@pytest.mark.parametrize("name", ["runs/demoo", "runs/demoo@stage-1"])
def test_a_misspelt_run_is_no_hub_name_and_the_nearest_is_named(
    name: str, outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(outcome.run.folder, tmp_path / "runs" / "demo")
    (tmp_path / "runs" / "demoo-data").mkdir()
    with pytest.raises(CaptuneError, match=r"no run at runs/demoo: .*; did you mean 'demo'\?"):
        open_model(name)


def test_a_folder_that_holds_no_run_may_be_called_as_an_owner_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nobody" / "x").mkdir(parents=True)
    with pytest.raises(CaptuneError, match=r"'nobody/y'.* could not be fetched"):
        open_model("nobody/y")
