"""Own tables of images and captions: CSV, TSV, JSON Lines or Parquet become a CaptionTable."""

from __future__ import annotations

import dataclasses
import hashlib
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from captune.console import say, some
from captune.data.rowset import RowSet
from captune.data.table import CaptionTable, files_present
from captune.errors import CaptuneError, nearest

IMAGE_COLUMNS = ("image", "file_name", "filepath", "filename", "image_path", "file_path", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "description")
SPLIT_NAMES = {"training": "train", "validation": "val", "valid": "val", "dev": "val"}

ALL = "all"
BATCH = 65_536  # rows that are Python objects at a time


@dataclass(frozen=True)
class TableOptions:
    """How to read an own table.

    Attributes:
        image_column: the column of image paths (relative ones start at the table's folder).
        caption_columns: columns that each hold a caption, or a list of captions.
        caption: a template such as ``{title}, {colour}`` in place of the columns.
        val: a second table to validate on.
    """

    image_column: str = ""
    caption_columns: tuple[str, ...] = ()
    caption: str = ""
    val: str = ""

    def resolved(self) -> TableOptions:
        """With an absolute ``val``: a run is opened from other folders too."""
        val = str(Path(self.val).expanduser().resolve()) if self.val else ""
        return dataclasses.replace(self, val=val)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; ``TableOptions(**value)`` reads it back once the list is a tuple."""
        return {
            "image_column": self.image_column,
            "caption_columns": list(self.caption_columns),
            "caption": self.caption,
            "val": self.val,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> TableOptions:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**value, "caption_columns": tuple(value["caption_columns"])})


class TableSource:
    """One file of rows, an image and its caption or captions in each.

    Validation images come from ``options.val``, else from a ``split`` column, else they are the
    tenth of the images whose hashed name falls there: the same ones however the table grows.
    """

    def __init__(self, path: Path, options: TableOptions) -> None:
        self.path = path
        self.options = options
        self.name = path.stem

    @cached_property
    def _rows(self) -> RowSet:
        return RowSet.gather(read_rows(self.path, self.options))

    @property
    def _has_split_column(self) -> bool:
        return any(self._rows.splits)

    @property
    def splits(self) -> list[str]:
        """The names that :meth:`table` takes here."""
        own = {split for split in self._rows.splits if split}
        if own:  # the column decides, but for --val and what it leaves open
            own |= {"val"} if self.options.val else set()
            own |= {"train"} if self.options.val and "" in self._rows.splits else set()
            return [*sorted(own), ALL]
        return ["train", "val", ALL]

    @property
    def train_split(self) -> str:
        """What to train on by default."""
        return "train"

    @property
    def val_split(self) -> str:
        """What to validate and select on."""
        return "val"

    @property
    def evaluation_split(self) -> str:
        """What ``evaluate`` takes by default: the table as a whole where nothing splits it."""
        return "val" if self._has_split_column or self.options.val else ALL

    def table(self, split: str) -> CaptionTable:
        """The captions of a split.

        Raises:
            CaptuneError: unknown split, no such column, no image file there.
        """
        if split == "val" and self.options.val:
            path = Path(self.options.val)
            if not path.is_file():
                raise CaptuneError(f"no table to validate on at {path} (--val)")
            other = TableSource(path, dataclasses.replace(self.options, val=""))
            return _renamed(other.table(ALL), self.name, "val")
        if split not in {*self.splits, "train", "val"}:
            raise CaptuneError(f"no split {split!r} in {self.path}{nearest(split, self.splits)}")
        keep = self._belonging(split)
        if not keep.any():
            raise CaptuneError(f"{self.path} has no rows in split {split!r}: give --val FILE")
        return self._build(keep, split)

    def _belonging(self, split: str) -> npt.NDArray[np.bool_]:
        """``(R,)``: the rows of a split."""
        rows = self._rows
        if split == ALL:
            return np.ones(len(rows), dtype=np.bool_)
        if self._has_split_column:
            keep = rows.of_split(split)
        else:
            ids = np.array([image_id(name) for name in rows.images])
            drawn = ids % 10 == 0
            if not drawn.any():
                drawn[ids.argmin()] = True  # a table too small for the hash to pick anything
            keep = drawn[rows.image_of_row] == (split == "val")
        if split == "train" and self.options.val:
            keep |= rows.of_split("")
        return keep

    def _build(self, keep: npt.NDArray[np.bool_], split: str) -> CaptionTable:
        places, captions, owner = self._rows.chosen(keep)
        names = [self._rows.images[place] for place in places]
        link = next(filter(is_link, names), None)
        if link:
            raise CaptuneError(
                f"{self.path} names images by links, such as {link}: fetch them with `captune data "
                f"table {self.path}`, then train on the captions.parquet that it writes"
            )
        paths = [str(self.path.parent / name) for name in names]
        there = files_present(paths)
        absent = [name for name, found in zip(names, there, strict=True) if not found]
        if len(absent) == len(names):
            raise CaptuneError(
                f"none of the {len(names):,} images of {self.path} is there (looked for "
                f"{self.path.parent / absent[0]}): paths start at the table's folder"
            )
        images = {
            "image_id": pa.array([image_id(name) for name in names], pa.int64()),
            "file_name": pa.array(names, pa.string()),
            "path": pa.array(paths, pa.string()),
        }
        columns = {
            "caption_id": pa.array(np.arange(len(owner), dtype=np.int64)),
            "caption": captions,
            "image": pa.array(owner),
        }
        table = CaptionTable.from_columns(pa.table(images), pa.table(columns), self.name, split)
        if absent:
            say(f"{self.name} {split}: {len(absent):,} images are not there: {some(absent)}")
            gone = set(absent)
            kept = [name not in gone for name in table.images["file_name"].to_pylist()]
            table = table.take_images(np.flatnonzero(kept))
        return table


def image_id(name: str) -> int:
    """A 63-bit id from an image's name, the same on every machine."""
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _renamed(table: CaptionTable, name: str, split: str) -> CaptionTable:
    return CaptionTable(table.images, table.captions, name, split)


