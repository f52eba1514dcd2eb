"""Batches of a stream for the training step: pixels from its shards, text from its banks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from captune.config import Config
from captune.console import say
from captune.data.stream_dataset import StreamDataset
from captune.data.stream_order import Reader, StreamOrder
from captune.data.stream_table import StreamTable
from captune.device import leave_stopping_to_main, loader_workers
from captune.errors import CaptuneError
from captune.processes import Processes
from captune.training.loader import (
    Batch,
    augmentation,
    caption_draw,
    crop_side,
    make_batch,
    note_unreadable,
)
from captune.training.progress import EpochProgress
from captune.training.sharing import exchange
from captune.training.stream_bank import StreamBank


class StreamLoader:
    """What :class:`captune.training.loader.BatchLoader` is for a table.

    The batches of an epoch are decided by seed, epoch, and how many processes and loader workers
    share the stream; ``layout`` names the latter two.

    Args:
        table: the stream.
        bank: of its captions.
        config: batch size (of all processes together, who have equal parts of it), seed, workers,
            augmentation, captions of a step.
        image_size: side of the crops in pixels, where the config changes nothing of it.
        here: the processes that share the stream, and this one among them.

    Raises:
        CaptuneError: the processes cannot have equal parts of a batch.
    """

    def __init__(
        self,
        table: StreamTable,
        bank: StreamBank,
        config: Config,
        *,
        image_size: int,
        here: Processes,
    ) -> None:
        workers = loader_workers(config.num_workers)
        reader = Reader(here.rank, here.count, lanes=max(1, workers))
        self.here = here
        self.table = table
        self.bank = bank
        self.captions = caption_draw(table, config)
        self.side = partial(crop_side, config=config, image_size=image_size)
        self.unreadable: dict[str, str] = {}
        self.layout = f"{here.count} × {reader.lanes} readers (processes × loader workers)"
        share = equal_share(config.batch_size, here.count)
        self.order = StreamOrder(table.samples, share, seed=config.seed, world_size=here.count)
        self.dataset = StreamDataset(
            table,
            self.order,
            image_size=image_size,
            augment=augmentation(config),
            buffer=config.shuffle_buffer,
            reader=reader,
        )
        self._loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=leave_stopping_to_main,
            pin_memory=torch.cuda.is_available(),
            # Else each start of an epoch draws from the global state: a resumed epoch once more.
            generator=torch.Generator(),
        )
        if self.order.left_out:
            say(
                f"each epoch leaves out {self.order.left_out:,} of {len(table):,} images, others "
                f"each time: {here.count} x {self.steps:,} steps of {self.order.batch_size}"
            )

    @property
    def steps(self) -> int:
        """Batches of a whole epoch, the same for every process."""
        return self.order.steps

    def __len__(self) -> int:
        return self.steps

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from position ``start`` on; one may be empty of images.

        Raises:
            CaptuneError: a shard can no longer be read, or is another one.
        """
        self.dataset.begin(epoch, start, self.side(epoch))
        for step, found in enumerate(self._loader, start):
            if found.failure:
                raise CaptuneError(found.failure)
            pixels, images, drawn, broken, _ = found
            sizes = None
            if self.here.count > 1:
                pixels, images, drawn, sizes, broken = exchange(
                    self.here, pixels, images, drawn, broken
                )
            note_unreadable(broken, self.unreadable)
            yield make_batch(pixels, images, drawn, self.bank, self.captions, epoch, step, sizes)


def equal_share(batch_size: int, count: int) -> int:
    """How many images of a step each of ``count`` processes reads of a stream.

    Raises:
        CaptuneError: they cannot have equal parts of it.
    """
    share, rest = divmod(batch_size, count)
    if rest:
        near = [str(each * count) for each in (share, share + 1) if each]
        raise CaptuneError(
            f"batch_size {batch_size} cannot be shared equally by {count} processes, as shards "
            f"want it: take {' or '.join(near)}"
        )
    return share


def position_in_stream(
    progress: EpochProgress, loader: Any, scheduler: LRScheduler, first_epoch: int
) -> EpochProgress:
    """Where a resumed run goes on: at the epoch's start where a stream is now shared otherwise.

    Args:
        progress: as the run stopped.
        loader: of the stage; one that is not over a stream has no ``layout``.
        scheduler: put back to the epoch's first step where that is where the run goes on.
        first_epoch: of the stage.
    """
    layout = getattr(loader, "layout", "")
    if progress.layout in ("", layout):
        return progress
    if progress.step:
        say(
            f"epoch {progress.epoch + 1} was begun by {progress.layout}, and {layout} cannot go "
            f"on inside of it: it begins anew, so the images of its first {progress.step:,} steps "
            "are met again"
        )
    scheduler.last_epoch = (progress.epoch - first_epoch) * loader.steps - 1
    scheduler.step()
    return EpochProgress(progress.epoch)
