"""Batches for the training step: pixels from the dataset, text from the bank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from captune.bank import CaptionBank
from captune.config import DEFAULT_CONFIG, Config
from captune.console import say
from captune.data.augment import Augmentation
from captune.data.dataset import (
    COCOClipDataset,
    EpochBatches,
    Sample,
    SkippingDataset,
)
from captune.data.pixels import UnreadableImageError, stacked
from captune.data.table import CaptionTable
from captune.device import best_device, leave_stopping_to_main, loader_workers, send
from captune.errors import CaptuneError
from captune.models import CLIPModel
from captune.processes import processes
from captune.training.captions import CaptionDraw, Captioned
from captune.training.schedule import multiple_of_16, training_side
from captune.training.sharing import exchange
from captune.training.stream_bank import StreamBank


class Batch(NamedTuple):
    """B images, and the embeddings of C captions.

    ``inputs``: pixels ``(B, 3, S, S)`` uint8, or kept features ``(B, F)``; ``text (C, D)`` fp32
    unit length, as the frozen tower gives it; ``images (B,)`` int64 rows of the table,
    ``caption_images (C,)`` the image row of each caption. The first ``own`` captions belong to
    the batch's images; the first B of them are one of each image, in order.

    ``sizes``: where several processes share the batch, how many of its images each holds, in order;
    ``inputs`` are then this process's alone.
    """

    inputs: Tensor
    text: Tensor
    images: Tensor
    caption_images: Tensor
    own: int
    sizes: tuple[int, ...] | None = None

    def embed(self, model: CLIPModel) -> Tensor:
        """The images' embeddings ``(B, D)``, unit length."""
        inputs = send(self.inputs, model.device)
        return model.project_image(inputs) if inputs.dim() == 2 else model(inputs)


class Batches(Protocol):
    """What the training step reads: :class:`BatchLoader`, or a plain DataLoader made to fit."""

    bank: CaptionBank

    @property
    def table(self) -> CaptionTable:
        """Images and captions."""
        ...

    @property
    def steps(self) -> int:
        """Batches of a whole epoch."""
        ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from position ``start`` on."""
        ...


class BatchLoader:
    """Batches of a dataset, in an order decided by seed and epoch. See :func:`make_loader`.

    Broken image files are left out of their batch, named once and counted in ``unreadable``.
    ``side`` gives an epoch's side of the crops, in place of ``dataset.image_size``.
    """

    def __init__(
        self,
        dataset: COCOClipDataset,
        bank: CaptionBank,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        num_workers: int,
        captions: CaptionDraw | None = None,
        side: Callable[[int], int] | None = None,
    ) -> None:
        check_bank(bank, dataset.table)
        self.dataset = dataset
        self.bank = bank
        self.captions = captions
        self.side = side
        self.unreadable: dict[str, str] = {}
        self.here = processes()
        self._shares = shuffle and self.here.count > 1
        self._keys = EpochBatches(
            len(dataset), batch_size, seed=seed, shuffle=shuffle, here=self.here
        )
        self._loader: DataLoader[Any] = DataLoader(
            SkippingDataset(dataset),
            batch_sampler=self._keys,
            collate_fn=_collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_stopping_to_main,
            pin_memory=torch.cuda.is_available(),
            # Else each start of an epoch draws from the global state: a resumed epoch once more.
            generator=torch.Generator(),
        )

    @property
    def table(self) -> CaptionTable:
        """Images and captions."""
        return self.dataset.table

    @property
    def steps(self) -> int:
        """Batches of a whole epoch."""
        return self._keys.steps

    def __len__(self) -> int:
        return self.steps

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from position ``start`` on; one may be empty of images."""
        self._keys.begin(epoch, start, 0 if self.side is None else self.side(epoch))
        for step, (pixels, images, caption_rows, broken) in enumerate(self._loader, start):
            sizes = None
            if self._shares:
                pixels, images, caption_rows, sizes, broken = exchange(
                    self.here, pixels, images, caption_rows, broken
                )
            note_unreadable(broken, self.unreadable)
            yield make_batch(
                pixels, images, caption_rows, self.bank, self.captions, epoch, step, sizes
            )

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(0)


def note_unreadable(broken: Iterable[UnreadableImageError], known: dict[str, str]) -> None:
    """Name the photos that could not be read, each once, and keep why."""
    for error in broken:
        if error.path not in known:
            say(f"skipped an unreadable image: {error}")
        known[error.path] = error.reason


def make_batch(
    inputs: Tensor,
    images: Tensor,
    drawn: Tensor,
    bank: CaptionBank | StreamBank,
    captions: CaptionDraw | None = None,
    epoch: int = 0,
    step: int = 0,
    sizes: tuple[int, ...] | None = None,
) -> Batch:
    """A batch of images with the captions ``drawn (B,)`` for them, and those that join them."""
    if captions is None or len(images) == 0:
        return Batch(inputs, bank.lookup(drawn), images, images, len(drawn), sizes)
    joined = captions.draw(images.numpy(), drawn.numpy(), epoch, step)
    owners = torch.from_numpy(joined.images)
    return Batch(inputs, bank.lookup(joined.rows), images, owners, joined.own, sizes)


