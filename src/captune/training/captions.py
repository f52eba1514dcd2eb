"""Which captions stand in a step: those of its images, and random ones of the whole bank."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from captune.data.table import CaptionTable, Rows


class StepCaptions(NamedTuple):
    """C captions: rows of the table ``(C,)``, their images ``(C,)``; the first ``own`` belong to
    images of the step, each image's first one first."""

    rows: Rows
    images: Rows
    own: int


class CaptionDraw:
    """Draws the captions of a step; a function of seed, epoch, step and the step's images alone.

    Args:
        table: M captions.
        captions_per_image: 1 is the caption that the dataset drew; more are drawn at random
            beside it, 0 takes all.
        bank_negatives: random captions of the whole table added to them.
        seed: of all draws.
    """

    def __init__(
        self, table: CaptionTable, *, captions_per_image: int, bank_negatives: int, seed: int
    ) -> None:
        self.table = table
        self.captions_per_image = captions_per_image
        self.bank_negatives = bank_negatives
        self.seed = seed

    def draw(self, images: Rows, drawn: Rows, epoch: int, step: int) -> StepCaptions:
        """The captions for ``images (B,)``, of which the dataset drew ``drawn (B,)``."""
        own = [drawn, *(self._others(*pair, epoch) for pair in zip(images, drawn, strict=True))]
        rows = np.concatenate(own)
        bank = self._bank(rows, epoch, step)
        rows = np.concatenate([rows, bank]).astype(np.int64)
        return StepCaptions(rows, self.table.image_of_caption[rows], len(rows) - len(bank))

    def _others(self, image: int, drawn: int, epoch: int) -> Rows:
        """Further captions of an image, beside the one that was drawn."""
        if self.captions_per_image == 1:
            return np.empty(0, dtype=np.int64)
        rows = self.table.captions_of(int(image))
        others: Rows = rows[rows != drawn]
        wanted = self.captions_per_image - 1
        if wanted < 0 or wanted >= len(others):
            return others
        rng = np.random.default_rng([self.seed, epoch, int(self.table.image_ids[image]), 1])
        return np.asarray(rng.choice(others, wanted, replace=False), dtype=np.int64)

    def _bank(self, own: Rows, epoch: int, step: int) -> Rows:
        """Random captions of the table that are not among ``own``."""
        total = self.table.captions.num_rows
        if self.bank_negatives == 0:
            return np.empty(0, dtype=np.int64)
        if self.bank_negatives >= total:
            rows = np.arange(total)
        else:
            rng = np.random.default_rng([self.seed, epoch, step, 2])
            rows = rng.choice(total, self.bank_negatives, replace=False, shuffle=False)
        return np.asarray(rows[~np.isin(rows, own)], dtype=np.int64)
