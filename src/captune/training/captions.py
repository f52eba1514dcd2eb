"""Which captions stand in a step: those of its images, and random ones of the whole bank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from captune.data.table import Rows


class Captioned(Protocol):
    """What is asked of a table of images and captions, or of a stream of them."""

    def captions_of(self, image: int) -> Rows:
        """The caption rows of an image row."""
        ...

    def owners_of(self, captions: Rows) -> Rows:
        """``(C,)`` the image rows of caption rows."""
        ...

    def ids_of(self, images: Rows) -> Rows:
        """``(B,)`` the ids of image rows."""
        ...

    def negatives_for(self, images: Rows) -> Sequence[range]:
        """The caption rows that random negatives of a step with ``images`` are drawn from."""
        ...


class StepCaptions(NamedTuple):
    """C captions: rows of the table ``(C,)``, their images ``(C,)``; the first ``own`` belong to
    images of the step, each image's first one first."""

    rows: Rows
    images: Rows
    own: int


class CaptionDraw:
    """Draws the captions of a step; a function of seed, epoch, step and the step's images alone.

    Args:
        table: images and captions.
        captions_per_image: 1 is the caption that the dataset drew; more are drawn at random
            beside it, 0 takes all.
        bank_negatives: random captions of the whole table, or of a stream's shards at hand, added
            to them.
        seed: of all draws.
    """

    def __init__(
        self, table: Captioned, *, captions_per_image: int, bank_negatives: int, seed: int
    ) -> None:
        self.table = table
        self.captions_per_image = captions_per_image
        self.bank_negatives = bank_negatives
        self.seed = seed

    def draw(self, images: Rows, drawn: Rows, epoch: int, step: int) -> StepCaptions:
        """The captions for ``images (B,)``, of which the dataset drew ``drawn (B,)``."""
        own = [drawn, *(self._others(*pair, epoch) for pair in zip(images, drawn, strict=True))]
        rows = np.concatenate(own)
        bank = self._bank(rows, images, epoch, step)
        rows = np.concatenate([rows, bank]).astype(np.int64)
        return StepCaptions(rows, self.table.owners_of(rows), len(rows) - len(bank))

    def _others(self, image: int, drawn: int, epoch: int) -> Rows:
        """Further captions of an image, beside the one that was drawn."""
        if self.captions_per_image == 1:
            return np.empty(0, dtype=np.int64)
        rows = self.table.captions_of(int(image))
        others: Rows = rows[rows != drawn]
        wanted = self.captions_per_image - 1
        if wanted < 0 or wanted >= len(others):
            return others
        rng = np.random.default_rng(
            [self.seed, epoch, int(self.table.ids_of(np.array([image]))[0]), 1]
        )
        return np.asarray(rng.choice(others, wanted, replace=False), dtype=np.int64)

    def _bank(self, own: Rows, images: Rows, epoch: int, step: int) -> Rows:
        """Random captions of the table that are not among ``own``."""
        if self.bank_negatives == 0:
            return np.empty(0, dtype=np.int64)
        pools = self.table.negatives_for(images)
        ends = np.cumsum([len(pool) for pool in pools])
        total = int(ends[-1])
        if self.bank_negatives >= total:
            places = np.arange(total)
        else:
            rng = np.random.default_rng([self.seed, epoch, step, 2])
            places = rng.choice(total, self.bank_negatives, replace=False, shuffle=False)
        shift = np.array([pool.start for pool in pools]) - np.concatenate([[0], ends[:-1]])
        rows = places + shift[np.searchsorted(ends, places, side="right")]
        return np.asarray(rows[~np.isin(rows, own)], dtype=np.int64)
