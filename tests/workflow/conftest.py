"""A trained run of tiny towers, shared by the tests that only read it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from captune.config import Config
from captune.workflow.train import Outcome, train
from conftest import write_split


@pytest.fixture(scope="session")
def tiny_config(tiny_resnet: Path, tiny_sentence: Path) -> Config:
    return Config(
        image_encoder=str(tiny_resnet),
        text_encoder=str(tiny_sentence),
        batch_size=8,
        num_epochs=1,
        image_size=32,
        num_workers=0,
        log_with="none",
    )


@pytest.fixture(scope="session")
def outcome(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One epoch on 24 scenes, and a page on 8 others; nothing may write into its folder."""
    folder = tmp_path_factory.mktemp("workflow")
    write_split(folder / "squares", "train", 24)
    write_split(folder / "squares", "val", 8, first=11)
    write_split(folder / "squares", "fresh", 6, first=21)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPTUNE_CACHE", str(folder / "cache"))
        return train(str(folder / "squares"), config=tiny_config, out=folder / "run")


@pytest.fixture
def run(outcome: Outcome, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may write into."""
    return Path(shutil.copytree(outcome.run.folder, tmp_path / "run"))


@pytest.fixture
def data(outcome: Outcome) -> str:
    """The folder that the run was trained on: train, val, and a split it never saw."""
    return outcome.run.provenance.data
