"""The frozen text tower: no part of the module, and never another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captune.encoders.text import load_text_encoder
from captune.errors import CaptuneError
from captune.models import CLIPModel


def test_the_text_tower_is_no_part_of_the_module(model: CLIPModel) -> None:
    text_parameters = {id(p) for p in model.text_encoder.model.parameters()}  # type: ignore[attr-defined]
    assert text_parameters and not text_parameters & {id(p) for p in model.parameters()}
    model.train()
    assert not model.text_encoder.model.training  # type: ignore[attr-defined]
    assert not any("text" in key for key in model.state_dict())


def test_a_text_tower_that_is_a_module_is_no_part_either(tiny_resnet: Path) -> None:
    class Tower(torch.nn.Linear):
        name, dimension, fingerprint = "own", 16, "1"

        def encode(self, texts: list[str]) -> torch.Tensor:
            return torch.eye(16)[: len(texts)]

    tower = Tower(4, 16)
    model = CLIPModel(tower, image_encoder=str(tiny_resnet))
    assert not tower.weight.requires_grad and not tower.training
    assert all(p is not tower.weight for p in model.parameters())
    model.train()
    assert not tower.training


def test_another_text_tower_is_refused(model: CLIPModel, tiny_clip: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(CaptuneError, match="is not the one the run was trained with"):
        CLIPModel.from_pretrained(tmp_path, text_encoder=load_text_encoder(str(tiny_clip)))
