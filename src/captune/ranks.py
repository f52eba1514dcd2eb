"""Ranks in both directions, counted in one streamed product: the full matrix never exists.

A rank is one plus the number of rivals that score at least as much: ties count against the query.
Counting needs each query's own score beforehand, and from the very product that it is compared
with: computed apart it would differ in the last bit, and an equal rival might not count. So the
matrix is cut into tiles, all of one shape; those that hold own pairs are computed twice, first for
the own scores, which is a few percent of the work.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from captune.device import free_memory
from captune.processes import ALONE, Processes

# A tile of fp32 scores, 5 MB, stays in the cache while it is counted, and tall tiles make the
# product faster than wide ones; a GPU wants larger products.
TILE, TILE_ON_GPU = (1024, 1280), (4096, 20480)
BAND = 256  # rows of a tile that are counted at once on a CPU: more would leave its nearest cache

_Place = tuple[int, int]  # the first image and the first caption of a tile


class Ranks(NamedTuple):
    """``image (N,)`` and ``caption (M,)`` int64, the best being 1, on the CPU.

    Image→text: the rank of an image is that of its best-placed caption. Text→image: the rank of a
    caption is that of its image. ``of_own (M,)`` is the place of each caption among all captions
    for its own image, those of the same image that score more (or as much, and stand before it)
    included; None where it was not asked for.
    """

    image: Tensor
    caption: Tensor
    of_own: Tensor | None = None


def retrieval_ranks(
    image: Tensor,
    text: Tensor,
    image_of_caption: Tensor,
    *,
    every_caption: bool = False,
    tile: tuple[int, int] | None = None,
    device: torch.device | None = None,
    here: Processes = ALONE,
) -> Ranks:
    """Ranks of all images and captions by dot product.

    Args:
        image: ``(N, D)`` fp32.
        text: ``(M, D)`` fp32, on the same device.
        image_of_caption: ``(M,)`` int64, the image of each caption, in any order.
        every_caption: also rank every caption for its own image, at the price of one more count
            for each caption that an image has.
        tile: images and captions of a product; default by device.
        device: a CUDA card computes if it has the memory, else the CPU; default: where they lie.
        here: processes that all call this with the same embeddings: each counts some of the
            images, and all have the result.

    Raises:
        ValueError: an embedding is not finite, shapes do not fit, or an image has no caption.
    """
    owner = _checked(image, text, image_of_caption)
    if device is not None:
        place = _with_room(device, image, text, here)
        image, text = image.to(place), text.to(place)
    order = owner.argsort(stable=True)
    if torch.equal(order, torch.arange(len(order))):
        return _Count(image, text, owner, tile, here).ranks(every_caption)
    sorted_text = text[order.to(text.device)]
    found = _Count(image, sorted_text, owner[order], tile, here).ranks(every_caption)
    back = order.argsort()
    of_own = None if found.of_own is None else found.of_own[back]
    return Ranks(found.image, found.caption[back], of_own)


def _checked(image: Tensor, text: Tensor, image_of_caption: Tensor) -> Tensor:
    """The owners on the CPU."""
    owner = image_of_caption.cpu().long()
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(
            f"embeddings must be (N, D) and (M, D), found {tuple(image.shape)} and "
            f"{tuple(text.shape)}"
        )
    if len(owner) != len(text):
        raise ValueError(f"{len(text)} captions and {len(owner)} owners")
    if len(owner) and not 0 <= int(owner.min()) <= int(owner.max()) < len(image):
        raise ValueError(f"owners must be rows of the {len(image)} images")
    if bool((torch.bincount(owner, minlength=len(image)) == 0).any()):
        raise ValueError("every image needs at least one caption to be ranked")
    for what, found in (("image", image), ("text", text)):
        # The two ends tell it of all values, and make no mask as large as the embeddings.
        if found.numel() and not bool(torch.stack(found.aminmax()).isfinite().all()):
            raise ValueError(f"the {what} embeddings hold NaN or infinite values")
    return owner


def _with_room(device: torch.device, image: Tensor, text: Tensor, here: Processes) -> torch.device:
    """A CUDA card with room for the embeddings, captions sorted, and tiles; else the CPU. In all
    processes the same: their tiles must be."""
    height, width = TILE_ON_GPU
    numbers = image.numel() + 2 * text.numel() + 3 * height * width
    roomy = device.type == "cuda" and free_memory(device) > 4 * numbers
    return torch.device("cpu") if here.any(not roomy) else device


class _Count:
    """Counts rivals tile by tile; captions are sorted by their images.

    All tiles have the same shape (the last ones are filled up with zeros), so that equal pairs
    have equal scores wherever they lie: a product of another shape may sum in another order.
    """

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        owner: Tensor,
        tile: tuple[int, int] | None,
        here: Processes,
    ) -> None:
        self.image, self.text = image.detach().float(), text.detach().float()
        self.owner, self.here = owner, here
        height, width = tile or (TILE_ON_GPU if image.is_cuda else TILE)
        if here.count > 1:  # as many rows of tiles for each
            rows = _multiple(math.ceil(len(image) / height), here.count)
            height = math.ceil(len(image) / rows)
        self.height = min(height, _multiple(len(image), 16))
        self.width = min(width, _multiple(len(text), 16))

    def ranks(self, every_caption: bool) -> Ranks:
        with _threads_of(self.image.device) as threads:
            own = self._own_scores(threads)  # (M,)
            thresholds, places = self._thresholds(own, 0 if every_caption else 1)  # (N, K), (M,)
            made: list[_Rivals] = []

            def counting() -> Callable[[_Place], None]:
                made.append(_Rivals(self, own, thresholds))
                return made[-1].add

            _share(self._tiles(), counting, threads)
        of_captions = self.here.added(torch.stack([part.of_captions for part in made]).sum(0).cpu())
        rivals = self.here.added(torch.stack([part.of_images for part in made]).sum(0).cpu())
        of_own = None
        if every_caption:
            places = places.cpu()
            of_own = 1 + places + rivals[self.owner, places]
        return Ranks(1 + rivals[:, 0], 1 + of_captions, of_own)

    def _tiles(self) -> Iterator[_Place]:
        """The first image and caption of each; row by row, for images are used again at once. Of
        several processes each has some of the rows."""
        tops = range(0, len(self.image), self.height)
        tops = tops[self.here.share(len(tops))]
        bar = tqdm(tops, desc="ranking", unit="tile row", leave=False, delay=3)
        return ((top, left) for top in bar for left in range(0, len(self.text), self.width))

    def scores(self, place: _Place, out: Tensor) -> tuple[Tensor, slice, slice]:
        """The scores ``(r, c)`` of a tile, in ``out (height, width)``; its images and captions."""
        top, left = place
        rows = slice(top, min(top + self.height, len(self.image)))
        columns = slice(left, min(left + self.width, len(self.text)))
        image = _filled(self.image[rows], self.height)
        text = _filled(self.text[columns], self.width)
        scores = torch.mm(image, text.T, out=out)
        return scores[: rows.stop - top, : columns.stop - left], rows, columns

    def buffer(self) -> Tensor:
        """Room for the scores of a tile."""
        return torch.empty(self.height, self.width, device=self.image.device)

    def own_pairs(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor] | None:
        """Where in the tile images stand with captions of theirs."""
        owner = self.owner[columns]
        if int(owner[-1]) < rows.start or int(owner[0]) >= rows.stop:
            return None
        mine = ((owner >= rows.start) & (owner < rows.stop)).nonzero().flatten()
        device = self.image.device
        return (owner[mine] - rows.start).to(device), mine.to(device)

    def _own_scores(self, threads: int) -> Tensor:
        own = torch.empty(len(self.text), device=self.image.device)

        def reading() -> Callable[[_Place], None]:
            out = self.buffer()

            def read(place: _Place) -> None:
                scores, rows, columns = self.scores(place, out)
                pairs = self.own_pairs(rows, columns)
                assert pairs is not None
                own[columns][pairs[1]] = scores[pairs]

            return read

        _share(self._own_tiles(), reading, threads)
        return own

    def _own_tiles(self) -> Iterator[_Place]:
        """Those that hold images with captions of theirs."""
        for left in range(0, len(self.text), self.width):
            first, last = self.owner[left : left + self.width][[0, -1]].tolist()
            for top in range(first // self.height * self.height, last + 1, self.height):
                yield top, left

    def _thresholds(self, own: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Each image's own scores ``(N, K)``, best first, infinite where it has fewer; ``most`` of
        them, 0 for all. And each caption's place among its image's, ``(M,)``."""
        owner = self.owner.to(own.device)
        by_score = own.argsort(descending=True, stable=True)
        order = by_score[owner[by_score].argsort(stable=True)]  # by image, then best first
        counts = torch.bincount(owner, minlength=len(self.image))
        first = counts.cumsum(0) - counts
        places = torch.empty_like(owner)
        places[order] = torch.arange(len(owner), device=own.device) - first[owner[order]]
        kept = places < (most or len(owner))
        shape = (len(self.image), most or int(counts.max()))
        thresholds = torch.full(shape, torch.inf, device=own.device)
        thresholds[owner[kept], places[kept]] = own[kept]
        return thresholds, places


