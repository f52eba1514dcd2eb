"""Shards: Arrow files of many photos as JPEG, each photo under ``train-00000.arrow::12``.

A shard is an uncompressed Arrow IPC file with the columns of :data:`SCHEMA`, a row for each photo
and :data:`BATCH` rows in each record batch but the last. It is memory-mapped, so any row is found
at once and only its own bytes are read: what a shuffled loader needs.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from captune.files import replacing

BATCH = 256
SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image", pa.binary()),
    ]
)
_ADDRESS = re.compile(r"(?P<shard>.+\.arrow)::(?P<row>\d+)", re.DOTALL)
_OPEN = 256  # shards held open by a process; each is a file descriptor


class ShardRow(NamedTuple):
    """A photo in a shard; one that could not be read has no bytes, and no width and height."""

    image_id: int
    file_name: str
    width: int
    height: int
    image: bytes


def photo_address(shard: str, row: int) -> str:
    """What stands in place of a path for a photo in a shard."""
    return f"{shard}::{row}"


def shard_of(path: Path) -> tuple[Path, int] | None:
    """The shard and the row that an address names; None for the path of any other photo."""
    found = _ADDRESS.fullmatch(str(path))
    return (Path(found["shard"]), int(found["row"])) if found else None


def photo_file(path: Path) -> Path:
    """The file that a photo lies in: its shard, or ``path`` itself."""
    found = shard_of(path)
    return found[0] if found else path


def photo_bytes(path: Path) -> bytes:
    """The encoded photo, from its own file or from a shard.

    Raises:
        OSError: no such file.
        ValueError: no such row, a damaged shard (Arrow's errors among them), or a photo that
            could not be read when the shard was written.
    """
    found = shard_of(path)
    if found is None:
        return path.read_bytes()
    shard, row = found
    stat = shard.stat()
    # A worker that was forked opens its own: it may have been forked in the middle of a read.
    batches = _images(str(shard), stat.st_size, stat.st_mtime_ns, os.getpid())
    batch, place = divmod(row, BATCH)
    if batch >= len(batches) or place >= len(batches[batch]):
        raise ValueError(f"{shard.name} has no row {row}")
    content = bytes(batches[batch][place].as_buffer())
    if not content:
        raise ValueError("it could not be read when the shard was written")
    return content


@functools.lru_cache(_OPEN)
def _images(shard: str, size: int, modified: int, process: int) -> list[pa.BinaryArray]:
    """The column of photos, batch by batch, mapped into memory: only what is read is loaded.

    Size and time are there so that another file of the same name is opened anew.
    """
    reader = pa.ipc.open_file(pa.memory_map(shard))
    if reader.schema != SCHEMA:
        raise ValueError(f"{shard} is no shard of photos: its columns are {reader.schema.names}")
    batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    images = [batch.column("image") for batch in batches]
    for column in images:
        column.validate(full=True)  # a damaged offset would point outside of the file
    return images


def write_shard(path: Path, batches: Iterable[list[ShardRow]]) -> None:
    """Write a shard atomically, a batch at a time.

    Args:
        batches: :data:`BATCH` rows in each but the last.
    """
    with (
        replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        for rows in batches:
            columns = [list(column) for column in zip(*rows, strict=True)]
            writer.write_batch(
                pa.record_batch(
                    [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)],
                    schema=SCHEMA,
                )
            )
