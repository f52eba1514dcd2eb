"""A pack: photos resized once and kept in shards, with the captions of every split beside them.

``pack.json`` lists the files; ``train-00000.arrow`` and so on hold photos (:mod:`shards`), and
``train-images.arrow`` and ``train-captions.arrow`` the two tables of a split, where each photo has
its address in place of a path. So a split is read back as its source gave it.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captune.data.mapped import mapped
from captune.data.table import CaptionTable
from captune.errors import CaptuneError, nearest
from captune.files import read_versioned, replacing, write_json

VERSION = 1
MANIFEST = "pack.json"
COCO, TABLE = "coco", "table"


@dataclass(frozen=True)
class PackedFile:
    """A file of a pack; ``unreadable`` names the photos that a shard has no bytes of, and why."""

    file: str
    rows: int
    bytes: int
    digest: str
    unreadable: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path, rows: int, unreadable: list[str] | None = None) -> PackedFile:
        """What lies at ``path`` now."""
        return cls(path.name, rows, path.stat().st_size, _digest(path), unreadable or [])

    def is_whole(self, folder: Path) -> bool:
        """Whether it is there in its full size."""
        path = folder / self.file
        return path.is_file() and path.stat().st_size == self.bytes


@dataclass
class Manifest:
    """``pack.json``.

    Attributes:
        name: of the data, as its source has it.
        layout: of the source, ``coco`` or ``table``.
        side: the shorter side of the photos in pixels, where they were larger.
        quality: of the JPEGs that were made.
        source: a digest of the splits asked for and of their photos' files.
        shards: of each split asked for, in order.
        tables: of each split, its images and its captions.
        annotations: COCO's instances, in ``annotations/``.
        usual: the splits to train, validate and evaluate on by default.
        complete: False while photos are missing.
    """

    name: str
    layout: str
    side: int
    quality: int
    source: str
    shards: dict[str, list[PackedFile]]
    tables: dict[str, list[PackedFile]] = field(default_factory=dict)
    annotations: list[PackedFile] = field(default_factory=list)
    usual: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    def write(self, folder: Path) -> None:
        """Put it on disk."""
        write_json(folder / MANIFEST, {"format_version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in ``folder``.

        Raises:
            CaptuneError: there is none, of another version, or damaged.
        """
        content = read_versioned(folder / MANIFEST, what="pack", version=VERSION)
        del content["format_version"]
        try:
            for group in ("shards", "tables"):
                content[group] = {split: _files(value) for split, value in content[group].items()}
            content["annotations"] = _files(content["annotations"])
            found = cls(**{spec.name: content.pop(spec.name) for spec in fields(cls)}, **content)
            if found.complete:
                missing = {"train", "val", "evaluation"} - set(found.usual)
                if missing:
                    raise KeyError(*sorted(missing))
            for _, file in found.files():
                if Path(file.file).name != file.file:
                    raise ValueError(f"{file.file!r} is no name of a file in it")
            return found
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CaptuneError(
                f"{folder / MANIFEST} is damaged ({error}): make the pack anew in another folder"
            ) from None

    def files(self) -> list[tuple[Path, PackedFile]]:
        """Every file, with the folder below the pack's that it lies in."""
        groups = [*self.shards.values(), *self.tables.values()]
        found = [(Path(), file) for group in groups for file in group]
        return found + [(Path("annotations"), file) for file in self.annotations]

    def unreadable(self) -> list[str]:
        """The photos that were left out."""
        return [
            name for group in self.shards.values() for file in group for name in file.unreadable
        ]


def _files(listed: list[dict[str, Any]]) -> list[PackedFile]:
    return [PackedFile(**entry) for entry in listed]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def is_pack(folder: Path) -> bool:
    """Whether a pack lies in ``folder``, complete or not."""
    return (folder / MANIFEST).is_file()


class PackedSource:
    """A folder that ``captune data pack`` made.

    Raises:
        CaptuneError: it is not complete, of another version, or a file of it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.name = self.manifest.name
        if not self.manifest.complete:
            raise CaptuneError(
                f"the pack in {folder} is not complete: the `captune data pack` that began it "
                "goes on where it stopped"
            )
        for below, file in self.manifest.files():
            if not file.is_whole(folder / below):
                raise damaged(folder / below / file.file)

    @property
    def splits(self) -> list[str]:
        """The names that :meth:`table` takes here."""
        return list(self.manifest.tables)

    @property
    def train_split(self) -> str:
        """What to train on by default."""
        return self.manifest.usual["train"]

    @property
    def val_split(self) -> str:
        """What to validate and select on by default."""
        return self.manifest.usual["val"]

    @property
    def evaluation_split(self) -> str:
        """What ``evaluate`` takes by default."""
        return self.manifest.usual["evaluation"]

    def table(self, split: str) -> CaptionTable:
        """The captions of a split.

        Raises:
            CaptuneError: unknown split, or damaged tables.
        """
        if split not in self.splits:
            raise CaptuneError(
                f"no split {split!r} in the pack {self.folder}{nearest(split, self.splits)}"
            )
        images, captions = (self._read(file) for file in self.manifest.tables[split])
        place = images.schema.get_field_index("path")
        own = pc.match_substring_regex(images["path"], r"^[\w.-]+\.arrow::\d+$")
        if not pc.all(own).as_py():  # a pack of somebody else's shall name no other file
            raise damaged(self.folder / self.manifest.tables[split][0].file)
        paths = pc.binary_join_element_wise(str(self.folder), images["path"], "/")
        images = mapped(images.set_column(place, "path", paths))
        return CaptionTable(images, captions, name=self.name, split=split)

    def _read(self, file: PackedFile) -> pa.Table:
        path = self.folder / file.file
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
                table = reader.read_all()
            table.validate(full=True)
            return table
        except pa.ArrowException:
            raise damaged(path) from None


def write_tables(folder: Path, table: CaptionTable, addresses: list[str]) -> list[PackedFile]:
    """Write the images and the captions of a split.

    Args:
        addresses: ``N``, where each photo lies, seen from ``folder``.
    """
    place = table.images.schema.get_field_index("path")
    images = table.images.set_column(place, "path", pa.array(addresses, pa.string()))
    written = []
    for what, rows in (("images", images), ("captions", table.captions)):
        path = folder / f"{table.split}-{what}.arrow"
        with (
            replacing(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, rows.schema) as writer,
        ):
            writer.write_table(rows)
        written.append(PackedFile.of(path, rows.num_rows))
    return written


def check_pack(folder: Path) -> Manifest:
    """Compare every file of a complete pack with its digest.

    Raises:
        CaptuneError: no pack is there, it is not complete, or a file is damaged.
    """
    if not is_pack(folder):
        raise CaptuneError(f"no pack in {folder} (no {MANIFEST}): name a folder made by --out")
    manifest = PackedSource(folder).manifest
    for below, file in manifest.files():
        path = folder / below / file.file
        if _digest(path) != file.digest:
            raise damaged(path)
    return manifest


def damaged(path: Path) -> CaptuneError:
    """A file of a pack that is not as it was written."""
    return CaptuneError(
        f"{path} is {'damaged' if path.is_file() else 'not there'}: delete what is left of it and "
        "run the `captune data pack` that made it again, which makes this file anew; or copy it "
        "again"
    )
