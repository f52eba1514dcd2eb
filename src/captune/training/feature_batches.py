"""Batches for stage 1: kept features in place of pixels, no photo is decoded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from captune.bank import CaptionBank
from captune.config import Config
from captune.data.dataset import EpochBatches, draw_caption, draw_generator
from captune.data.table import CaptionTable
from captune.features import FeatureStore
from captune.processes import processes
from captune.training.loader import Batch, caption_draw, check_bank, make_batch
from captune.training.sharing import exchange


class FeatureBatches:
    """Batches of kept features in place of pixels, drawn as :class:`BatchLoader` draws them.

    Args:
        store: the features of the table's images; those that could not be read are left out.
        table: images and captions.
        bank: of ``table.texts()``.
        config: seed, ``flip`` (mirrored features), ``head_batch_size``, captions of a step.
        shuffle: a new order each epoch, last partial batch dropped; else in order, all of it.
    """

    def __init__(
        self,
        store: FeatureStore,
        table: CaptionTable,
        bank: CaptionBank,
        config: Config,
        *,
        shuffle: bool,
    ) -> None:
        check_bank(bank, table)
        self.store = store
        self.table = table
        self.bank = bank
        self.mirrored = config.flips and shuffle
        self.captions = caption_draw(table, config) if shuffle else None
        self._rows = np.flatnonzero(store.readable)
        self.here = processes()
        self._shares = shuffle and self.here.count > 1
        self._keys = EpochBatches(
            len(self._rows),
            config.head_batch_size,
            seed=config.seed,
            shuffle=shuffle,
            here=self.here,
        )

    @property
    def steps(self) -> int:
        """Batches of a whole epoch."""
        return self._keys.steps

    @property
    def unreadable(self) -> dict[str, str]:
        """As a :class:`BatchLoader` counts them; the store has named them already."""
        broken = np.flatnonzero(~self.store.readable)
        return {str(self.table.path(int(row))): "unreadable" for row in broken}

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from position ``start`` on."""
        self._keys.begin(epoch, start)
        for step, keys in enumerate(self._keys, start):
            keys = [key._replace(image=int(self._rows[key.image])) for key in keys]
            generators = [draw_generator(self.table, key) for key in keys]
            images = [key.image for key in keys]
            pairs = zip(images, generators, strict=True)
            drawn = [draw_caption(self.table, image, rng) for image, rng in pairs]
            mirrored = [self.mirrored and rng.random() < 0.5 for rng in generators]
            features = self.store.lookup(np.array(images, dtype=np.int64), np.array(mirrored, bool))
            rows = torch.tensor(images, dtype=torch.int64)
            chosen = torch.tensor(drawn, dtype=torch.int64)
            sizes = None
            if self._shares:
                features, rows, chosen, sizes, _ = exchange(self.here, features, rows, chosen, [])
            yield make_batch(features, rows, chosen, self.bank, self.captions, epoch, step, sizes)