class _Rivals:
    """Rivals of captions ``(M,)`` and of images at each threshold ``(N, K)``, of some tiles.

    Counted in bands of rows, so that a tile is read once from memory, not once for each count.
    """

    def __init__(self, count: _Count, own: Tensor, thresholds: Tensor) -> None:
        self._count, self._own, self._thresholds = count, own, thresholds
        self.of_captions = torch.zeros(len(own), dtype=torch.int32, device=own.device)
        self.of_images = torch.zeros(thresholds.shape, dtype=torch.int32, device=own.device)
        self._scores = count.buffer()
        self._band = count.height if own.is_cuda else min(count.height, BAND)
        self._above = self._scores.new_empty(self._band, count.width)

    def add(self, place: _Place) -> None:
        """Count a tile."""
        scores, rows, columns = self._count.scores(place, self._scores)
        pairs = self._count.own_pairs(rows, columns)
        if pairs is not None:
            scores[pairs] = -torch.inf  # nobody is their own rival
        of_captions, own = self.of_captions[columns], self._own[columns]
        parts = (scores, self._thresholds[rows], self.of_images[rows])
        bands = (torch.split(part, self._band) for part in parts)
        for band, least, of_images in zip(*bands, strict=True):
            of_captions += self._at_least(band, own, 0)
            for k in range(least.shape[1]):
                of_images[:, k] += self._at_least(band, least[:, k, None], 1)

    def _at_least(self, scores: Tensor, least: Tensor, over: int) -> Tensor:
        """How many ``scores (r, c)`` are at least ``least``, over rows (0) or columns (1)."""
        rows, columns = scores.shape
        # Ones and zeros in fp32, for comparing into booleans takes four times as long; their sums
        # are exact up to 2**24, and no side of a tile comes near that.
        above = torch.ge(scores, least, out=self._above[:rows, :columns])
        return above.sum(over).int()


