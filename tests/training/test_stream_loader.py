"""Batches of a stream: each sample once an epoch whoever reads it, resumed exactly, lost never."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from captune.config import DEFAULT_CONFIG, Config
from captune.data import stream_shards
from captune.data.pixels import resize_and_crop
from captune.data.stream_table import StreamTable
from captune.errors import CaptuneError
from captune.processes import Processes
from captune.training import stream_loader
from captune.training.loader import Batch
from captune.training.progress import EpochProgress
from captune.training.stream_bank import StreamBank
from captune.training.stream_loader import StreamLoader, position_in_stream
from shards import photo, sample, tar_of, write_shards

SIZES = [9, 1, 14, 3, 10]  # 37 samples


class Numbers:
    """The embedding of a caption that ends in ``number N, told T`` points to N, and a bit to T."""

    name, dimension, fingerprint = "numbers", 64, "1"

    def encode(self, texts: list[str]) -> Tensor:
        found = torch.zeros(len(texts), 64)
        for row, text in enumerate(texts):
            number, turn = text.split("number ")[1].split(", told ")
            found[row, int(number)] = 1
            found[row, 60 + int(turn)] += 0.2
        return found


@pytest.fixture
def config() -> Config:
    return DEFAULT_CONFIG.replace(
        recipe="plain", batch_size=4, num_workers=0, shuffle_buffer=6, precision="fp32"
    )


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., StreamLoader]:
    pattern = write_shards(tmp_path / "s", SIZES, captions=2)

    def loader(config: Config, rank: int = 0, world_size: int = 1) -> StreamLoader:
        table = StreamTable.open(pattern)
        bank = StreamBank.build(table, Numbers(), precision="fp32")
        config = config.replace(batch_size=world_size * config.batch_size)  # of each as many
        return StreamLoader(table, bank, config, image_size=32, here=Processes(rank, world_size))

    return loader


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each of several processes reads, before they bring it together."""

    def unshared(here: Processes, *read: Any) -> Any:
        return (*read[:3], None, read[3])

    monkeypatch.setattr(stream_loader, "exchange", unshared)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.inputs, b.inputs)
        and torch.equal(a.images, b.images)
        and torch.equal(a.text, b.text)
        and torch.equal(a.caption_images, b.caption_images)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    ("world_size", "workers"), [(1, 0), (1, 1), (1, 3), (2, 0), (2, 2), (3, 2), (4, 0)]
)
def test_every_sample_is_seen_once_an_epoch(
    make: Callable[..., StreamLoader], config: Config, world_size: int, workers: int
) -> None:
    config = config.replace(num_workers=workers)
    loaders = [make(config, rank, world_size) for rank in range(world_size)]
    assert len({loader.steps for loader in loaders}) == 1
    batches = [list(loader.batches(0)) for loader in loaders]
    assert {len(found) for found in batches} == {loaders[0].steps}
    seen = [row for found in batches for batch in found for row in batch.images.tolist()]
    assert len(seen) == len(set(seen)) == 37 - loaders[0].order.left_out
    assert all(len(batch.images) == 4 for found in batches for batch in found)


def test_a_batch_holds_the_pictures_and_captions_of_its_rows(
    make: Callable[..., StreamLoader], config: Config
) -> None:
    """``plain`` draws no crops: pixels are the centre square, the text one of the two captions."""
    for batch in make(config).batches(0):
        for place, row in enumerate(batch.images.tolist()):
            with Image.open(io.BytesIO(photo(row))) as image:
                expected = torch.from_numpy(resize_and_crop(image.convert("RGB"), 32))
            assert torch.equal(batch.inputs[place], expected)
            assert int(batch.text[place].argmax()) == row
        assert torch.equal(batch.caption_images, batch.images)
    turns = {int(batch.text[0, 60:].argmax()) for batch in make(config).batches(0)}
    assert turns == {0, 1}


