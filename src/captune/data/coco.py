"""The COCO 2014 layout: ``annotations/captions_{split}2014.json`` and ``{split}2014/*.jpg``."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captune.console import say, some
from captune.data.annotations import read_annotations
from captune.data.mapped import mapped
from captune.data.table import CaptionTable, file_key, files_present
from captune.errors import CaptuneError, nearest

KARPATHY = ("karpathy-train", "karpathy-val", "karpathy-test")


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
        have = set(self._read("val").file_keys())
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
            found = self._karpathy_train()
        elif split in KARPATHY:
            found = self._karpathy_held_out(split.removeprefix("karpathy-"))
        else:
            found = self._read(split)
        return CaptionTable.from_columns(found.images, found.captions, self.name, split)

    def _read(self, split: str) -> CaptionTable:
        """One annotation file as it is; images whose files are absent are left out, and counted
        aloud."""
        if split in self._cache:
            return self._cache[split]
        path = self.folder / "annotations" / f"captions_{split}2014.json"
        folder = self.folder / f"{split}2014"
        found = CaptionTable(*read_annotations(path, folder), self.name, split)
        there = np.array(files_present(found.images["path"].to_pylist()))
        absent = [found.file_name(int(row)) for row in np.flatnonzero(~there)]
        if len(absent) == len(found):
            raise CaptuneError(
                f"none of the {len(found):,} images of {path.name} lies in {folder} "
                f"(looked for {some(absent, 1)})"
            )
        if absent:
            say(f"{self.name} {split}: {len(absent):,} of {len(found):,} images are not there")
            found = _without(set(absent), found)
        self._cache[split] = CaptionTable(
            mapped(found.images), mapped(found.captions), self.name, split
        )
        return self._cache[split]

    @cached_property
    def _cache(self) -> dict[str, CaptionTable]:
        return {}

    def _karpathy_train(self) -> CaptionTable:
        """train2014 and what the held-out splits leave of val2014: 113,287 images."""
        train, val = self._read("train"), self._read("val")
        ids = karpathy_ids()
        held_out = {_val_name(i) for key in ("val", "test") for i in ids[key]}
        self._refuse_incomplete("karpathy-train", held_out, val)
        names = val.images["file_name"].to_pylist()
        rest = _without({name for name in names if file_key(name) in held_out}, val)
        place = rest.captions.schema.get_field_index("image")
        moved = rest.captions.set_column(
            place, "image", pa.array(rest.image_of_caption + len(train))
        )
        return CaptionTable(
            pa.concat_tables([train.images, rest.images]),
            pa.concat_tables([train.captions, moved]),
            self.name,
            "karpathy-train",
        )

    def _karpathy_held_out(self, part: str) -> CaptionTable:
        """The 5,000 images of ``val`` or ``test``, in the published order; all must be there."""
        ids = karpathy_ids()
        names = [_val_name(i) for i in ids[part]]
        val = self._read("val")
        self._refuse_incomplete(f"karpathy-{part}", set(names), val)
        row_of_name = {key: row for row, key in enumerate(val.file_keys())}
        chosen = val.take_images([row_of_name[name] for name in names])
        if part != "test":
            return chosen
        place = {int(i): row for row, i in enumerate(chosen.caption_ids)}
        missing = [str(i) for i in ids["test_captions"] if int(i) not in place]
        if missing:
            raise CaptuneError(
                f"karpathy-test needs 25,000 captions of COCO 2014; {self.folder} lacks "
                f"{len(missing):,} (ids {some(missing)})"
            )
        scored = pa.array([place[int(i)] for i in ids["test_captions"]])
        return CaptionTable(chosen.images, chosen.captions.take(scored), self.name, chosen.split)

    def _refuse_incomplete(self, split: str, names: set[str], have: CaptionTable) -> None:
        missing = sorted(names - set(have.file_keys()))
        if missing:
            raise CaptuneError(
                f"{split} needs all of COCO's val2014; {self.folder} lacks {len(missing):,} of "
                f"{len(names):,} images ({some(missing)}); use --split val for a sample"
            )


def _val_name(image_id: int) -> str:
    return f"COCO_val2014_{image_id:012d}.jpg"


def _without(names: Collection[str], table: CaptionTable) -> CaptionTable:
    """Images and captions less those of the named files, rows renumbered."""
    kept = [name not in names for name in table.images["file_name"].to_pylist()]
    return table.take_images(np.flatnonzero(kept))
