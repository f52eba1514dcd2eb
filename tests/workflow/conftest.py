"""What a test of a workflow may write into."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from captune.workflow.train import Outcome
from conftest import COLOURS, write_scene


@pytest.fixture
def run(outcome: Outcome, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may write into."""
    return Path(shutil.copytree(outcome.run.folder, tmp_path / "run"))


@pytest.fixture
def epoch(run: Path) -> str:
    """The name of a checkpoint of ``run`` whose head is another than the best model's."""
    state = load_file(run / "best_model.safetensors")
    torch.manual_seed(0)
    for key in ("head.hidden.weight", "head.output.weight"):
        state[key] += 0.5 * state[key].std() * torch.randn_like(state[key])
    save_file(state, run / "checkpoints" / "epoch-31.safetensors")
    return f"{run}@epoch-31"


@pytest.fixture
def data(outcome: Outcome) -> str:
    """The folder that the run was trained on: train, val, and a split it never saw."""
    return outcome.run.provenance.data


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Squares of three colours, a folder for each, six to learn from and four to judge."""
    root = tmp_path / "colours"
    for square in ("red", "green", "blue"):
        for number, ground in enumerate(g for g in COLOURS if g != square):
            write_scene(root / "train" / square / f"{number}.jpg", ground, square)
        for number, ground in enumerate([g for g in COLOURS if g != square][:4]):
            write_scene(root / "test" / square / f"{number}.jpg", ground, square, size=44)
    return root
