"""Ranks in both directions, counted in one streamed product: the full matrix never exists.

A rank is one plus the number of rivals that score at least as much: ties count against the query.
Counting needs each query's own score beforehand, and from the very product that it is compared
with: computed apart it would differ in the last bit, and an equal rival might not count. So the
matrix is cut into tiles, all of one shape; those that hold own pairs are computed twice, first for
the own scores, which is a few percent of the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

# A tile of fp32 scores, 5 MB, stays in the cache while it is counted, and tall tiles make the
# product faster than wide ones; a GPU wants larger products.
TILE, TILE_ON_GPU = (1024, 1280), (4096, 20480)
BAND = 256  # rows of a tile that are counted at once on a CPU: more would leave its nearest cache


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
) -> Ranks:
    """Ranks of all images and captions by dot product.

    Args:
        image: ``(N, D)`` fp32, on the device that computes.
        text: ``(M, D)`` fp32, on the same.
        image_of_caption: ``(M,)`` int64, the image of each caption, in any order.
        every_caption: also rank every caption for its own image, at the price of one more count
            for each caption that an image has.
        tile: images and captions of a product; default by device.

    Raises:
        ValueError: an embedding is not finite, shapes do not fit, or an image has no caption.
    """
    owner = _checked(image, text, image_of_caption)
    order = owner.argsort(stable=True)
    if torch.equal(order, torch.arange(len(order))):
        return _Count(image, text, owner, tile).ranks(every_caption)
    found = _Count(image, text[order.to(text.device)], owner[order], tile).ranks(every_caption)
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


class _Count:
    """Counts rivals tile by tile; captions are sorted by their images.

    All tiles have the same shape (the last ones are filled up with zeros), so that equal pairs
    have equal scores wherever they lie: a product of another shape may sum in another order.
    """

    def __init__(
        self, image: Tensor, text: Tensor, owner: Tensor, tile: tuple[int, int] | None
    ) -> None:
        self.image, self.text, self.owner = image.float(), text.float(), owner
        height, width = tile or (TILE_ON_GPU if image.is_cuda else TILE)
        self.height = min(height, _multiple_of_16(len(image)))
        self.width = min(width, _multiple_of_16(len(text)))
        self.scores = torch.empty(self.height, self.width, device=image.device)
        self.band = self.height if image.is_cuda else min(self.height, BAND)
        self.above = torch.empty(self.band, self.width, device=image.device)

    def ranks(self, every_caption: bool) -> Ranks:
        images, captions = len(self.image), len(self.text)
        device = self.image.device
        own = self._own_scores()  # (M,)
        thresholds, places = self._thresholds(own, 0 if every_caption else 1)  # (N, K), (M,)
        rivals = torch.zeros(thresholds.shape, dtype=torch.int64, device=device)
        caption_rank = torch.ones(captions, dtype=torch.int64, device=device)
        bar = tqdm(total=images, desc="ranking", unit="image", leave=False, delay=3)
        with bar:
            for top in range(0, images, self.height):
                rows = slice(top, min(top + self.height, images))
                for left in range(0, captions, self.width):
                    columns = slice(left, min(left + self.width, captions))
                    scores = self._tile(top, left)[: rows.stop - top, : columns.stop - left]
                    pairs = self._own_pairs(rows, columns)
                    if pairs is not None:
                        scores[pairs] = -torch.inf  # nobody is their own rival
                    counted = caption_rank[columns], rivals[rows]
                    self._tally(scores, own[columns], thresholds[rows], *counted)
                bar.update(rows.stop - top)
        image_rank = 1 + rivals[:, 0]
        of_own = None
        if every_caption:
            of_own = (1 + places + rivals[self.owner.to(device), places]).cpu()
        return Ranks(image_rank.cpu(), caption_rank.cpu(), of_own)

    def _tally(
        self,
        scores: Tensor,
        own: Tensor,
        thresholds: Tensor,
        of_captions: Tensor,
        of_images: Tensor,
    ) -> None:
        """Add a tile's rivals to those counted of its captions ``(c,)`` and its images ``(r, K)``,
        a band of rows at a time: the tile is then read once, and not once for each count."""
        bands = (torch.split(part, self.band) for part in (scores, thresholds, of_images))
        for band, least, found in zip(*bands, strict=True):
            of_captions += self._count(band, own, 0)
            for place in range(least.shape[1]):
                found[:, place] += self._count(band, least[:, place, None], 1)

    def _count(self, scores: Tensor, least: Tensor, over: int) -> Tensor:
        """How many ``scores (r, c)`` are at least ``least``, over rows (0) or columns (1)."""
        rows, columns = scores.shape
        # Ones and zeros in fp32, for comparing into booleans takes four times as long; their sums
        # are exact up to 2**24, and no side of a tile comes near that.
        above = torch.ge(scores, least, out=self.above[:rows, :columns])
        return above.sum(over).long()

    def _tile(self, top: int, left: int) -> Tensor:
        """Scores of the tile whose first image and caption these are, ``(height, width)``."""
        image = _filled(self.image[top : top + self.height], self.height)
        text = _filled(self.text[left : left + self.width], self.width)
        return torch.mm(image, text.T, out=self.scores)

    def _own_pairs(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor] | None:
        """Where in the tile images stand with captions of theirs."""
        owner = self.owner[columns]
        if int(owner[-1]) < rows.start or int(owner[0]) >= rows.stop:
            return None
        mine = ((owner >= rows.start) & (owner < rows.stop)).nonzero().flatten()
        device = self.image.device
        return (owner[mine] - rows.start).to(device), mine.to(device)

    def _own_scores(self) -> Tensor:
        own = torch.empty(len(self.text), device=self.image.device)
        for left in range(0, len(self.text), self.width):
            columns = slice(left, min(left + self.width, len(self.text)))
            for top in self._tops(columns):
                scores = self._tile(top, left)
                rows = slice(top, min(top + self.height, len(self.image)))
                pairs = self._own_pairs(rows, columns)
                assert pairs is not None
                own[columns][pairs[1]] = scores[pairs]
        return own

    def _tops(self, columns: slice) -> Iterator[int]:
        """The first rows of the tiles that hold the columns' own images."""
        first, last = int(self.owner[columns.start]), int(self.owner[columns.stop - 1])
        return iter(range(first // self.height * self.height, last + 1, self.height))

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


def _filled(rows: Tensor, length: int) -> Tensor:
    """``rows (r, D)`` with zeros below, ``(length, D)``."""
    return rows if len(rows) == length else F.pad(rows, (0, 0, 0, length - len(rows)))


def _multiple_of_16(count: int) -> int:
    return -(-count // 16) * 16
