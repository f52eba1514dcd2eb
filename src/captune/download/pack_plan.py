"""Which photos go into which shard of a pack: a plan that every run of the same call repeats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from captune.data.table import CaptionTable
from captune.download.disk import shrunk_bytes

SHARD_ROWS, SHARD_BYTES = 5_000, 200_000_000  # whichever comes first, the bytes by estimate


@dataclass(frozen=True)
class Job:
    """A photo to be packed: what its row says of it, and where it lies."""

    image_id: int
    file_name: str
    path: Path


Plan = dict[str, list[tuple[str, list[Job]]]]
"""Of each split, the names of its shards with their photos."""


def rows_of_shard(side: int) -> int:
    """How many photos a shard has, of this shorter side."""
    return min(SHARD_ROWS, max(1, SHARD_BYTES // shrunk_bytes(1, SHARD_BYTES, side)))


def planned(tables: Mapping[str, CaptionTable], rows: int) -> Plan:
    """Which photos go into which shard; one that stands in several splits into the first's."""
    plan: Plan = {}
    taken: set[str] = set()
    for split, table in tables.items():
        jobs = []
        for image in table.images.to_pylist():
            if image["path"] not in taken:
                taken.add(image["path"])
                jobs.append(Job(image["image_id"], image["file_name"], Path(image["path"])))
        plan[split] = [
            (f"{split}-{start // rows:05}.arrow", jobs[start : start + rows])
            for start in range(0, len(jobs), rows)
        ]
    return plan
