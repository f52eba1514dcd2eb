"""A tiny training: 24 scenes of coloured squares, a ResNet of a few thousand weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from captune.config import DEFAULT_CONFIG, Config
from captune.data.sources import open_source
from captune.data.table import CaptionTable


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
