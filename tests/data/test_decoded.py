"""Photos decoded in order: whole, named where they are broken, and without a draw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captune.data.decoded import decode_batches
from captune.data.pixels import load_image, resize_and_crop
from captune.data.sources import open_source


@pytest.mark.parametrize("workers", [0, 2])
def test_each_photo_comes_once_in_order_and_a_broken_one_is_named(coco: Path, workers: int) -> None:
    table = open_source(coco).table("train")
    table.path(4).write_bytes(b"no picture")
    for row in (6, 7):  # all of a batch
        table.path(row).write_bytes(b"no picture")
    batches = [range(0, 3), range(3, 6), range(6, 8), range(8, 11)]
    before = torch.get_rng_state()
    found = list(decode_batches(table, 32, batches, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert [batch.rows for batch in found] == [[0, 1, 2], [3, 5], [], [8, 9, 10]]
    assert [len(batch.broken) for batch in found] == [0, 1, 2, 0]
    assert str(table.path(4)) in found[1].broken[0]
    for batch in found:
        assert batch.pixels.dtype == torch.uint8 and len(batch.pixels) == len(batch.rows)
        for row, pixels in zip(batch.rows, batch.pixels, strict=True):
            expected = torch.from_numpy(resize_and_crop(load_image(table.path(row)), 32))
            assert torch.equal(pixels, expected)