def is_link(image: str) -> bool:
    """Whether an image column names an address on the web in place of a file."""
    return image.lower().startswith(("http://", "https://"))


def read_rows(path: Path, options: TableOptions) -> Iterator[tuple[str, list[str], str]]:
    """Every row's image (a path or a link), captions and split; ``options.val`` plays no part.

    Raises:
        CaptuneError: no such columns, no rows, or a file that cannot be read.
    """
    table = _read_arrow(path)
    columns = {name.lower(): name for name in table.column_names}
    image = _column(path, columns, options.image_column, IMAGE_COLUMNS, "image", "--image-column")
    if options.caption:
        caption_of, wanted = _template(path, options.caption, table.column_names)
    else:
        named = options.caption_columns or (
            _column(path, columns, "", CAPTION_COLUMNS, "caption", "--caption-column"),
        )
        wanted = [_column(path, columns, n, (), "caption", "--caption-column") for n in named]
        caption_of = _caption_reader(wanted)
    split = columns.get("split")
    needed = dict.fromkeys([image, *wanted, *([split] if split else [])])
    twice = [name for name in needed if table.column_names.count(name) > 1]
    if twice:
        raise CaptuneError(f"{path} has several columns {twice[0]!r}: give each a name of its own")
    some_row = False
    for batch in table.select(list(needed)).to_batches(max_chunksize=BATCH):
        for row in batch.to_pylist():
            if row[image] in (None, ""):
                continue
            name = str(row[image]).strip()
            if not is_link(name):
                name = posixpath.normpath(str(row[image]).replace("\\", "/"))
            own_split = str(row[split] or "").lower() if split else ""
            some_row = True
            yield name, caption_of(row), SPLIT_NAMES.get(own_split, own_split)
    if not some_row:
        raise CaptuneError(f"{path} holds no rows with an image in column {image!r}")


def _read_arrow(path: Path) -> pa.Table:
    """The file as Arrow; every CSV column as text."""
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            parse = pa.csv.ParseOptions(
                delimiter="\t" if kind == ".tsv" else ",", newlines_in_values=True
            )
            with pa.csv.open_csv(path, parse_options=parse) as reader:
                names = reader.schema.names
            convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
            return pa.csv.read_csv(path, parse_options=parse, convert_options=convert)
        if kind in (".jsonl", ".ndjson"):
            return pa.json.read_json(path)
        return pa.parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise CaptuneError(f"{path} cannot be read as {kind.lstrip('.')}: {first}") from None


def _column(
    path: Path, columns: dict[str, str], named: str, usual: tuple[str, ...], what: str, flag: str
) -> str:
    """The column ``named``, or the first of the usual spellings that is there."""
    for candidate in (named,) if named else usual:
        if candidate.lower() in columns:
            return columns[candidate.lower()]
    found = ", ".join(columns.values())
    wanted = f"no column {named!r}" if named else f"no {what} column"
    raise CaptuneError(f"{path} has {wanted}; its columns: {found}; name one with {flag}")


def _caption_reader(columns: list[str]) -> Callable[[dict[str, Any]], list[str]]:
    """Captions of a row: each column holds one, or a list of them."""

    def read(row: dict[str, Any]) -> list[str]:
        texts: list[str] = []
        for column in columns:
            value = row[column]
            for text in value if isinstance(value, list) else [value]:
                texts += [] if text is None else [str(text)]
        return texts

    return read


def _template(
    path: Path, template: str, names: list[str]
) -> tuple[Callable[[dict[str, Any]], list[str]], list[str]]:
    """Captions written from a template, and the columns that it names. Only ``{column}`` is
    replaced: no code, no formats."""
    pattern = re.compile(r"\{([^{}]+)\}")
    wanted = pattern.findall(template)
    for name in wanted:
        if name not in names:
            raise CaptuneError(
                f"--caption names the column {name!r}{nearest(name, names)} ({path})"
            )
    if not wanted:
        raise CaptuneError(f"--caption {template!r} names no column: write it like '{{title}}'")

    def read(row: dict[str, Any]) -> list[str]:
        filled = pattern.sub(
            lambda m: "" if row[m.group(1)] is None else str(row[m.group(1)]), template
        )
        return [filled]

    return read, wanted
