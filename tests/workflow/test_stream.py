"""train from shards: what the run holds, how it goes on, and what may be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from captune.cli.main import main
from captune.config import Config
from captune.data.stream_table import StreamTable
from captune.errors import CaptuneError
from captune.training import loop as loop_module
from captune.training.run import Run
from captune.training.stop import TrainingStopped
from captune.workflow.evaluate import evaluate
from captune.workflow.stream import train_on_shards
from captune.workflow.train import Outcome
from shards import photo, sample, tar_of, write_shards


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    """37 samples; the fourth of them is broken."""
    pattern = write_shards(tmp_path / "s", [9, 1, 14, 13], captions=2)
    members = [m for n in range(9) for m in sample(n, 2)]
    members[6] = ("000003.jpg", photo(3)[:200])
    (tmp_path / "s" / "squares-00.tar").write_bytes(tar_of(members))
    return pattern


@pytest.fixture
def config(tiny_config: Config) -> Config:
    return tiny_config.replace(num_epochs=2, save_steps=1, shuffle_buffer=8, precision="fp32")


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the next training after a number of steps, as Ctrl-C does."""
    steps = 0
    real = loop_module.TrainingLoop._after_step

    def after_step(self: Any, meter: Any) -> None:
        nonlocal steps
        steps += 1
        self.stop.requested |= steps == step
        real(self, meter)

    monkeypatch.setattr(loop_module.TrainingLoop, "_after_step", after_step)


def history(run: Run) -> list[dict[str, Any]]:
    clock = ("images_per_second", "seconds")
    return [{k: v for k, v in row.items() if k not in clock} for row in run.history()]


def test_a_run_on_shards_stands_alone_and_goes_on_exactly(
    pattern: str,
    coco: Path,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train(out: str, *, resume: bool = False, workers: int = 0) -> Outcome:
        return train_on_shards(
            pattern,
            val_data=str(coco),
            config=config.replace(num_workers=workers),
            out=tmp_path / out,
            resume=resume,
        )

    whole = train("whole")
    said = capsys.readouterr().err
    first, second, *rest = said.splitlines()
    assert first.startswith("recipe best · towers ") and " head_epochs=0 " in first
    assert second == "a stream keeps no features, so it has no stage 1: head_epochs=0"
    assert not any(line.startswith("recipe ") for line in rest)
    assert "train on squares: 4 shards, 37 images, 74 captions" in said
    assert said.count("skipped an unreadable image") == 1
    stated = json.loads((tmp_path / "whole" / "data.json").read_text(encoding="utf-8"))
    assert stated["data"] == str(coco)
    assert stated["stream"] == StreamTable.open(pattern).record()
    assert len(stated["stream"]["shards"]) == 4 and stated["stream"]["pattern"] == pattern
    assert whole.metrics["images"] == 8 and whole.page.is_file()
    assert whole.run.history()[1]["unreadable_images"] == 1
    notes = evaluate(str(tmp_path / "whole"))["notes"]  # on what it was validated on
    assert "whether these are among them is not known" in notes[0]
    with pytest.raises(CaptuneError, match="trained on a stream"):
        evaluate(str(tmp_path / "whole"), hubness=True)

    stop_after(monkeypatch, 6)  # inside the second epoch
    with pytest.raises(TrainingStopped):
        train("run")
    with pytest.raises(CaptuneError, match="--resume"):
        train("run")
    resumed = train("run", resume=True)
    assert history(resumed.run) == history(whole.run)
    ended = [load_file(found.run.weights_path) for found in (resumed, whole)]
    torch.testing.assert_close(*ended, rtol=0, atol=0)

    stop_after(monkeypatch, 6)
    with pytest.raises(TrainingStopped):
        train("other")
    capsys.readouterr()
    other = train("other", resume=True, workers=2)
    said = capsys.readouterr().err
    assert "it begins anew, so the images of its first 2 steps are met again" in said
    assert [row["step"] for row in other.run.history()] == [4, 8]


def test_other_shards_are_another_run(
    pattern: str, coco: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(pattern: str) -> None:
        train_on_shards(
            pattern, val_data=str(coco), config=config, out=tmp_path / "run", resume=True
        )

    stop_after(monkeypatch, 1)
    with pytest.raises(TrainingStopped):
        train(pattern)
    moved = (tmp_path / "s").rename(tmp_path / "moved")  # the same ones elsewhere are the same
    stop_after(monkeypatch, 1)
    with pytest.raises(TrainingStopped):
        train(f"{moved}/squares-*.tar")
    with pytest.raises(CaptuneError, match=r"another configuration \(shards "):
        train(f"{moved}/squares-{{00..02}}.tar")


def test_what_may_be_wrong_is_one_line_and_code_two(
    pattern: str, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "s"
    (folder / "bare.tar").write_bytes(tar_of([("0.jpg", photo(0))]))
    val = ["--val-data", str(coco)]
    for words, expected in (
        ([pattern], "give --val-data DATA"),
        ([str(coco), *val], "names none"),
        ([f"{folder}/none-*.tar", *val], "no shard matches"),
        ([f"{folder}/squares-{{00..07}}.tar", *val], "4 of 8 shards are not there"),
        ([f"{folder}/bare.tar", *val], "no picture with a caption"),
        ([pattern, "--val-data", str(tmp_path / "nowhere")], "no data at"),
        ([pattern, *val, "standardise_features=true"], "leave it out"),
        ([pattern, *val, "freeze_backbone=true"], "which a stream has not"),
        ([pattern, *val, "train_split=val"], "shards have no splits"),
    ):
        assert main(["train", *words, "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("captune: error: ")]
        assert len(errors) == 1 and expected in errors[0], said
    assert not (tmp_path / "run").exists()
