"""Tables in a file of the cache, mapped: what is read of them the system can drop at any time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa

from captune.files import cache_dir, replacing

WORTH_A_FILE = 1 << 20  # bytes
ROWS_AT_ONCE = 65_536


def mapped(table: pa.Table) -> pa.Table:
    """``table`` from an Arrow file in ``$CAPTUNE_CACHE/tables``, which is written where it is not
    there; its name is a hash of all that it holds. Each column has one chunk.

    A small table is given back as it is, and so is one that the cache cannot take: it then needs
    memory, and nothing else changes.
    """
    if table.nbytes < WORTH_A_FILE:
        return table
    whole = table.combine_chunks()
    path = cache_dir() / "tables" / f"{_digest(whole)}.arrow"
    try:
        return _open(path)
    except (OSError, pa.ArrowException):  # not there, or cut short
        pass
    try:
        with (
            replacing(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, whole.schema) as writer,
        ):
            writer.write_table(whole)
        return _open(path)
    except OSError:  # a full disk, a home that is read only
        return table


def _digest(whole: pa.Table) -> str:
    state = hashlib.blake2b(whole.schema.serialize(), digest_size=16)
    for start in range(0, whole.num_rows, ROWS_AT_ONCE):
        for batch in whole.slice(start, ROWS_AT_ONCE).to_batches():
            state.update(batch.serialize())
    return state.hexdigest()


def _open(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
