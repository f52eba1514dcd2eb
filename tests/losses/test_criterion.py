"""What holds for every loss over pairs."""

from __future__ import annotations

import pytest
import torch

from captune.losses import ContrastiveLoss, InfoNCELoss, SigLIPLoss
from captune.matching import Pairs
from slow_losses import batch


@pytest.mark.parametrize(
    "loss", [ContrastiveLoss(hard_negatives=1.0, soft_targets=0.2), SigLIPLoss()]
)
def test_what_is_ignored_for_all_images_has_no_gradient(loss: torch.nn.Module) -> None:
    image, text, pairs = batch(0, threshold=0.0)
    ignored = pairs.ignored.clone()
    ignored[:, 12] = True
    text.requires_grad_()
    loss(image, text, pairs._replace(ignored=ignored)).backward()
    assert text.grad is not None
    assert (text.grad[12] == 0).all() and (text.grad[11] != 0).all()


@pytest.mark.parametrize("loss", [ContrastiveLoss(hard_negatives=1.0), SigLIPLoss()])
def test_order_does_not_matter(loss: torch.nn.Module) -> None:
    image, text, pairs = batch(4)
    rows = torch.tensor([2, 0, 3, 1])
    columns = torch.tensor([5, 1, 7, 0, 2, 6, 3, 4, 14, 8, 10, 9, 13, 11, 12])
    other = Pairs(
        pairs.images[rows],
        pairs.caption_images[columns],
        pairs.own,
        pairs.positive[rows][:, columns],
        pairs.ignored[rows][:, columns],
    )
    assert float(loss(image[rows], text[columns], other)) == pytest.approx(
        float(loss(image, text, pairs)), rel=1e-6
    )


@pytest.mark.parametrize("loss", [ContrastiveLoss(), SigLIPLoss()])
def test_half_precision_around_it_changes_nothing(loss: torch.nn.Module) -> None:
    image, text, pairs = batch(0)
    want = float(loss(image, text, pairs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(image, text, pairs)
    assert found.dtype == torch.float32 and float(found) == want
    assert loss(image.half(), text.half(), pairs).dtype == torch.float32


@pytest.mark.parametrize("loss", [ContrastiveLoss(), SigLIPLoss()])
def test_shapes_that_do_not_fit_are_named(loss: torch.nn.Module) -> None:
    image, text, pairs = batch(0)
    with pytest.raises(ValueError, match="4 images, 15 texts"):
        loss(image, text)
    with pytest.raises(ValueError, match="4 images and 14 texts"):
        loss(image, text[1:], pairs)
    with pytest.raises(ValueError, match="4 images and 15 texts"):
        loss(image, text, pairs._replace(ignored=pairs.ignored[:1]))


def test_only_losses_over_pairs_say_so() -> None:
    assert ContrastiveLoss.takes_pairs and SigLIPLoss.takes_pairs
    assert not getattr(InfoNCELoss(), "takes_pairs", False)
