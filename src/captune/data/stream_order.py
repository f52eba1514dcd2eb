"""Who reads which samples of the shards in an epoch, and in what order.

Shards are put in an order that seed and epoch decide, and the samples, counted through all of them,
are cut into runs of equal length: one for each process, and in it one for each loader worker. A
shard that a cut passes through is opened by both neighbours. So no sample is read twice, none but
the last few of the order is left out, and all processes make the same number of steps, however
uneven the shards are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from captune.data.table import Rows
from captune.errors import CaptuneError

Item = TypeVar("Item")


class Run(NamedTuple):
    """Samples ``low`` to ``high`` (not itself) of a shard."""

    shard: int
    low: int
    high: int


@dataclass(frozen=True)
class Reader:
    """One of ``lanes`` loader workers of one of ``world_size`` processes."""

    rank: int = 0
    world_size: int = 1
    lane: int = 0
    lanes: int = 1


class StreamOrder:
    """The order of an epoch over S shards.

    Args:
        counts: ``(S,)`` samples of each shard.
        batch_size: samples of a process in a step.
        seed: of the order.
        world_size: processes.

    Raises:
        CaptuneError: fewer samples than processes.
    """

    def __init__(self, counts: Rows, batch_size: int, *, seed: int, world_size: int = 1) -> None:
        self.counts = counts
        self.seed = seed
        self.samples = int(counts.sum())
        each = self.samples // world_size
        if each == 0:
            raise CaptuneError(f"{self.samples} samples are too few for {world_size} processes")
        self.batch_size = min(batch_size, each)  # fewer than a batch make one small batch
        self.steps = each // self.batch_size
        self.left_out = self.samples - world_size * self.steps * self.batch_size

    def runs(self, epoch: int, reader: Reader) -> list[Run]:
        """What ``reader`` reads in ``epoch``, in order; it makes the steps ``lane``,
        ``lane + lanes``, … of its process."""
        before = sum(len(self._steps_of(lane, reader.lanes)) for lane in range(reader.lane))
        mine = len(self._steps_of(reader.lane, reader.lanes))
        low = (reader.rank * self.steps + before) * self.batch_size
        return self._between(epoch, low, low + mine * self.batch_size)

    def _steps_of(self, lane: int, lanes: int) -> range:
        return range(lane, self.steps, lanes)

    def _between(self, epoch: int, low: int, high: int) -> list[Run]:
        """Places ``low`` to ``high`` of the epoch's order."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
        ends = np.cumsum(self.counts[order])
        runs = []
        first = int(np.searchsorted(ends, low, side="right"))
        for place in range(first, len(order)):
            start = int(ends[place]) - int(self.counts[order[place]])
            if start >= high:
                break
            part = Run(int(order[place]), max(low - start, 0), min(high, int(ends[place])) - start)
            if part.high > part.low:
                runs.append(part)
        return runs


def shuffled(items: Iterable[Item], size: int, rng: np.random.Generator) -> Iterator[Item]:
    """``items`` in another order, of which never more than ``size`` are held.

    Which one comes next is a matter of ``rng`` and of how many there are, never of the items.
    """
    held: list[Item] = []
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        place = int(rng.integers(size))
        yield held[place]
        held[place] = item
    for place in rng.permutation(len(held)):
        yield held[place]
