"""The sigmoid loss against a slow loop written from its formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from captune.losses import SigLIPLoss
from slow_losses import batch, unit


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("duplicates", ["ignore", "positive"])
def test_siglip_equals_the_slow_loop(seed: int, duplicates: str) -> None:
    image, text, pairs = batch(seed, duplicates)
    loss = SigLIPLoss(temperature=0.2, bias=-3.0)
    image.requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        for j in range(15):
            if not pairs.ignored[i, j]:
                sign = 1 if pairs.positive[i, j] else -1
                score = image[i].double() @ text[j].double() / 0.2 - 3
                total = total + torch.log(1 + torch.exp(-sign * score)) / 4
    found = loss(image, text, pairs)
    assert float(found) == pytest.approx(float(total), rel=1e-5)
    grads = [torch.autograd.grad(value, image, retain_graph=True)[0] for value in (found, total)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    found.backward()
    assert loss.bias.grad is not None and loss.bias.grad != 0


def test_siglip_without_pairs_is_the_diagonal() -> None:
    image, text = unit(6, 4, 0), unit(6, 4, 1)
    sign = 2 * torch.eye(6) - 1
    want = -F.logsigmoid(sign * (image @ text.T / 0.1 - 10)).sum() / 6
    assert float(SigLIPLoss()(image, text)) == pytest.approx(float(want), rel=1e-6)
