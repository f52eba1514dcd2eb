"""Batches of a stream, made by loader workers: read in order, shuffled in a bounded buffer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from captune.data.augment import Augmentation
from captune.data.dataset import SIDES
from captune.data.pixels import (
    Pixels,
    UnreadableImageError,
    decode_image,
    resize_and_crop,
    stacked,
)
from captune.data.stream_order import Reader, Run, StreamOrder, shuffled
from captune.data.stream_shards import ShardReader, ShardSample
from captune.data.stream_table import StreamTable
from captune.errors import CaptuneError

BUFFER_STREAM = 5  # sets the buffer's generator apart from those of captions, crops and colours


class StreamedBatch(NamedTuple):
    """Pixels ``(B, 3, S, S)`` uint8 with image rows ``(B,)`` and the caption rows drawn ``(B,)``.

    ``broken``: what could not be decoded; ``failure``: why nothing more can be read, else empty.
    """

    pixels: Tensor
    images: Tensor
    caption_rows: Tensor
    broken: list[UnreadableImageError]
    failure: str = ""


class _Held(NamedTuple):
    """A place in the shuffle buffer: an image row of the stream, and its sample.

    The sample is None where it went into a step before the one that a resumed epoch begins with.
    """

    image: int
    first_caption: int
    sample: ShardSample | None


class StreamDataset(IterableDataset[StreamedBatch]):
    """The batches of one process; each loader worker makes every ``lanes``-th of them.

    Caption, crop and flip are drawn as :class:`captune.data.dataset.COCOClipDataset` draws them: by
    seed, epoch and image, whoever decodes it.

    Args:
        table: the stream.
        order: who reads what.
        image_size: side of the square crop in pixels.
        augment: what is drawn for the pixels; None: the centre square.
        buffer: samples, encoded, that a worker shuffles among each other.
        reader: the process; its lanes are the loader's workers.
    """

    def __init__(
        self,
        table: StreamTable,
        order: StreamOrder,
        *,
        image_size: int,
        augment: Augmentation | None,
        buffer: int,
        reader: Reader,
    ) -> None:
        self.table = table
        self.order = order
        self.image_size = image_size
        self.augment = augment
        self.buffer = buffer
        self.reader = reader
        self.epoch = 0
        self.start = 0
        self.size = image_size

    def begin(self, epoch: int, start: int = 0, size: int = 0) -> None:
        """Go to step ``start`` of ``epoch``, its crops ``size`` wide (0: ``image_size``)."""
        self.epoch, self.start, self.size = epoch, start, size or self.image_size

    def __iter__(self) -> Iterator[StreamedBatch]:
        worker = get_worker_info()
        # A loader asks its workers in turn, the first one first: it makes the step `start`.
        lane = ((worker.id if worker else 0) + self.start) % self.reader.lanes
        try:
            yield from self._batches(dataclasses.replace(self.reader, lane=lane))
        # Raised in a worker, it would arrive with the traceback of another process in its words.
        except CaptuneError as error:
            empty = torch.empty(0, dtype=torch.int64)
            yield StreamedBatch(torch.empty(0, 3, 1, 1).byte(), empty, empty, [], str(error))

    def _batches(self, reader: Reader) -> Iterator[StreamedBatch]:
        size = self.order.batch_size
        runs = self.order.runs(self.epoch, reader)
        total = sum(run.high - run.low for run in runs)
        done = len(range(reader.lane, self.start, reader.lanes)) * size
        given = np.zeros(total, dtype=np.bool_)
        places = shuffled(range(total), self.buffer, self._rng(reader))
        given[list(islice(places, done))] = True
        held = shuffled(self._read(runs, given), self.buffer, self._rng(reader))
        for _ in islice(held, done):
            pass
        for _ in range(done, total, size):
            yield self._batch(list(islice(held, size)))

    def _rng(self, reader: Reader) -> np.random.Generator:
        return np.random.default_rng(
            [self.order.seed, self.epoch, reader.rank, reader.lane, BUFFER_STREAM]
        )

    def _read(self, runs: list[Run], given: npt.NDArray[np.bool_]) -> Iterator[_Held]:
        """The samples of ``runs`` in order, those marked in ``given (n,)`` without their bytes."""
        place = 0
        for run in runs:
            first = int(self.table.first_image[run.shard])
            starts = self.table.starts(run.shard)
            skipped = given[place : place + run.high - run.low]
            place += len(skipped)
            samples = iter(()) if skipped.all() else self._samples(run)
            for row, skip in zip(range(run.low, run.high), skipped, strict=True):
                sample = next(samples, None)
                yield _Held(first + row, int(starts[row]), None if skip else sample)

    def _samples(self, run: Run) -> Iterator[ShardSample]:
        """Samples ``low`` to ``high`` of a shard.

        Raises:
            CaptuneError: they are no longer the ones that were indexed.
        """
        index = self.table.shards[run.shard]
        marks = index.marks()
        alike = 0
        for sample in ShardReader(index.url):
            if sample.mark != marks[alike]:
                break
            if alike >= run.low:
                yield sample
            alike += 1
            if alike == run.high:
                return
        raise CaptuneError(
            f"shard {index.url} is not the one that was indexed (it differs from sample "
            f"{alike + 1:,} on): train on it anew, in another folder"
        )

    def _batch(self, items: list[_Held]) -> StreamedBatch:
        pixels, images, rows, broken = [], [], [], []
        for item in items:
            assert item.sample is not None  # those without went into earlier steps
            rng = np.random.default_rng([self.order.seed, self.epoch, item.image])
            row = item.first_caption + int(rng.integers(len(item.sample.captions)))
            try:
                pixels.append(torch.from_numpy(self._pixels(item.sample, rng)))
            except UnreadableImageError as error:
                broken.append(error)
                continue
            images.append(item.image)
            rows.append(row)
        return StreamedBatch(
            stacked(pixels),
            torch.tensor(images, dtype=torch.int64),
            torch.tensor(rows, dtype=torch.int64),
            broken,
        )

    def _pixels(self, sample: ShardSample, rng: np.random.Generator) -> Pixels:
        if self.augment is None:
            image = decode_image(sample.image, sample.name, least_side=self.size)
            return resize_and_crop(image, self.size)
        least = self.augment.least_side(self.size)
        image = decode_image(sample.image, sample.name, least_side=least)
        may_flip = not any(SIDES.search(text) for text in sample.captions)
        return self.augment.apply(image, self.size, rng, flip_allowed=may_flip)
