"""Every draw is a function of seed, epoch and image id, whatever the workers."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from captune.data import dataset as dataset_module
from captune.data.dataset import (
    COCOClipDataset,
    DrawKey,
    EpochBatches,
    Sample,
    SkippingDataset,
    names_sides,
)
from captune.data.pixels import UnreadableImageError, load_image
from captune.data.table import CaptionTable


def test_an_item_is_an_image_with_one_of_its_captions(coco: Path) -> None:
    dataset = COCOClipDataset(split="train", dataset_dir=coco, image_size=32)
    sample = dataset[3]
    assert sample.pixels.shape == (3, 32, 32) and sample.pixels.dtype == torch.uint8
    assert sample.caption_row in dataset.table.captions_of(3).tolist()
    assert sample.caption == dataset.table.caption(sample.caption_row)
    assert len(dataset) == 24


def test_all_captions_are_drawn_over_epochs_evenly(coco: Path) -> None:
    dataset = COCOClipDataset(split="train", dataset_dir=coco, image_size=8)
    drawn = [dataset[DrawKey(5, epoch, 0)].caption_row for epoch in range(200)]
    rows, counts = np.unique(drawn, return_counts=True)
    assert rows.tolist() == dataset.table.captions_of(5).tolist()
    assert counts.min() > 20  # 40 expected of each


def draws(loader: DataLoader[Sample]) -> dict[int, tuple[int, bytes]]:
    seen = {}
    for samples in loader:
        for sample in samples:
            seen[sample.image] = (sample.caption_row, sample.pixels.numpy().tobytes())
    return seen


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_draw(coco: Path, workers: int) -> None:
    dataset = COCOClipDataset(split="train", dataset_dir=coco, image_size=16, augment=True)
    batches = EpochBatches(len(dataset), 7, seed=3, shuffle=False)
    batches.begin(epoch=4)
    alone = draws(DataLoader(dataset, batch_sampler=batches, collate_fn=list))
    shared = DataLoader(dataset, batch_sampler=batches, collate_fn=list, num_workers=workers)
    assert draws(shared) == alone


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_of_this_process_change_no_draw_and_skip_what_is_broken(
    coco: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = COCOClipDataset(split="train", dataset_dir=coco, image_size=16, augment=True)
    dataset.table.path(6).write_bytes(b"broken")
    keys = [DrawKey(row, 4, 3) for row in range(len(dataset))]
    skipping = SkippingDataset(dataset)
    one_by_one = [skipping[key] for key in keys]
    seen: set[str] = set()

    def load(path: Path, **options: Any) -> Image.Image:
        seen.add(threading.current_thread().name)
        time.sleep(0.01)
        return load_image(path, **options)

    monkeypatch.setattr(dataset_module, "load_image", load)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    batches = DataLoader(skipping, batch_sampler=[keys[:10], keys[10:]], collate_fn=list)
    found = [item for batch in batches for item in batch]
    for item, expected in zip(found, one_by_one, strict=True):
        if isinstance(expected, UnreadableImageError):
            assert str(item) == str(expected)
        else:
            assert torch.equal(item.pixels, expected.pixels) and item[1:] == expected[1:]
    assert sum(isinstance(item, UnreadableImageError) for item in found) == 1
    assert len(seen) == threads


def test_captions_are_grouped_before_loader_processes_start(coco: Path) -> None:
    dataset = COCOClipDataset(split="train", dataset_dir=coco, image_size=16)
    assert "_grouped" in vars(dataset.table)  # else each process would do it, and hold its own


def test_draws_belong_to_the_image_not_to_its_row(coco: Path) -> None:
    whole = COCOClipDataset(split="train", dataset_dir=coco, image_size=16, augment=True)
    part = COCOClipDataset(table=whole.table.take_images([9, 2]), image_size=16, augment=True)
    for row, original in enumerate([9, 2]):
        a, b = part[DrawKey(row, 6, 1)], whole[DrawKey(original, 6, 1)]
        assert a.caption == b.caption and torch.equal(a.pixels, b.pixels)


def test_seed_and_epoch_change_the_draws(coco: Path) -> None:
    dataset = COCOClipDataset(split="train", dataset_dir=coco, image_size=16, augment=True)
    pixels = {dataset[DrawKey(0, e, s)].pixels.numpy().tobytes() for e in (0, 1) for s in (0, 1)}
    assert len(pixels) == 4


def test_set_epoch_serves_plain_access(coco: Path) -> None:
    dataset = COCOClipDataset(split="train", dataset_dir=coco, image_size=16, seed=5)
    dataset.set_epoch(8)
    assert dataset[1].caption_row == dataset[DrawKey(1, 8, 5)].caption_row
    assert dataset[-1].image == 23
    with pytest.raises(IndexError):
        dataset[24]


def test_without_augmentation_only_the_caption_is_drawn(coco: Path) -> None:
    dataset = COCOClipDataset(split="train", dataset_dir=coco, image_size=16)
    assert torch.equal(dataset[DrawKey(0, 0, 0)].pixels, dataset[DrawKey(0, 1, 7)].pixels)


def test_an_image_whose_captions_name_a_side_is_never_flipped(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (0, 0, 16, 32))  # dark on the left
    image.save(tmp_path / "a.png")
    images = [(1, "a.png", tmp_path / "a.png"), (2, "b.png", tmp_path / "a.png")]
    captions = [(1, "dark on the Left", 0), (2, "half is dark", 0), (3, "half is dark", 1)]
    table = CaptionTable.build(images, captions, name="sides", split="train")
    dataset = COCOClipDataset(table=table, image_size=32, augment=True)

    def flips(row: int) -> int:
        keys = [DrawKey(row, epoch, 0) for epoch in range(60)]
        crops = [dataset[key].pixels.float() for key in keys]
        return sum(bool(crop[..., 0].mean() > crop[..., -1].mean()) for crop in crops)

    assert flips(0) == 0
    assert 15 < flips(1) < 45


def test_a_broken_file_is_an_error_or_skipped_never_zeros(coco: Path) -> None:
    dataset = COCOClipDataset(split="train", dataset_dir=coco, image_size=16)
    dataset.table.path(2).write_bytes(b"broken")
    with pytest.raises(UnreadableImageError):
        dataset[2]
    assert isinstance(SkippingDataset(dataset)[2], UnreadableImageError)


@pytest.mark.parametrize("start", [0, 1, 3])
def test_an_epoch_continues_with_what_it_has_not_seen(start: int) -> None:
    whole = EpochBatches(50, 12, seed=9, shuffle=True)
    whole.begin(epoch=2)
    rest = EpochBatches(50, 12, seed=9, shuffle=True)
    rest.begin(epoch=2, start=start)
    assert list(rest) == list(whole)[start:]
    assert len(rest) == 4 - start


def test_epochs_have_orders_of_their_own_and_see_no_image_twice() -> None:
    batches = EpochBatches(50, 12, seed=9, shuffle=True)
    orders = []
    for epoch in (0, 1):
        batches.begin(epoch)
        orders.append([key.image for batch in batches for key in batch])
    assert orders[0] != orders[1]
    assert all(len(set(order)) == len(order) == 48 for order in orders)


def test_in_order_nothing_is_dropped() -> None:
    batches = EpochBatches(50, 12, seed=0, shuffle=False)
    assert [key.image for batch in batches for key in batch] == list(range(50))


def test_fewer_images_than_a_batch_make_one_batch() -> None:
    batches = EpochBatches(5, 12, seed=0, shuffle=True)
    assert [len(batch) for batch in batches] == [5]


def test_sides_are_found_as_by_one_caption_after_the_other() -> None:
    """Whole words only, in any case, of any script's letters."""
    words = ["left", "LEFT,", "on-right", "lefty", "bright", "rıght", "RİGHT", "éleft", "up"]
    words += ["leftmost", "Rightwards", "righthanded"]
    forms = ("{}", "a {}", "{} b", "a {} b")
    captions = [form.format(word) for word in words for form in forms]
    table = CaptionTable.build(
        [(number, f"{number}.jpg", Path("x")) for number in range(16)],
        [(number, caption, number // 3) for number, caption in enumerate(captions)],
        name="sides",
        split="train",
    )
    slow = np.zeros(16, dtype=bool)
    side = r"\b(left|right|leftmost|rightwards|righthanded)\b"
    for number, caption in enumerate(captions):
        slow[number // 3] |= bool(re.search(side, caption, re.IGNORECASE))
    assert np.array_equal(names_sides(table), slow)
    assert 0 < slow.sum() < 16
    assert not names_sides(table.take_images(np.flatnonzero(~slow))).any()
