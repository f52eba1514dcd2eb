"""The parts of a loss, one for each of several processes, against all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captune.losses import ContrastiveLoss, SigLIPLoss
from captune.matching import Pairs, PairsPart, match_pairs, match_part, mix_pairs

B, D, PARTS = 11, 8, 3
SETTINGS: list[dict[str, Any]] = [
    {},
    {"soft_targets": 0.3},
    {"hard_negatives": 0.5},
    {"queue": 20, "dimension": D},
    {"queue": 20, "dimension": D, "soft_targets": 0.1, "hard_negatives": 0.5},
]


class Step:
    """B images with 1 to 5 captions each, some of them alike, and 17 captions of the bank."""

    def __init__(self, *, mixed: bool, threshold: float, duplicates: str) -> None:
        torch.manual_seed(0)
        self.images = torch.randperm(50)[:B]
        others = self.images.repeat_interleave(torch.randint(0, 5, (B,)))
        self.own = B + len(others)
        self.owners = torch.cat([self.images, others, torch.randint(0, 50, (17,))])
        self.text = F.normalize(torch.randn(len(self.owners), D), dim=-1)
        self.text[[5, B + 3, -1, -2]] = self.text[[0, 1, 2, 7]]
        self.image = F.normalize(torch.randn(B, D), dim=-1)
        self.mix = (torch.randperm(B), 0.5 + torch.rand(B) / 2) if mixed else None
        self.alike: dict[str, Any] = {"duplicate_threshold": threshold, "duplicates": duplicates}

    def whole(self) -> Pairs:
        pairs = match_pairs(self.images, self.owners, self.text, own=self.own, **self.alike)
        return mix_pairs(pairs, *self.mix) if self.mix else pairs

    def part(self, number: int, total: Callable[[Tensor], Tensor]) -> PairsPart:
        return match_part(
            (self.images, self.owners, self.own),
            self.text,
            rows=slice(B * number // PARTS, B * (number + 1) // PARTS),
            total=total,
            mix=self.mix,
            **self.alike,
        )


class Sums:
    """What the parts add up, in two passes: first each says what it has, then all have the sum."""

    def __init__(self) -> None:
        self.said: list[list[Tensor]] = [[] for _ in range(PARTS)]
        self.whole = False

    def of(self, part: int) -> Callable[[Tensor], Tensor]:
        calls = iter(range(10))

        def total(tensor: Tensor) -> Tensor:
            if not self.whole:
                self.said[part].append(tensor.clone())
                return tensor
            place = next(calls)
            return sum((said[place] for said in self.said), torch.zeros(()))

        return total


def value_and_gradients(
    step: Step, make: Callable[[], Any], pairs: Pairs | PairsPart
) -> list[Tensor]:
    loss = make()
    image, text = step.image.clone().requires_grad_(), step.text.clone().requires_grad_()
    value = loss(image, text, pairs)
    return [value.detach(), *torch.autograd.grad(value, [image, text, *loss.parameters()])]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("duplicates", ["ignore", "positive"])
@pytest.mark.parametrize("threshold", [0.0, 0.6])
@pytest.mark.parametrize("settings", [*SETTINGS, None])
def test_parts_add_up_to_the_loss_and_its_gradients(
    settings: dict[str, Any] | None, threshold: float, duplicates: str, mixed: bool
) -> None:
    step = Step(mixed=mixed, threshold=threshold, duplicates=duplicates)

    def make() -> Any:
        if settings is None:
            return SigLIPLoss()
        loss = ContrastiveLoss(learn_temperature=True, **settings)
        if loss.queue is not None:
            torch.manual_seed(3)
            earlier = F.normalize(torch.randn(15, D), dim=-1)
            ids = torch.arange(15) + int(step.images[0]) - 5
            loss.queue.append(earlier, ids)
            loss.queue.remember(ids[[2, 9, 2]], F.normalize(step.text[[0, 3, 6]] + 0.1, dim=-1))
        return loss

    want = value_and_gradients(step, make, step.whole())
    sums = Sums()
    for number in range(PARTS):
        value_and_gradients(step, make, step.part(number, sums.of(number)))
    sums.whole = True
    parts = [
        value_and_gradients(step, make, step.part(number, sums.of(number)))
        for number in range(PARTS)
    ]
    assert want[0] > 0.1 and all(gradient.abs().max() > 1e-4 for gradient in want[1:])
    found = [torch.stack(tensors).sum(0) for tensors in zip(*parts, strict=True)]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    if threshold:  # it is told apart from none
        step.alike["duplicate_threshold"] = 0.0
        assert value_and_gradients(step, make, step.whole())[0] != want[0]


def test_no_part_forms_all_pairs() -> None:
    step = Step(mixed=True, threshold=0.6, duplicates="ignore")
    for number, rows in enumerate((3, 4, 4)):
        part = step.part(number, lambda tensor: tensor)
        columns = int(torch.isin(step.owners[: step.own], step.images[part.rows]).sum())
        assert part.to_text.positive.shape == (rows, len(step.owners))
        assert part.to_image.positive.shape == (columns, B) and len(part.columns) == columns
