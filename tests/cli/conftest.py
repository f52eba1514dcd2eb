"""The command line in this process, and a run that it trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from captune.cli.main import main
from conftest import write_split


@pytest.fixture(scope="session")
def tiny(tiny_resnet: Path, tiny_sentence: Path) -> list[str]:
    """Overrides that make any training a matter of two seconds."""
    return [
        f"image_encoder={tiny_resnet}",
        f"text_encoder={tiny_sentence}",
        "num_workers=0",
        "log_with=none",
        "batch_size=8",
        "image_size=32",
        "num_epochs=1",
    ]


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO 2014 folder that is only read."""
    folder = tmp_path_factory.mktemp("cli") / "squares"
    write_split(folder, "train", 24)
    write_split(folder, "val", 8, first=11)
    return folder


@pytest.fixture(scope="session")
def trained(tiny: list[str], squares: Path) -> Path:
    """A run that is only copied."""
    run = squares.parent / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPTUNE_CACHE", str(squares.parent / "cache"))
        assert main(["train", str(squares), "--out", str(run), *tiny]) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
