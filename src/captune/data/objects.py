"""Objects in COCO's pictures: ``annotations/instances_{split}2014.json`` beside the captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from captune.data.shards import shard_of
from captune.data.table import CaptionTable, Rows
from captune.errors import CaptuneError
from captune.files import read_json

# A picture is of one class where its largest object fills this share of it, and is this many times
# as large as the largest object of any other class.
LEAST_SHARE, LEAST_RATIO = 0.05, 2.0


@dataclass(frozen=True, eq=False)
class Objects:
    """What is to be seen in the N pictures of a table, of C classes.

    Attributes:
        classes: C names, in the order of COCO's category ids.
        counts: ``(N, C)`` objects, a crowd counting as one.
        largest: ``(N, C)`` area of the largest object in shares of the picture, crowds left out.
    """

    classes: list[str]
    counts: npt.NDArray[np.int64]
    largest: npt.NDArray[np.float64]

    def dominant(self) -> Rows:
        """``(N,)``: the class of the object that dominates its picture, -1 where none does."""
        best = self.largest.argmax(axis=1)
        rows = np.arange(len(best))
        others = self.largest.copy()
        others[rows, best] = 0.0
        size = self.largest[rows, best]
        clear = (size >= LEAST_SHARE) & (size >= LEAST_RATIO * others.max(axis=1))
        return np.where(clear, best, -1).astype(np.int64)


def instance_files(table: CaptionTable) -> list[Path]:
    """The instance annotations that lie beside the table's pictures; empty where there are none.

    Pictures in ``val2014/`` have theirs in ``annotations/instances_val2014.json``, and those in a
    shard of the split ``val`` too.
    """
    paths = [Path(path) for path in table.images["path"].to_pylist()]
    shards = {found[0] for found in map(shard_of, paths) if found}
    files = {path for shard in shards for path in _beside(shard)}
    for folder in {path.parent for path in paths if not shard_of(path)}:
        files.add(folder.parent / "annotations" / f"instances_{folder.name}.json")
    return sorted(path for path in files if path.is_file())


def _beside(shard: Path) -> list[Path]:
    """Where the instance annotations of a shard's pictures would be."""
    split = shard.name.rpartition("-")[0]
    parts = {
        "karpathy-train": ("train", "val"),
        "karpathy-val": ("val",),
        "karpathy-test": ("val",),
    }
    folder = shard.parent / "annotations"
    return [folder / f"instances_{part}2014.json" for part in parts.get(split, (split,))]


def read_objects(table: CaptionTable) -> Objects:
    """The objects of all pictures of ``table``, matched by image id.

    Raises:
        CaptuneError: no instance annotations, malformed ones, or pictures that they do not list.
    """
    files = instance_files(table)
    if not files:
        raise CaptuneError(
            f"{table.describe()} has no annotations/instances_*2014.json beside its pictures: "
            "fetch COCO's instance annotations, or give a folder with a folder for each class"
        )
    row_of_id = {int(image): row for row, image in enumerate(table.image_ids)}
    contents = [_read(path) for path in files]
    names = dict(pair for _, categories, _ in contents for pair in categories.items())
    column = {category: place for place, category in enumerate(sorted(names))}
    counts = np.zeros((len(table), len(column)), dtype=np.int64)
    largest = np.zeros((len(table), len(column)))
    listed: set[int] = set()
    for path, (sizes, _, found) in zip(files, contents, strict=True):
        listed |= set(sizes)
        for image, category, area, crowd in found:
            if image not in sizes or category not in column:
                raise CaptuneError(
                    f"{path}: an object of category {category} in image {image}, which its "
                    "'images' or 'categories' does not list"
                )
            row = row_of_id.get(image)
            if row is None:
                continue
            counts[row, column[category]] += 1
            if not crowd:
                share = area / sizes[image]
                largest[row, column[category]] = max(largest[row, column[category]], share)
    unknown = len(row_of_id.keys() - listed)
    if unknown:
        raise CaptuneError(
            f"{', '.join(path.name for path in files)} does not list {unknown:,} of the images of "
            f"{table.describe()}: it is of other data"
        )
    return Objects([names[category] for category in sorted(names)], counts, largest)


_Content = tuple[dict[int, float], dict[int, str], list[tuple[int, int, float, bool]]]


def _read(path: Path) -> _Content:
    """Of one file: pixels of each image, names of categories, and ``(image, category, area,
    crowd)`` of each object."""
    content: Any = read_json(path, what="instance annotations")
    try:
        sizes = {int(i["id"]): float(i["width"]) * float(i["height"]) for i in content["images"]}
        names = {int(c["id"]): str(c["name"]) for c in content["categories"]}
        found = [
            (
                int(entry["image_id"]),
                int(entry["category_id"]),
                float(entry["area"]),
                bool(entry.get("iscrowd", 0)),
            )
            for entry in content["annotations"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise CaptuneError(f"{path} is not a COCO instances file: {error!r} in an entry") from None
    if not names or min(sizes.values(), default=0.0) <= 0:
        raise CaptuneError(f"{path} is not a COCO instances file: no categories, or empty images")
    return sizes, names, found
