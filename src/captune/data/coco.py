"""The COCO 2014 layout: ``annotations/captions_{split}2014.json`` and ``{split}2014/*.jpg``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from captune.console import say, some
from captune.data.table import CaptionTable, file_key, files_present
from captune.errors import CaptuneError, nearest
from captune.files import read_json

KARPATHY = ("karpathy-train", "karpathy-val", "karpathy-test")

ImageRow = tuple[int, str, Path]
CaptionRow = tuple[int, str, int]


def karpathy_ids() -> dict[str, npt.NDArray[np.int32]]:
    """Karpathy and Fei-Fei (2015)'s split of COCO 2014's val images.

    ``val`` and ``test``: 5,000 image ids each; ``test_captions``: the 25,000 caption ids that the
    5K protocol scores, five for each test image, in its order.
    """
    with (
        files("captune.data").joinpath("karpathy.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        return {name: arrays[name] for name in arrays.files}


class CocoSource:
    """A folder in the COCO 2014 layout; one split alone is enough.

    Raises:
        CaptuneError: the folder holds no captions file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        found = (folder / "annotations").glob("captions_*2014.json")
        self._own = sorted(path.stem.removeprefix("captions_")[:-4] for path in found)
        if not self._own:
            raise CaptuneError(
                f"{folder} holds no annotations/captions_*2014.json: give a folder in the COCO "
                "2014 layout, or a .csv, .jsonl or .parquet table of images and captions"
            )

    @property
    def splits(self) -> list[str]:
        """The names that :meth:`table` takes here."""
        return [*self._own, *(KARPATHY if "val" in self._own else ())]

    @property
    def train_split(self) -> str:
        """What to train on by default."""
        return "train"

    @property
    def val_split(self) -> str:
        """What to validate and select on: ``karpathy-val`` where all of COCO lies, else ``val``."""
        return "karpathy-val" if self.holds_karpathy else "val"

    @property
    def evaluation_split(self) -> str:
        """What ``evaluate`` takes by default."""
        return self.val_split

    @cached_property
    def holds_karpathy(self) -> bool:
        """Whether every image of the Karpathy val and test splits lies here."""
        if "val" not in self._own:
            return False
        ids = karpathy_ids()
        images, _ = self._read("val")
        have = {file_key(name) for _, name, _ in images}
        return all(_val_name(i) in have for key in ("val", "test") for i in ids[key])

    def table(self, split: str) -> CaptionTable:
        """The captions of a split.

        Raises:
            CaptuneError: unknown split, malformed annotations, or a Karpathy split asked for by
                name that is not complete.
        """
        if split not in self.splits:
            wanted = self.folder / "annotations" / f"captions_{split}2014.json"
            raise CaptuneError(
                f"no split {split!r} in {self.folder} (no {wanted}){nearest(split, self.splits)}"
            )
        if split == "karpathy-train":
            images, captions = self._karpathy_train()
        elif split in KARPATHY:
            images, captions = self._karpathy_held_out(split.removeprefix("karpathy-"))
        else:
            images, captions = self._read(split)
        return CaptionTable.build(images, captions, name=self.name, split=split)

    def _read(self, split: str) -> tuple[list[ImageRow], list[CaptionRow]]:
        """One annotation file; images whose files are absent are left out, and counted aloud."""
        if split in self._cache:
            return self._cache[split]
        path = self.folder / "annotations" / f"captions_{split}2014.json"
        content = read_json(path, what="annotation file")
        for key in ("images", "annotations"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise CaptuneError(f"{path} has no list {key!r}: it is not a COCO captions file")
        folder = self.folder / f"{split}2014"
        images, captions = _parse(path, folder, content)
        there = files_present([str(path) for _, _, path in images])
        absent = [name for (_, name, _), found in zip(images, there, strict=True) if not found]
        if len(absent) == len(images):
            raise CaptuneError(
                f"none of the {len(images):,} images of {path.name} lies in {folder} "
                f"(looked for {some(absent, 1)})"
            )
        if absent:
            say(f"{self.name} {split}: {len(absent):,} of {len(images):,} images are not there")
            images, captions = _without(set(absent), images, captions)
        self._cache[split] = (images, captions)
        return images, captions

    @cached_property
    def _cache(self) -> dict[str, tuple[list[ImageRow], list[CaptionRow]]]:
        return {}

    def _karpathy_train(self) -> tuple[list[ImageRow], list[CaptionRow]]:
        """train2014 and what the held-out splits leave of val2014: 113,287 images."""
        images, captions = self._read("train")
        ids = karpathy_ids()
        held_out = {_val_name(i) for key in ("val", "test") for i in ids[key]}
        val_images, val_captions = self._read("val")
        self._refuse_incomplete("karpathy-train", held_out, val_images)
        names = {name for _, name, _ in val_images if file_key(name) in held_out}
        rest, rest_captions = _without(names, val_images, val_captions)
        offset = len(images)
        moved = [(i, text, row + offset) for i, text, row in rest_captions]
        return images + rest, captions + moved

    def _karpathy_held_out(self, part: str) -> tuple[list[ImageRow], list[CaptionRow]]:
        """The 5,000 images of ``val`` or ``test``, in the published order; all must be there."""
        ids = karpathy_ids()
        names = [_val_name(i) for i in ids[part]]
        images, captions = self._read("val")
        self._refuse_incomplete(f"karpathy-{part}", set(names), images)
        row_of_name = {file_key(name): row for row, (_, name, _) in enumerate(images)}
        rows = [row_of_name[name] for name in names]
        place = {row: i for i, row in enumerate(rows)}
        chosen = [(i, text, place[row]) for i, text, row in captions if row in place]
        if part == "test":
            by_id = {caption[0]: caption for caption in chosen}
            missing = [str(i) for i in ids["test_captions"] if int(i) not in by_id]
            if missing:
                raise CaptuneError(
                    f"karpathy-test needs 25,000 captions of COCO 2014; {self.folder} lacks "
                    f"{len(missing):,} (ids {some(missing)})"
                )
            chosen = [by_id[int(i)] for i in ids["test_captions"]]
        return [images[row] for row in rows], chosen

    def _refuse_incomplete(self, split: str, names: set[str], images: list[ImageRow]) -> None:
        missing = sorted(names - {file_key(name) for _, name, _ in images})
        if missing:
            raise CaptuneError(
                f"{split} needs all of COCO's val2014; {self.folder} lacks {len(missing):,} of "
                f"{len(names):,} images ({some(missing)}); use --split val for a sample"
            )


def _val_name(image_id: int) -> str:
    return f"COCO_val2014_{image_id:012d}.jpg"


def _parse(
    path: Path, folder: Path, content: dict[str, Any]
) -> tuple[list[ImageRow], list[CaptionRow]]:
    """Rows from the JSON of one annotation file."""
    try:
        images = [
            (int(entry["id"]), str(entry["file_name"]), folder / str(entry["file_name"]))
            for entry in content["images"]
        ]
        row_of_id = {image_id: row for row, (image_id, _, _) in enumerate(images)}
        captions = []
        for entry in content["annotations"]:
            row = row_of_id.get(int(entry["image_id"]))
            if row is None:
                raise CaptuneError(
                    f"{path}: caption {entry['id']} belongs to image {entry['image_id']}, "
                    "which its 'images' does not list"
                )
            captions.append((int(entry["id"]), str(entry["caption"]), row))
    except (KeyError, TypeError, ValueError) as error:
        raise CaptuneError(f"{path} is not a COCO captions file: {error!r} in an entry") from None
    if len(row_of_id) < len(images):
        raise CaptuneError(f"{path} lists {len(images) - len(row_of_id)} image ids twice")
    if not captions:
        raise CaptuneError(f"{path} holds no captions")
    return images, captions


def _without(
    names: Iterable[str], images: list[ImageRow], captions: list[CaptionRow]
) -> tuple[list[ImageRow], list[CaptionRow]]:
    """Images and captions less those of the named files, rows renumbered."""
    dropped = set(names)
    kept = [row for row, image in enumerate(images) if image[1] not in dropped]
    new_row = {row: i for i, row in enumerate(kept)}
    moved = [(i, text, new_row[row]) for i, text, row in captions if row in new_row]
    return [images[row] for row in kept], moved
