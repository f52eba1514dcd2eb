"""Photos in order, decoded a batch at a time: for what passes each of them once, as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from captune.data.dataset import COCOClipDataset, DrawKey, Sample, SkippingDataset
from captune.data.pixels import UnreadableImageError, stacked
from captune.data.table import CaptionTable
from captune.device import leave_stopping_to_main


class Decoded(NamedTuple):
    """A batch: the image ``rows`` of the n photos in it that could be read, their
    ``pixels (n, 3, S, S)`` uint8, and what was ``broken``."""

    rows: list[int]
    pixels: Tensor
    broken: list[str]


def decode_batches(
    table: CaptionTable, size: int, batches: Sequence[range], *, workers: int
) -> Iterator[Decoded]:
    """The centre squares of a table's photos, resized, without any draw.

    Args:
        table: N images.
        size: S.
        batches: image rows of each.
        workers: processes that decode; 0: this one.
    """
    dataset = COCOClipDataset(table=table, image_size=size)
    return iter(
        DataLoader(
            SkippingDataset(dataset),
            batch_sampler=([DrawKey(row, 0, 0) for row in rows] for rows in batches),
            num_workers=workers if len(batches) > 2 else 0,  # a few are not worth a process
            collate_fn=_collate,
            worker_init_fn=leave_stopping_to_main,
            pin_memory=torch.cuda.is_available(),
            # A loader draws from the global generator when it starts; the training that follows
            # must be the same whether this was on disk or not.
            generator=torch.Generator(),
        )
    )


def _collate(items: list[Sample | UnreadableImageError]) -> Decoded:
    good = [item for item in items if isinstance(item, Sample)]
    pixels = stacked([sample.pixels for sample in good])
    broken = [str(item) for item in items if isinstance(item, UnreadableImageError)]
    return Decoded([sample.image for sample in good], pixels, broken)
