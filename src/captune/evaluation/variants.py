"""Variants of a configuration, each run with the same seeds, and how they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from captune.evaluation.intervals import (
    METRICS,
    Interval,
    QueryHits,
    mean_over_seeds,
    paired_bootstrap,
)


@dataclass(frozen=True)
class SeedRun:
    """One run of a variant: its metrics object, its history and its hits, image by image."""

    folder: Path
    seed: int
    metrics: dict[str, Any]
    history: Sequence[dict[str, Any]]
    hits: QueryHits

    @property
    def values(self) -> list[float]:
        """The six recalls and rsum."""
        recalls = [float(self.metrics[direction][key]) for direction, key in METRICS]
        return [*recalls, float(self.metrics["rsum"])]


@dataclass(frozen=True)
class Variant:
    """A combination of values, and its run for each seed."""

    name: str
    values: Mapping[str, Any]
    runs: tuple[SeedRun, ...]

    @cached_property
    def means(self) -> list[Interval]:
        """The six recalls and rsum, over seeds."""
        columns = zip(*(run.values for run in self.runs), strict=True)
        return [mean_over_seeds(column) for column in columns]


@dataclass(frozen=True)
class Difference:
    """A variant less the base: over images (paired bootstrap) and over seeds (paired Student's t).

    ``images`` holds seven intervals: the six recalls and rsum. ``seeds`` is of rsum.
    """

    images: list[Interval]
    seeds: Interval

    @classmethod
    def between(cls, variant: Variant, base: Variant) -> Difference:
        """Of two variants with the same seeds, measured on the same images."""
        pairs = list(zip(variant.runs, base.runs, strict=True))
        images = paired_bootstrap([ours.hits for ours, _ in pairs], [its.hits for _, its in pairs])
        by_seed = [ours.values[-1] - its.values[-1] for ours, its in pairs]
        return cls(images, mean_over_seeds(by_seed))

    @property
    def verdict(self) -> str:
        """In plain words, what can be said of rsum."""
        rsum = self.images[-1]
        if not rsum.excludes_zero:
            return "within noise"
        side = "better" if rsum.value > 0 else "worse"
        if self.seeds.low != self.seeds.low:
            return f"{side} on these images; one seed only, so chance of training is not ruled out"
        if not self.seeds.excludes_zero:
            return "within noise: the seeds disagree by as much"
        return side
