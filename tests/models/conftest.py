"""A model of tiny towers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captune.models import CLIPModel


@pytest.fixture
def model(tiny_resnet: Path, tiny_sentence: Path) -> CLIPModel:
    torch.manual_seed(1)
    return CLIPModel(str(tiny_sentence), image_encoder=str(tiny_resnet), hidden_dim=24).eval()