def test_further_captions_are_those_of_the_images_and_of_their_shards(
    make: Callable[..., StreamLoader], config: Config
) -> None:
    config = config.replace(captions_per_image=0, bank_negatives=9)
    loader = make(config)
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)
    for batch in loader.batches(0):
        owners = batch.caption_images.tolist()
        assert [int(text.argmax()) for text in batch.text[:, :60]] == owners
        images = batch.images.tolist()
        assert owners[: len(images)] == images
        assert sorted(owners[: batch.own]) == sorted(images * 2)
        assert batch.own < len(owners) <= batch.own + 9
        assert {shard_of[row] for row in owners} == {shard_of[row] for row in images}


def test_orders_are_a_matter_of_seed_and_epoch(
    make: Callable[..., StreamLoader], config: Config
) -> None:
    first = list(make(config).batches(1))
    assert same(first, list(make(config).batches(1)))
    assert not same(first, list(make(config).batches(2)))
    assert not same(first, list(make(config.replace(seed=1)).batches(1)))
    rows = [row for batch in first for row in batch.images.tolist()]
    assert rows != sorted(rows)


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("buffer", [1, 6, 1000])
def test_a_resumed_epoch_goes_on_with_the_very_batches(
    make: Callable[..., StreamLoader], config: Config, workers: int, buffer: int
) -> None:
    config = config.replace(num_workers=workers, shuffle_buffer=buffer, augment=True)
    whole = list(make(config, 1, 2).batches(0))
    for start in range(len(whole) + 1):
        assert same(list(make(config, 1, 2).batches(0, start)), whole[start:])


def test_crops_and_captions_do_not_depend_on_who_reads(
    make: Callable[..., StreamLoader], config: Config
) -> None:
    config = config.replace(augment=True)

    def pixels(workers: int, world_size: int) -> dict[int, tuple[Tensor, Tensor]]:
        found = {}
        for rank in range(world_size):
            loader = make(config.replace(num_workers=workers), rank, world_size)
            for batch in loader.batches(0):
                rows = zip(batch.images.tolist(), batch.inputs, batch.text, strict=True)
                found |= {row: (picture, text) for row, picture, text in rows}
        return found

    alone, together = pixels(0, 1), pixels(2, 2)
    shared = alone.keys() & together.keys()
    assert len(shared) >= 29
    for row in shared:
        assert all(map(torch.equal, alone[row], together[row]))


def test_a_stream_is_mirrored_unless_flips_are_off(
    make: Callable[..., StreamLoader], config: Config
) -> None:
    def pixels(**changes: object) -> dict[int, Tensor]:
        batches = make(config.replace(augment=True, **changes)).batches(0)
        return {int(row): p for b in batches for row, p in zip(b.images, b.inputs, strict=True)}

    drawn, upright = pixels(), pixels(flip=False)
    turned = {row for row in drawn if not torch.equal(drawn[row], upright[row])}
    assert all(torch.equal(drawn[row], upright[row].flip(-1)) for row in turned)
    assert 4 < len(turned) < len(drawn) - 4


def test_shards_in_another_store_are_read_by_workers(config: Config) -> None:
    store = fsspec.filesystem("memory")
    for number in range(3):
        members = [m for n in range(4 * number, 4 * number + 4) for m in sample(n)]
        store.pipe(f"/stream/a-{number}.tar", tar_of(members))
    table = StreamTable.open("memory:///stream/a-*.tar")
    bank = StreamBank.build(table, Numbers(), precision="fp32")
    loader = StreamLoader(
        table, bank, config.replace(num_workers=2), image_size=32, here=Processes()
    )
    seen = [row for batch in loader.batches(0) for row in batch.images.tolist()]
    assert sorted(seen) == list(range(12))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_cannot_be_decoded_is_named_once_and_counted(
    tmp_path: Path, config: Config, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [m for n in range(8) for m in sample(n)]
    members[6] = ("000003.jpg", photo(3)[:200])
    members[8] = ("000004.jpg", b"%!PS-Adobe-3.0 EPSF-3.0")  # Pillow would start Ghostscript
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(members))
    table = StreamTable.open(str(path))
    bank = StreamBank.build(table, Numbers(), precision="fp32")
    loader = StreamLoader(
        table, bank, config.replace(num_workers=workers), image_size=32, here=Processes()
    )
    for epoch in (0, 1):
        seen = [row for batch in loader.batches(epoch) for row in batch.images.tolist()]
        assert sorted(seen) == [0, 1, 2, 5, 6, 7]
    said = capsys.readouterr().err
    assert said.count("skipped an unreadable image") == 2
    assert said.count(f"{path}::000003.jpg") == said.count(f"{path}::000004.jpg") == 1
    assert len(loader.unreadable) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("change", ["gone", "shorter", "more captions", "other samples"])
