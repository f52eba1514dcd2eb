"""How sure a recall, or a difference between two, is: over images and over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit
from torch import Tensor

from captune.metrics import RECALL_AT

CONFIDENCE = 0.95
RESAMPLES = 2000
_CHUNK = 64  # resamples drawn at once: (64, N) counts stay small at COCO's size

Floats = npt.NDArray[np.float64]

METRICS = (
    *(("image_to_text", f"R@{k}") for k in RECALL_AT),
    *(("text_to_image", f"R@{k}") for k in RECALL_AT),
)
"""The six recalls, in the order of :class:`QueryHits`' columns."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class QueryHits:
    """What each image contributes to the six recalls, so that images can be resampled.

    An image is drawn together with its captions: captions of one image succeed and fail together,
    and an interval over captions drawn one by one would be too narrow.

    Attributes:
        hits: ``(N, 6)``: 1 where the image found one of its captions among the first 1, 5, 10; then
            how many of its captions found the image among the first 1, 5, 10.
        captions: ``(N,)``: captions of each image.
    """

    hits: Floats
    captions: Floats

    @classmethod
    def from_ranks(cls, image_rank: Tensor, caption_rank: Tensor, owner: Tensor) -> QueryHits:
        """From ranks ``(N,)`` and ``(M,)``, the best being 1, and each caption's image ``(M,)``."""
        images = len(image_rank)
        owners = owner.numpy()
        columns = [(image_rank <= k).double().numpy() for k in RECALL_AT]
        for k in RECALL_AT:
            found = (caption_rank <= k).double().numpy()
            columns.append(np.bincount(owners, weights=found, minlength=images))
        counts = np.bincount(owners, minlength=images).astype(np.float64)
        return cls(np.stack(columns, axis=1), counts)

    def recalls(self, weights: Floats | None = None) -> Floats:
        """The six recalls in percent, ``(6,)``, or ``(R, 6)`` for image weights ``(R, N)``."""
        drawn = np.ones(len(self.captions)) if weights is None else weights
        images = drawn.sum(axis=-1, keepdims=True)
        captions = (drawn @ self.captions)[..., None]
        half = len(RECALL_AT)
        totals = np.concatenate([np.repeat(images, half, -1), np.repeat(captions, half, -1)], -1)
        return np.asarray(100 * (drawn @ self.hits) / totals)


def mean_over_seeds(values: Sequence[float]) -> Interval:
    """The mean of one value a seed, with Student's t interval; one value alone has no interval.

    Returns:
        ``low`` and ``high`` are NaN where there is a single value.
    """
    found = np.asarray(values, dtype=np.float64)
    mean = float(found.mean())
    if len(found) < 2:
        return Interval(mean, float("nan"), float("nan"))
    spread = float(found.std(ddof=1)) / np.sqrt(len(found))
    half = float(stdtrit(len(found) - 1, 0.5 + CONFIDENCE / 2)) * spread
    return Interval(mean, mean - half, mean + half)


def bootstrap(hits: QueryHits, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Interval]:
    """The six recalls and rsum, in percent, images resampled with replacement.

    Percentile bootstrap (Efron and Tibshirani 1993, chapter 13). The gallery stays whole: a
    resample asks which queries might have been drawn, not which pictures might have been searched.

    Returns:
        Seven intervals: :data:`METRICS` and rsum.
    """
    images = len(hits.captions)
    rng = np.random.default_rng(seed)
    drawn: list[Floats] = []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        weights = rng.multinomial(images, np.full(images, 1 / images), size=size)
        drawn.append(hits.recalls(weights.astype(np.float64)))
    values, resampled = hits.recalls(), np.concatenate(drawn)
    values = np.append(values, values.sum())
    resampled = np.concatenate([resampled, resampled.sum(axis=1, keepdims=True)], axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail], axis=0)
    return [Interval(*map(float, row)) for row in zip(values, low, high, strict=True)]


def paired_bootstrap(
    ours: Sequence[QueryHits],
    theirs: Sequence[QueryHits],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """The difference ``ours - theirs`` of the six recalls and rsum, images resampled in pairs.

    As :func:`bootstrap`, each resample drawing the same images for both sides. With several seeds
    on each side the seeds' hits are averaged first, so this interval is about the images; the
    seeds' own spread is :func:`mean_over_seeds`'s matter.

    Args:
        ours, theirs: one :class:`QueryHits` a seed, all of the same N images in the same order.

    Returns:
        Seven intervals, in percent points: :data:`METRICS` and rsum.

    Raises:
        ValueError: the sides are of different images.
    """
    counts = ours[0].captions
    for side in (*ours, *theirs):
        if not np.array_equal(side.captions, counts):
            raise ValueError("a paired comparison needs the same images and captions on both sides")
    mean = np.mean([h.hits for h in ours], axis=0) - np.mean([h.hits for h in theirs], axis=0)
    return bootstrap(QueryHits(mean, counts), resamples=resamples, seed=seed)
