"""COCOClipDataset: one image with one caption an epoch, every draw decided by the sampler's key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from captune.data.augment import Augmentation
from captune.data.pixels import UnreadableImageError, load_image, resize_and_crop
from captune.data.sources import find_dataset_dir, open_source
from captune.data.table import CaptionTable, Rows
from captune.data.tabular import TableOptions
from captune.processes import Processes

SIDES = re.compile(r"\b(left|right)(most|wards?|hand(ed)?)?\b", re.IGNORECASE)


class DrawKey(NamedTuple):
    """What a sample is a function of, beside the image: the sampler makes it, workers obey it.

    ``size`` is the side of the square crop; 0: the dataset's ``image_size``. Workers that live
    over epochs are told of a new side by it.
    """

    image: int
    epoch: int
    seed: int
    size: int = 0


class Sample(NamedTuple):
    """One image with one of its captions.

    ``pixels`` is ``(3, S, S)`` uint8 RGB; ``image`` and ``caption_row`` are rows of the table.
    """

    pixels: Tensor
    image: int
    caption_row: int
    caption: str


class COCOClipDataset(Dataset[Sample]):
    """Images with captions: COCO 2014, or any data that :func:`open_source` reads.

    Each item is one image with one of its captions. ``dataset[i]`` draws for the epoch set with
    :meth:`set_epoch`; a :class:`DrawKey` (from :class:`EpochBatches`) carries seed and epoch with
    it. Either way the caption, the crop and the flip are a function of seed, epoch and image id:
    the same whatever the workers, their number and the order.

    Args:
        split: ``train``, ``val``, ``karpathy-val``, … as the data has them.
        dataset_dir: a COCO 2014 folder or a table file; default ``$CAPTUNE_DATA``, else
            ``./data/coco2014``.
        image_size: side of the square crop in pixels.
        augment: what is drawn for the pixels; True: :class:`Augmentation`'s defaults, random
            resized crop and flip. An image with a caption that says left or right is not flipped.
        seed: of all draws.
        table: a table at hand, in place of ``split`` and ``dataset_dir``.

    Raises:
        CaptuneError: no data there, no such split.
        UnreadableImageError: on access, for a broken file.
    """

    def __init__(
        self,
        split: str = "train",
        dataset_dir: str | Path | None = None,
        *,
        image_size: int = 224,
        augment: bool | Augmentation = False,
        seed: int = 0,
        table: CaptionTable | None = None,
        options: TableOptions | None = None,
    ) -> None:
        if table is None:
            table = open_source(find_dataset_dir(dataset_dir), options).table(split)
        self.table = table
        table.captions_of(0)  # groups the captions here, once for all loader processes
        self.image_size = image_size
        self.augment = (
            augment if isinstance(augment, Augmentation) else Augmentation() if augment else None
        )
        if self.augment is not None:  # here, too, once for all
            self._names_sides = names_sides(table)
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.table)

    def set_epoch(self, epoch: int) -> None:
        """Let plain integer access draw for ``epoch``."""
        self.epoch = epoch

    def __getitem__(self, key: int | DrawKey) -> Sample:
        if not isinstance(key, DrawKey):
            row = range(len(self))[int(key)]  # a negative one counts from the end
            key = DrawKey(row, self.epoch, self.seed)
        # Streams of their own: the caption drawn does not depend on whether crops are drawn too.
        rng = draw_generator(self.table, key)
        caption_row = draw_caption(self.table, key.image, rng)
        size, path = key.size or self.image_size, self.table.path(key.image)
        if self.augment is None:
            pixels = resize_and_crop(load_image(path, least_side=size), size)
        else:
            image = load_image(path, least_side=self.augment.least_side(size))
            may_flip = not self._names_sides[key.image]
            pixels = self.augment.apply(image, size, rng, flip_allowed=may_flip)
        caption = self.table.caption(caption_row)
        return Sample(torch.from_numpy(pixels), key.image, caption_row, caption)


def names_sides(table: CaptionTable) -> np.ndarray:
    """``(N,)`` bool: a caption of the image says left or right, so a flip would make it lie."""
    texts = table.captions["caption"]
    # Arrow's expressions know no words of other scripts, and Python's are slow: the one leaves few
    # to the other. To both of Python's cases of `i` belong those of Turkish.
    few = pc.indices_nonzero(pc.match_substring_regex(texts, "left|r[iıİ]ght", ignore_case=True))
    told = zip(few.to_pylist(), texts.take(few).to_pylist(), strict=True)
    rows = np.array([row for row, text in told if SIDES.search(text)], dtype=np.int64)
    return np.bincount(table.image_of_caption[rows], minlength=len(table)) > 0


def draw_caption(table: CaptionTable, image: int, rng: np.random.Generator) -> int:
    """A random caption row of an image row: the first draw of the image's generator."""
    rows = table.captions_of(image)
    return int(rows[rng.integers(len(rows))])