def test_a_shard_that_changes_while_it_trains_is_an_error_of_one_line(
    make: Callable[..., StreamLoader],
    config: Config,
    tmp_path: Path,
    workers: int,
    change: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_shards, "PAUSES", (0.0, 0.0))
    loader = make(config.replace(num_workers=workers))
    path = tmp_path / "s" / "squares-02.tar"
    if change == "gone":
        path.unlink()
    else:
        captions = 3 if change == "more captions" else 2
        numbers = range(11, 25) if change == "other samples" else range(10, 20)
        path.write_bytes(tar_of([m for n in numbers for m in sample(n, captions)]))
    with pytest.raises(CaptuneError, match=r"squares-02\.tar (is not|cannot)") as caught:
        list(loader.batches(0))
    assert "\n" not in str(caught.value)


def test_a_batch_that_processes_cannot_share_equally_is_refused(
    make: Callable[..., StreamLoader], config: Config
) -> None:
    table = StreamTable.open(make(config).table.pattern)
    bank = StreamBank.build(table, Numbers(), precision="fp32")
    for batch_size, count, near in ((7, 2, "6 or 8"), (2, 3, "3")):
        config, here = config.replace(batch_size=batch_size), Processes(0, count)
        with pytest.raises(CaptuneError, match=rf"{batch_size} .* by {count} .*: take {near}$"):
            StreamLoader(table, bank, config, image_size=32, here=here)


def test_what_an_epoch_leaves_out_is_said(
    make: Callable[..., StreamLoader], config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = make(config, 1, 2)
    assert loader.order.left_out == 5
    said = capsys.readouterr().err
    assert "each epoch leaves out 5 of 37 images, others each time: 2 x 4 steps of 4" in said
    make(config.replace(batch_size=37))
    assert "leaves out" not in capsys.readouterr().err


def scheduler_at(step: int) -> torch.optim.lr_scheduler.LambdaLR:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1 / (1 + at))
    for _ in range(step):
        optimizer.step()
        scheduler.step()
    return scheduler


def test_a_run_goes_on_inside_an_epoch_where_as_many_share_the_stream(
    make: Callable[..., StreamLoader], config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    two, three = (make(config.replace(num_workers=n)) for n in (2, 3))
    capsys.readouterr()
    scheduler = scheduler_at(22)  # two epochs of 9 steps, and four
    stopped = EpochProgress(4, step=4, images=16, layout=two.layout)
    assert position_in_stream(stopped, two, scheduler, 2) is stopped
    assert capsys.readouterr().err == "" and scheduler.last_epoch == 22
    assert position_in_stream(stopped, three, scheduler, 2) == EpochProgress(4)
    said = capsys.readouterr().err
    assert "begun by 1 × 2 readers (processes × loader workers)" in said and "begins anew" in said
    assert "its first 4 steps" in said
    assert scheduler.last_epoch == 18
    assert scheduler.get_last_lr() == [1 / 19]
    # Between two epochs nothing is met twice, and nothing is said.
    between = EpochProgress(4, layout=two.layout)
    assert position_in_stream(between, three, scheduler, 2) == EpochProgress(4)
    assert capsys.readouterr().err == ""
    table = EpochProgress(4, step=4)
    assert position_in_stream(table, object(), scheduler, 2) is table
