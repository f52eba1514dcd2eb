"""CaptionTable: images, captions, and which caption belongs to which image, in Arrow."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captune.console import say, some
from captune.data.mapped import mapped
from captune.data.shards import photo_file
from captune.errors import CaptuneError

Rows = npt.NDArray[np.int64]


def file_key(file_name: str) -> str:
    """What identifies an image across copies of a data set.

    COCO's file names are unique wherever they lie (``val2014/COCO_val2014_….jpg`` or without the
    folder), so theirs is the bare name; any other image keeps its path as the table has it.
    """
    bare = file_name.rsplit("/", 1)[-1]
    return bare if bare.startswith("COCO_") else file_name


def files_present(paths: Sequence[str]) -> list[bool]:
    """Which files are there: folders are listed once, which is far quicker than to ask for each."""
    listed: dict[str, set[str]] = {}
    found = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                listed[folder] = {entry.name for entry in os.scandir(folder) if entry.is_file()}
            except OSError:
                listed[folder] = set()
        # Where case does not matter a listing may spell it otherwise.
        found.append(name in listed[folder] or os.path.isfile(path))
    return found


@dataclass(frozen=True, eq=False)
class CaptionTable:
    """N images and M captions; an image may have any number of captions, at least one.

    Attributes:
        images: Arrow table, ``image_id`` int64, ``file_name`` and ``path`` string; N rows.
        captions: Arrow table, ``caption_id`` int64, ``caption`` string, ``image`` int64 (a row of
            ``images``); M rows, in the order of the source.
        name: the data's short name, for titles and default folders.
        split: the split's name.
    """

    images: pa.Table
    captions: pa.Table
    name: str
    split: str

    @classmethod
    def build(
        cls,
        images: Iterable[tuple[int, str, Path]],
        captions: Iterable[tuple[int, str, int]],
        *,
        name: str,
        split: str,
    ) -> CaptionTable:
        """A table from ``(image_id, file_name, path)`` and ``(caption_id, caption, image row)``.

        Captions lose the space around them. Empty ones and images left without any are dropped,
        and counted aloud.

        Raises:
            CaptuneError: nothing remains.
        """
        return cls.from_columns(image_columns(images), caption_columns(captions), name, split)

    @classmethod
    def from_columns(
        cls, images: pa.Table, captions: pa.Table, name: str, split: str
    ) -> CaptionTable:
        """From columns as the attributes have them; what is dropped is as for :meth:`build`.

        What is more than a little lies in the cache and is mapped
        (:func:`captune.data.mapped.mapped`).

        Raises:
            CaptuneError: nothing remains.
        """
        told = pc.not_equal(captions["caption"], "")
        kept = captions if pc.all(told).as_py() else captions.filter(told)
        if kept.num_rows < captions.num_rows:
            empty = captions.num_rows - kept.num_rows
            say(f"{name} {split}: {empty} empty captions left out")
        if not kept.num_rows:
            raise CaptuneError(f"{name} {split}: no captions found for {images.num_rows} images")
        table = cls(images, kept, name, split)
        captioned = table.caption_counts > 0
        if not captioned.all():
            bare = [table.file_name(int(row)) for row in np.flatnonzero(~captioned)]
            say(f"{name} {split}: {len(bare)} images without a caption left out: {some(bare)}")
            table = table.take_images(np.flatnonzero(captioned))
        return cls(mapped(table.images), mapped(table.captions), name, split)

    def __len__(self) -> int:
        return int(self.images.num_rows)

    @cached_property
    def image_of_caption(self) -> Rows:
        """``(M,)`` the image row of each caption."""
        return np.asarray(self.captions["image"].to_numpy(), dtype=np.int64)

    @cached_property
    def image_ids(self) -> Rows:
        """``(N,)`` ids, unique in the data set."""
        return np.asarray(self.images["image_id"].to_numpy(), dtype=np.int64)

    @cached_property
    def caption_ids(self) -> Rows:
        """``(M,)`` ids of the captions, unique in the data set."""
        return np.asarray(self.captions["caption_id"].to_numpy(), dtype=np.int64)

    @cached_property
    def caption_counts(self) -> Rows:
        """``(N,)`` captions of each image."""
        return np.bincount(self.image_of_caption, minlength=len(self)).astype(np.int64)

    @cached_property
    def _grouped(self) -> tuple[Rows, Rows]:
        """Caption rows grouped by image ``(M,)`` and where each group starts ``(N + 1,)``."""
        order = np.argsort(self.image_of_caption, kind="stable").astype(np.int64)
        return order, np.concatenate([[0], np.cumsum(self.caption_counts)]).astype(np.int64)

    def captions_of(self, image: int) -> Rows:
        """The caption rows of one image row, in the source's order."""
        order, start = self._grouped
        return order[start[image] : start[image + 1]]

    @property
    def num_captions(self) -> int:
        """M."""
        return int(self.captions.num_rows)

    def owners_of(self, captions: Rows) -> Rows:
        """``(C,)`` the image rows of caption rows."""
        return self.image_of_caption[captions]

    def ids_of(self, images: Rows) -> Rows:
        """``(B,)`` the ids of image rows."""
        return self.image_ids[images]

    def negatives_for(self, images: Rows) -> list[range]:
        """The captions that random negatives of a step are drawn from: all, whatever its images."""
        return [range(self.num_captions)]

    def caption(self, row: int) -> str:
        """The text of a caption row."""
        return str(self.captions["caption"][row].as_py())

    def texts(self) -> list[str]:
        """All captions, ``M`` strings."""
        return self.captions["caption"].to_pylist()  # type: ignore[no-any-return]

    def path(self, image: int) -> Path:
        """Where the photo of an image row lies: a file, or a row of a shard."""
        return Path(self.images["path"][image].as_py())

    def file_name(self, image: int) -> str:
        """The name of an image row as its source writes it."""
        return str(self.images["file_name"][image].as_py())

    def file_keys(self) -> list[str]:
        """``N`` keys that identify the images across copies of the data set."""
        return [file_key(name) for name in self.images["file_name"].to_pylist()]

    def captions_among(self, images: Sequence[int] | Rows) -> tuple[Rows, Rows]:
        """The captions of some image rows: their rows, and each one's place in ``images``."""
        chosen = np.asarray(images, dtype=np.int64)
        place = np.full(len(self), -1, dtype=np.int64)
        place[chosen] = np.arange(len(chosen))
        rows = np.flatnonzero(place[self.image_of_caption] >= 0)
        return rows, place[self.image_of_caption[rows]]

    def take_images(self, images: Sequence[int] | Rows) -> CaptionTable:
        """The table of some image rows (in the order given) and their captions (in this order)."""
        rows, place = self.captions_among(images)
        captions = self.captions.take(pa.array(rows))
        column = captions.schema.get_field_index("image")
        captions = captions.set_column(column, "image", pa.array(place))
        chosen = pa.array(np.asarray(images, dtype=np.int64))
        return CaptionTable(self.images.take(chosen), captions, self.name, self.split)

    @cached_property
    def digest(self) -> str:
        """A hash of file names, captions and who belongs to whom, in order: names the split."""
        state = hashlib.blake2b(digest_size=16)
        for column in (self.images["file_name"], self.captions["caption"]):
            for chunk in column.chunks:  # not all strings at once
                for start in range(0, len(chunk), 65_536):
                    texts = chunk[start : start + 65_536].to_pylist()
                    state.update("".join(f"{text}\0" for text in texts).encode("utf-8"))
        state.update(self.image_of_caption.astype("<i8").tobytes())
        return state.hexdigest()

    def files_digest(self) -> str:
        """A hash of the images' paths, sizes and times, in order: tells whether a file changed.

        A photo in a shard has the shard's size and time.
        """
        state = hashlib.blake2b(digest_size=16)
        for row in range(len(self)):
            path = self.path(row)
            file = photo_file(path)
            stat = file.stat() if file.is_file() else None
            state.update(f"{path}\0{stat and (stat.st_size, stat.st_mtime_ns)}\0".encode())
        return state.hexdigest()

    def describe(self) -> str:
        """``flickr8k val: 1,000 images, 5,000 captions``."""
        return (
            f"{self.name} {self.split}: {len(self):,} images, {self.captions.num_rows:,} captions"
        )


def image_columns(rows: Iterable[tuple[int, str, Path]]) -> pa.Table:
    """``images`` of a table, from ``(image_id, file_name, path)``."""
    listed = list(rows)
    columns: dict[str, Any] = {
        "image_id": pa.array([row[0] for row in listed], pa.int64()),
        "file_name": pa.array([row[1] for row in listed], pa.string()),
        "path": pa.array([str(row[2]) for row in listed], pa.string()),
    }
    return pa.table(columns)


def caption_columns(rows: Iterable[tuple[int, str, int]]) -> pa.Table:
    """``captions`` of a table, from ``(caption_id, caption, image row)``; captions stripped."""
    listed = list(rows)
    columns: dict[str, Any] = {
        "caption_id": pa.array([row[0] for row in listed], pa.int64()),
        "caption": pa.array([row[1].strip() for row in listed], pa.string()),
        "image": pa.array([row[2] for row in listed], pa.int64()),
    }
    return pa.table(columns)