def draw_generator(table: CaptionTable, key: DrawKey) -> np.random.Generator:
    """The generator of all draws for one image in one epoch."""
    return np.random.default_rng([key.seed, key.epoch, int(table.image_ids[key.image])])


class SkippingDataset(Dataset["Sample | UnreadableImageError"]):
    """The same dataset, with a broken file given as its error so that a batch can go on."""

    def __init__(self, dataset: COCOClipDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | DrawKey) -> Sample | UnreadableImageError:
        try:
            return self.dataset[key]
        except UnreadableImageError as error:
            return error

    def __getitems__(self, keys: Sequence[DrawKey]) -> list[Sample | UnreadableImageError]:
        """A batch, by as many threads as torch has: all cores in the process that trains, one in a
        loader's. Decoding and resizing leave Python to the others meanwhile."""
        threads = min(torch.get_num_threads(), len(keys))
        if threads < 2:
            return [self[key] for key in keys]
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            return list(pool.map(self.__getitem__, keys))


class EpochBatches(Sampler[list[DrawKey]]):
    """Batches of keys for one epoch, from a position on.

    The order is a permutation decided by ``seed`` and ``epoch`` alone, so a run that stopped at
    step ``start`` continues with exactly the batches that it has not seen.

    Args:
        images: N.
        batch_size: images a batch.
        seed: of the order and the draws.
        shuffle: where false, rows in order and every batch kept.
        here: of several processes, each gets its part of every shuffled batch; of batches in order
            every ``count``-th one whole.

    A shuffled epoch drops its last batch where that is not full (each epoch drops other images):
    a small batch would have far fewer negatives. Fewer images than one batch make one small batch.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        here: Processes | None = None,
    ) -> None:
        self.here = here or Processes()
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.start = 0
        self.size = 0

    def begin(self, epoch: int, start: int = 0, size: int = 0) -> None:
        """Go to batch ``start`` of ``epoch``, its crops ``size`` wide (0: as the dataset has)."""
        self.epoch, self.start, self.size = epoch, start, size

    @property
    def steps(self) -> int:
        """Batches of a whole epoch; of those in order, this process's."""
        if self.shuffle:
            return max(1, self.images // self.batch_size)
        return len(range(self.here.rank, -(-self.images // self.batch_size), self.here.count))

    def __len__(self) -> int:
        return self.steps - self.start

    def order(self) -> Rows:
        """``(N,)`` image rows in this epoch's order."""
        rows = np.arange(self.images, dtype=np.int64)
        return (
            np.random.default_rng([self.seed, self.epoch]).permutation(rows)
            if self.shuffle
            else rows
        )

    def __iter__(self) -> Iterator[list[DrawKey]]:
        order = self.order()
        for step in range(self.start, self.steps):
            place = step if self.shuffle else self.here.rank + step * self.here.count
            rows = order[place * self.batch_size : (place + 1) * self.batch_size]
            if self.shuffle:
                rows = rows[self.here.share(len(rows))]
            yield [DrawKey(int(row), self.epoch, self.seed, self.size) for row in rows]
