"""A tiny training: 24 scenes of coloured squares, a ResNet of a few thousand weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from captune.config import DEFAULT_CONFIG, Config
from captune.data.sources import open_source
from captune.data.table import CaptionTable
from captune.training import loop as loop_module


@pytest.fixture
def tables(coco: Path) -> tuple[CaptionTable, CaptionTable]:
    source = open_source(coco)
    return source.table("train"), source.table("val")


@pytest.fixture
def config(tiny_resnet: Path, tiny_sentence: Path) -> Config:
    return DEFAULT_CONFIG.replace(
        recipe="plain",
        image_encoder=str(tiny_resnet),
        text_encoder=str(tiny_sentence),
        batch_size=8,
        num_epochs=3,
        learning_rate=3e-3,
        hidden_dim=32,
        num_workers=0,
        precision="fp32",
        log_with="none",
    )


@pytest.fixture
def best(config: Config) -> Config:
    """Two epochs of three steps in each stage; dropout, mirroring and crops as the recipe has."""
    return config.replace(
        recipe="best",
        head_epochs=2,
        num_epochs=2,
        head_batch_size=8,
        bank_negatives=16,
        head_learning_rate=1e-2,
        duplicate_threshold=0.0,  # to the tiny random text tower nearly all captions are alike
    )


@pytest.fixture
def ctrl_c_in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``ctrl_c_in_step(5)``: Ctrl-C in the fifth step from now on, counted over all trainings."""

    def arm(stop_at: int) -> None:
        steps = 0
        real = loop_module.TrainingLoop._after_step

        def after_step(self: Any, meter: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            real(self, meter)

        monkeypatch.setattr(loop_module.TrainingLoop, "_after_step", after_step)

    return arm