def check_bank(bank: CaptionBank, table: CaptionTable) -> None:
    if len(bank) != table.captions.num_rows:
        raise CaptuneError(
            f"the caption bank holds {len(bank):,} captions, the dataset "
            f"{table.captions.num_rows:,}: build it from dataset.table.texts()"
        )


class _PlainLoader:
    """A DataLoader over a :class:`COCOClipDataset`, read as :class:`Batches`."""

    def __init__(self, loader: DataLoader[Sample], bank: CaptionBank) -> None:
        self.loader = loader
        assert isinstance(loader.dataset, COCOClipDataset)
        self.dataset = loader.dataset
        self.bank = bank

    @property
    def table(self) -> CaptionTable:
        return self.dataset.table

    @property
    def steps(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        # Workers are started by the iteration, so they see the epoch set here (kept alive over
        # epochs, persistent_workers, they would not: make_loader's keys carry it).
        self.dataset.set_epoch(epoch)
        for step, sample in enumerate(self.loader):
            if step >= start:
                pixels, images, caption_rows, _ = sample
                yield make_batch(pixels, images, caption_rows, self.bank)


def make_loader(
    dataset: COCOClipDataset,
    bank: CaptionBank,
    config: Config = DEFAULT_CONFIG,
    *,
    shuffle: bool = True,
) -> BatchLoader:
    """Batches of ``dataset`` with its captions' embeddings from ``bank``.

    Args:
        dataset: images with captions.
        bank: of ``dataset.table.texts()``.
        config: batch size, seed and workers are read from it; for training also the captions of
            a step and the crops' side, which :func:`crop_side` gives.
        shuffle: a new order each epoch, last partial batch dropped; else in order, all of it.
    """
    return BatchLoader(
        dataset,
        bank,
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=shuffle,
        num_workers=loader_workers(config.num_workers, best_device(config.device)),
        captions=caption_draw(dataset.table, config) if shuffle else None,
        side=partial(crop_side, config=config, image_size=dataset.image_size) if shuffle else None,
    )


def crop_side(epoch: int, config: Config, image_size: int) -> int:
    """The side of the training crops in ``epoch`` of the run, stage 1's epochs counted.

    ``train_size_share`` below 1: a random crop shows objects larger than a centre crop does, and
    smaller crops make up for it (Touvron et al. 2019). They are a multiple of 16 wide.
    """
    full = image_size
    if config.train_size_share != 1:
        full = multiple_of_16(image_size * config.train_size_share)
    if not config.progressive_resizing:
        return full
    return training_side(epoch - config.head_epochs, config.num_epochs, full)


def augmentation(config: Config) -> Augmentation | None:
    """What is drawn for the pixels of training photos, a table's or a stream's; None: nothing."""
    if not config.augment:
        return None
    return Augmentation(config.crop_scale, config.rand_augment, config.flip)


def caption_draw(table: Captioned, config: Config) -> CaptionDraw | None:
    """None where each image stands in a step with the one caption that the dataset drew."""
    if config.captions_per_image == 1 and config.bank_negatives == 0:
        return None
    return CaptionDraw(
        table,
        captions_per_image=config.captions_per_image,
        bank_negatives=config.bank_negatives,
        seed=config.seed,
    )


def with_bank(loader: Any, model: CLIPModel) -> Batches:
    """``loader`` as :class:`Batches`; a DataLoader without a bank gets one, once, with a line.

    Raises:
        CaptuneError: the loader is not over a :class:`COCOClipDataset`.
    """
    if hasattr(loader, "batches"):
        return loader  # type: ignore[no-any-return]
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, COCOClipDataset):
        raise CaptuneError(
            f"a loader over COCOClipDataset is needed, found {type(loader).__name__} over "
            f"{type(dataset).__name__}: use make_loader(dataset, bank, config)"
        )
    if processes().count > 1:
        raise CaptuneError(
            "a plain DataLoader gives each process all images: use make_loader(dataset, bank, "
            "config), whose batches are shared among the processes"
        )
    if not hasattr(loader, "bank"):
        captions = dataset.table.captions.num_rows
        say(f"the loader carries no caption bank: building one from its {captions:,} captions")
        loader.bank = CaptionBank.build(dataset.table.texts(), model.text_encoder)
    return _PlainLoader(loader, loader.bank)


def _collate(
    items: list[Sample | UnreadableImageError],
) -> tuple[Tensor, Tensor, Tensor, list[UnreadableImageError]]:
    """Pixels, image rows and caption rows of what could be read, and what could not."""
    good = [item for item in items if isinstance(item, Sample)]
    broken = [item for item in items if isinstance(item, UnreadableImageError)]
    pixels = stacked([sample.pixels for sample in good])
    images = torch.tensor([s.image for s in good], dtype=torch.int64)
    caption_rows = torch.tensor([s.caption_row for s in good], dtype=torch.int64)
    return pixels, images, caption_rows, broken
