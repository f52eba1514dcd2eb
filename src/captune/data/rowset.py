"""Rows of an own table gathered into columns: millions take megabytes, not gigabytes."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captune.data.mapped import mapped
from captune.data.table import Rows

CHUNK = 65_536  # captions that are Python strings at a time


@dataclass(frozen=True, eq=False)
class RowSet:
    """R rows, each of an image, with M captions and perhaps the name of a split.

    Attributes:
        images: the distinct images, in the order in which they first stand.
        image_of_row: ``(R,)`` places in ``images``.
        splits: the distinct names of splits, ``""`` where a row has none.
        split_of_row: ``(R,)`` places in ``splits``.
        captions: ``(M,)`` strings, without the space around them.
        row_of_caption: ``(M,)``.
    """

    images: list[str]
    image_of_row: Rows
    splits: list[str]
    split_of_row: Rows
    captions: pa.ChunkedArray
    row_of_caption: Rows

    @classmethod
    def gather(cls, rows: Iterable[tuple[str, list[str], str]]) -> RowSet:
        """From rows of image, captions and split."""
        images: dict[str, int] = {}
        splits: dict[str, int] = {}
        image_of_row, split_of_row, row_of_caption = array("q"), array("q"), array("q")
        chunks: list[pa.Array] = []
        texts: list[str] = []
        for row, (image, captions, split) in enumerate(rows):
            image_of_row.append(images.setdefault(image, len(images)))
            split_of_row.append(splits.setdefault(split, len(splits)))
            texts += [caption.strip() for caption in captions]
            row_of_caption.extend([row] * len(captions))
            if len(texts) >= CHUNK:
                chunks.append(pa.array(texts, pa.string()))
                texts = []
        chunks.append(pa.array(texts, pa.string()))
        return cls(
            list(images),
            _whole(image_of_row),
            list(splits),
            _whole(split_of_row),
            mapped(pa.table({"caption": pa.chunked_array(chunks)}))["caption"],
            _whole(row_of_caption),
        )

    def __len__(self) -> int:
        return len(self.image_of_row)

    def of_split(self, split: str) -> npt.NDArray[np.bool_]:
        """``(R,)``: the rows that name ``split``."""
        if split not in self.splits:
            return np.zeros(len(self), dtype=np.bool_)
        return np.equal(self.split_of_row, self.splits.index(split))

    def chosen(self, keep: npt.NDArray[np.bool_]) -> tuple[Rows, pa.ChunkedArray, Rows]:
        """The images of the rows ``keep (R,)``, by their places and in the order in which they
        first stand there; these rows' captions; and the place of each one's image among them."""
        of_kept = self.image_of_row[keep]
        images, first = np.unique(of_kept, return_index=True)
        order = np.argsort(first, kind="stable")
        place = np.full(len(self.images), -1, dtype=np.int64)
        place[images[order]] = np.arange(len(images))
        mine = keep[self.row_of_caption]
        owner = place[self.image_of_row[self.row_of_caption[mine]]]
        return images[order], self.captions.filter(pa.array(mine)), owner


def _whole(values: array[int]) -> Rows:
    return np.frombuffer(values, dtype=np.int64) if values else np.zeros(0, dtype=np.int64)