@contextlib.contextmanager
def _threads_of(device: torch.device) -> Iterator[int]:
    """How many tiles are worked on at once: on a CPU as many as torch has threads, each with one.

    A count over one tile is over too soon for several threads, who would wait for one another.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        yield 1
        return
    torch.set_num_threads(1)  # threads that are started from here on have it, too
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _share(
    places: Iterator[_Place], make: Callable[[], Callable[[_Place], None]], threads: int
) -> None:
    """Give each place to one of so many threads; each does what ``make`` has made for it."""
    turn, inference = threading.Lock(), torch.is_inference_mode_enabled()

    def take() -> _Place | None:
        with turn:
            return next(places, None)

    def work() -> None:
        with torch.inference_mode(inference), torch.no_grad():  # each thread has its own modes
            act = make()
            while (place := take()) is not None:
                act(place)

    if threads == 1:
        return work()
    with ThreadPoolExecutor(threads) as pool:
        begun = [pool.submit(work) for _ in range(threads)]
        try:
            for one in begun:
                one.result()
        finally:  # Ctrl-C: what is not begun is left
            with turn:
                places = iter(())


def _filled(rows: Tensor, length: int) -> Tensor:
    """``rows (r, D)`` with zeros below, ``(length, D)``."""
    return rows if len(rows) == length else F.pad(rows, (0, 0, 0, length - len(rows)))


def _multiple(count: int, of: int) -> int:
    """The least one that is not below ``count``."""
    return math.ceil(count / of) * of
