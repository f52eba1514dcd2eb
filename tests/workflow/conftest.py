"""What a test of a workflow may write into."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from captune.workflow.train import Outcome


@pytest.fixture
def run(outcome: Outcome, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may write into."""
    return Path(shutil.copytree(outcome.run.folder, tmp_path / "run"))


@pytest.fixture
def data(outcome: Outcome) -> str:
    """The folder that the run was trained on: train, val, and a split it never saw."""
    return outcome.run.provenance.data
