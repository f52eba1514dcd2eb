"""Who reads what: every sample once and equal steps for all, against a slow way to cut."""

from __future__ import annotations

import numpy as np
import pytest

from captune.data.stream_order import Reader, StreamOrder, shuffled
from captune.errors import CaptuneError

UNEVEN = [7, 1, 12, 3, 0, 9, 1, 5]


def read_by(order: StreamOrder, epoch: int, reader: Reader) -> list[tuple[int, int]]:
    return [
        (run.shard, row) for run in order.runs(epoch, reader) for row in range(run.low, run.high)
    ]


def slow(order: StreamOrder, epoch: int) -> list[tuple[int, int]]:
    """All samples in the epoch's order, without those that are left out."""
    shards = np.random.default_rng([order.seed, epoch]).permutation(len(order.counts))
    listed = [(int(shard), row) for shard in shards for row in range(order.counts[shard])]
    return listed[: len(listed) - order.left_out]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_all_readers_together_read_each_sample_once(
    world_size: int, lanes: int, batch_size: int
) -> None:
    order = StreamOrder(np.array(UNEVEN), batch_size, seed=3, world_size=world_size)
    assert 0 <= order.left_out < world_size * order.batch_size
    for epoch in (0, 1):
        by_process = []
        for rank in range(world_size):
            readers = [Reader(rank, world_size, lane, lanes) for lane in range(lanes)]
            found = [read_by(order, epoch, reader) for reader in readers]
            assert [len(rows) for rows in found] == [
                order.batch_size * len(range(lane, order.steps, lanes)) for lane in range(lanes)
            ]
            by_process.append([row for rows in found for row in rows])
        assert {len(rows) for rows in by_process} == {order.steps * order.batch_size}
        assert [row for rows in by_process for row in rows] == slow(order, epoch)


def test_epochs_and_seeds_have_orders_of_their_own_and_leave_out_others() -> None:
    order = StreamOrder(np.array(UNEVEN), 5, seed=0)
    assert order.left_out == 3
    epochs = [read_by(order, epoch, Reader()) for epoch in range(8)]
    assert epochs[0] == read_by(order, 0, Reader())
    assert len({tuple(rows) for rows in epochs}) == 8
    assert {row for rows in epochs for row in rows} == {
        (shard, row) for shard, count in enumerate(UNEVEN) for row in range(count)
    }
    other = StreamOrder(np.array(UNEVEN), 5, seed=1)
    assert read_by(other, 0, Reader()) != epochs[0]


def test_fewer_samples_than_a_batch_make_one_small_one() -> None:
    order = StreamOrder(np.array([3, 4]), 128, seed=0, world_size=2)
    assert (order.steps, order.batch_size, order.left_out) == (1, 3, 1)
    with pytest.raises(CaptuneError, match="7 samples are too few for 8 processes"):
        StreamOrder(np.array([3, 4]), 128, seed=0, world_size=8)


@pytest.mark.parametrize("size", [1, 4, 50, 1000])
def test_a_buffer_shuffles_within_its_bounds(size: int) -> None:
    held = most = 0

    def items() -> object:
        nonlocal held, most
        for item in range(200):
            held += 1
            most = max(most, held)
            yield item

    found = []
    for item in shuffled(items(), size, np.random.default_rng(0)):  # type: ignore[arg-type]
        found.append(item)
        held -= 1
    assert sorted(found) == list(range(200))
    assert most <= size + 1
    # Nothing can come out before it went in.
    assert all(item <= place + size for place, item in enumerate(found))
    assert (found == sorted(found)) == (size == 1)


def test_the_order_of_a_buffer_does_not_depend_on_what_is_in_it() -> None:
    numbers = list(shuffled(range(60), 7, np.random.default_rng(5)))
    words = list(shuffled([f"<{n}>" for n in range(60)], 7, np.random.default_rng(5)))
    assert words == [f"<{n}>" for n in numbers]
