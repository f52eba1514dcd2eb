"""Shards: any row by its address, the same bytes, and errors that name the row or the shard."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from captune.data.photos import open_photo
from captune.data.pixels import UnreadableImageError, load_image
from captune.data.shards import (
    BATCH,
    SCHEMA,
    ShardRow,
    photo_address,
    photo_bytes,
    photo_file,
    shard_of,
    write_shard,
)


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (number % 256, 0, number // 256)).save(out, "JPEG", quality=95)
    return out.getvalue()


def write(path: Path, count: int) -> Path:
    rows = [ShardRow(n, f"{n}.jpg", 8, 6, jpeg(n)) for n in range(count)]
    write_shard(path, (rows[start : start + BATCH] for start in range(0, count, BATCH)))
    return path


def at(shard: Path, row: int) -> Path:
    return Path(photo_address(str(shard), row))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write(tmp_path / "train-00000.arrow", 2 * BATCH + 3)


def test_any_row_is_found_by_its_address(shard: Path) -> None:
    rows = np.random.default_rng(0).permutation(2 * BATCH + 3)
    assert all(photo_bytes(at(shard, int(row))) == jpeg(int(row)) for row in rows)


def test_a_shard_is_plain_arrow(shard: Path) -> None:
    """Without captune, too: one row a photo, the columns as they are documented."""
    with pa.memory_map(str(shard)) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.schema == SCHEMA
    assert table["image_id"].to_pylist() == list(range(2 * BATCH + 3))
    assert table["image"][BATCH].as_py() == jpeg(BATCH)


def test_an_address_is_taken_wherever_a_photo_is_opened(shard: Path) -> None:
    expected = np.asarray(Image.open(io.BytesIO(jpeg(300))))
    assert np.array_equal(np.asarray(load_image(at(shard, 300))), expected)
    assert np.array_equal(np.asarray(load_image(str(at(shard, 300)))), expected)
    assert np.array_equal(np.asarray(open_photo(at(shard, 300))), expected)


def test_only_an_address_is_one(tmp_path: Path) -> None:
    plain = tmp_path / "odd::7"
    plain.write_bytes(jpeg(7))
    assert shard_of(plain) is None and photo_file(plain) == plain
    assert load_image(plain).size == (8, 6)
    assert shard_of(Path("a/b-00001.arrow::12")) == (Path("a/b-00001.arrow"), 12)
    assert photo_file(Path("a/b-00001.arrow::12")) == Path("a/b-00001.arrow")
    assert shard_of(Path("a/b-00001.arrow::x")) is None


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (f"train-00000.arrow::{2 * BATCH + 3}", "has no row 515"),
        ("train-00000.arrow::99999999999999999999", "has no row"),
        ("gone.arrow::0", "No such file"),
        ("broken.arrow::0", "broken.arrow"),
        ("other.arrow::0", "is no shard of photos: its columns are ['a']"),
        ("bare.arrow::0", "it could not be read when the shard was written"),
    ],
)
def test_what_cannot_be_read_says_why(shard: Path, address: str, reason: str) -> None:
    folder = shard.parent
    (folder / "broken.arrow").write_bytes(shard.read_bytes()[:1000])
    write_shard(folder / "bare.arrow", [[ShardRow(1, "a.jpg", 0, 0, b"")]])
    other = pa.table({"a": [1]})
    with pa.OSFile(str(folder / "other.arrow"), "wb") as sink, pa.ipc.new_file(sink, other.schema):
        pass
    with pytest.raises(UnreadableImageError) as caught:
        load_image(folder / address)
    assert reason in str(caught.value) and address in str(caught.value)


def test_nothing_but_jpeg_is_decoded_from_a_shard(tmp_path: Path) -> None:
    """Captune packs nothing else, and some formats start a program."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "PNG")
    shard = tmp_path / "a.arrow"
    write_shard(shard, [[ShardRow(1, "a.png", 8, 6, buffer.getvalue())]])
    with pytest.raises(UnreadableImageError, match="cannot identify image file"):
        load_image(at(shard, 0))


def test_an_offset_that_points_outside_of_the_file_is_an_error(tmp_path: Path) -> None:
    """It would end the process: Arrow trusts offsets that nobody has looked at."""
    shard = write(tmp_path / "a.arrow", 3)
    sizes = [len(jpeg(number)) for number in range(3)]
    offsets = np.cumsum([0, *sizes]).astype("<i4").tobytes()
    content = shard.read_bytes()
    assert content.count(offsets) == 1
    wild = np.array([0, sizes[0], 2**30, 2**30 + 9], dtype="<i4").tobytes()
    shard.write_bytes(content.replace(offsets, wild))
    with pytest.raises(UnreadableImageError, match=r"a\.arrow"):
        load_image(at(shard, 2))


def test_a_shard_written_anew_is_read_anew(shard: Path) -> None:
    assert photo_bytes(at(shard, 1)) == jpeg(1)
    write_shard(shard, [[ShardRow(0, "0.jpg", 8, 6, jpeg(500)), ShardRow(1, "1", 8, 6, jpeg(501))]])
    os.utime(shard, ns=(1, 1))
    assert photo_bytes(at(shard, 1)) == jpeg(501)
