"""InfoNCE against a slow loop written from its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from captune.losses import InfoNCELoss


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=-1)


def slow_info_nce(image: torch.Tensor, text: torch.Tensor, temperature: float) -> float:
    count, total = len(image), 0.0
    for i in range(count):
        own = math.exp(float(image[i] @ text[i]) / temperature)
        over_texts = sum(math.exp(float(image[i] @ text[j]) / temperature) for j in range(count))
        over_images = sum(math.exp(float(image[j] @ text[i]) / temperature) for j in range(count))
        total -= math.log(own / over_texts) + math.log(own / over_images)
    return total / (2 * count)


@pytest.mark.parametrize("rows", [2, 3, 17])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_the_slow_loop(rows: int, temperature: float) -> None:
    image, text = unit(rows, 8, 1), unit(rows, 8, 2)
    fast = float(InfoNCELoss(temperature=temperature)(image, text))
    assert fast == pytest.approx(slow_info_nce(image, text, temperature), rel=1e-9)


def test_is_symmetric_in_its_towers() -> None:
    image, text = unit(9, 8, 3), unit(9, 8, 4)
    loss = InfoNCELoss()
    assert float(loss(image, text)) == pytest.approx(float(loss(text, image)), rel=1e-12)


def test_uninformative_embeddings_cost_log_of_the_batch() -> None:
    same = F.normalize(torch.ones(16, 4), dim=-1)
    assert float(InfoNCELoss()(same, same)) == pytest.approx(math.log(16), rel=1e-6)


def test_perfect_embeddings_cost_almost_nothing() -> None:
    basis = torch.eye(8)
    assert float(InfoNCELoss(temperature=0.05)(basis, basis)) < 1e-6


def test_gradient_pulls_partners_together() -> None:
    image, text = unit(6, 8, 5).requires_grad_(), unit(6, 8, 6)
    InfoNCELoss()(image, text).backward()
    moved = F.normalize(image - 0.1 * image.grad, dim=-1)
    image, moved = image.detach(), moved.detach()
    assert float(InfoNCELoss()(moved, text)) < float(InfoNCELoss()(image, text))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_above_zero(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        InfoNCELoss(temperature=temperature)
