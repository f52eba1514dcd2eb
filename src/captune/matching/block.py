"""Some queries against some candidates: what all pairs, and each part of them, are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captune.matching.duplicates import Likeness, near_duplicates


class Block(NamedTuple):
    """Some queries against some candidates, ``(R, K)`` each: as the fields of
    :class:`~captune.matching.pairs.Pairs`."""

    positive: Tensor
    ignored: Tensor
    share: Tensor | None = None

    @property
    def shares(self) -> Tensor:
        """``(R, K)`` fp32: 1 for a positive where nothing is shared."""
        return self.positive.float() if self.share is None else self.share

    @property
    def turned(self) -> Block:
        """Candidates against queries."""
        return Block(*(None if mask is None else mask.T for mask in self))  # type: ignore[arg-type]


def matched(
    images: Tensor, writers: Tensor, owners: Tensor, alike: Likeness
) -> tuple[Tensor, Tensor]:
    """``(R, K)`` positive and ignored: ``images (R,)`` against candidates of ``owners (K,)``."""
    positive = images[:, None] == owners  # (R, K)
    ignored = torch.zeros_like(positive)
    if alike.threshold > 0:
        near = near_duplicates(images, writers, alike)
        if alike.duplicates == "positive":
            positive = positive | near
        else:
            ignored = near & ~positive
    return positive, ignored


def mixed(one: Block, other: Block, weight: Tensor) -> Block:
    """Rows of images mixed by two: ``weight (R,)`` of ``one``, the rest of ``other``."""
    weight = weight[:, None]  # (R, 1)
    share = one.positive.float().mul_(weight)  # (R, K)
    share += other.positive.float().mul_(1 - weight)
    positive = share > 0
    return Block(positive, (one.ignored | other.ignored) & ~positive, share)
