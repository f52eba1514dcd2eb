"""Where images and captions come from: a COCO 2014 folder, a pack, or an own table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from captune.data.coco import CocoSource
from captune.data.packed import TABLE, PackedSource, is_pack
from captune.data.table import CaptionTable
from captune.data.tabular import TableOptions, TableSource
from captune.errors import CaptuneError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


class Source(Protocol):
    """Named splits of images with captions."""

    name: str

    @property
    def splits(self) -> list[str]:
        """The names that :meth:`table` takes."""
        ...

    @property
    def train_split(self) -> str:
        """What to train on by default."""
        ...

    @property
    def val_split(self) -> str:
        """What to validate and select on by default."""
        ...

    @property
    def evaluation_split(self) -> str:
        """What to evaluate on by default."""
        ...

    def table(self, split: str) -> CaptionTable:
        """The captions of a split."""
        ...


def open_source(data: str | Path, options: TableOptions | None = None) -> Source:
    """The source at ``data``: a folder in the COCO 2014 layout, a pack, or a table file.

    Raises:
        CaptuneError: nothing is there, or it is none of them.
    """
    path = Path(data).expanduser()
    options = options or TableOptions()
    if path.is_dir():
        if options != TableOptions():
            raise CaptuneError(f"column options and --val belong to a table; {path} is a folder")
        return PackedSource(path) if is_pack(path) else CocoSource(path)
    if not path.exists():
        raise CaptuneError(
            f"no data at {path}: give a folder in the COCO 2014 layout or a table "
            f"({', '.join(TABLE_SUFFIXES)}); `captune data demo DIR --images 2000` draws some"
        )
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise CaptuneError(f"{path} is no table that captune reads: {', '.join(TABLE_SUFFIXES)}")
    return TableSource(path, options)


def is_of_table(source: Source) -> bool:
    """Whether it is an own table, packed or not: there, a caption may be a label."""
    return isinstance(source, TableSource) or (
        isinstance(source, PackedSource) and source.manifest.layout == TABLE
    )


def find_dataset_dir(dataset_dir: str | Path | None = None) -> Path:
    """``dataset_dir``, else ``$CAPTUNE_DATA``, else ``./data/coco2014``.

    Raises:
        CaptuneError: none of them is there.
    """
    named = dataset_dir or os.environ.get("CAPTUNE_DATA")
    path = Path(named).expanduser() if named else Path("data") / "coco2014"
    if not path.exists():
        tried = "dataset_dir" if dataset_dir else "$CAPTUNE_DATA" if named else "the default"
        raise CaptuneError(
            f"no data at {path} ({tried}): pass dataset_dir=..., set CAPTUNE_DATA, or put COCO "
            "2014 into ./data/coco2014"
        )
    return path
