"""Photos resized once into the shards of a pack: resumable, checked, in bounded memory."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from captune.console import say, some
from captune.data.objects import instance_files
from captune.data.packed import (
    COCO,
    MANIFEST,
    TABLE,
    Manifest,
    PackedFile,
    is_pack,
    write_tables,
)
from captune.data.shards import BATCH, ShardRow, photo_address, photo_file, write_shard
from captune.data.sources import Source, is_of_table, open_source
from captune.data.table import CaptionTable
from captune.data.tabular import TableOptions
from captune.download.disk import check_room, full_disk_is_an_error, gigabytes, shrunk_bytes
from captune.download.pack_plan import Job, planned, rows_of_shard
from captune.download.photos import (
    QUALITY,
    bounded,
    check_side,
    packed_photo,
    remove_stale,
    workers,
)
from captune.download.record import alone_in
from captune.errors import CaptuneError
from captune.files import replacing

SIDE = 256
USUAL_SPLITS = ("train", "val", "test")


def pack(
    data: str | Path,
    out: str | Path,
    *,
    side: int = SIDE,
    quality: int = QUALITY,
    splits: Sequence[str] | None = None,
    options: TableOptions | None = None,
) -> str:
    """Pack the photos of some splits, each photo once, and every split that they make up.

    A photo is decoded as training decodes it, its shorter side brought to ``side`` (bicubic,
    antialiased) and kept as JPEG. A smaller one is not enlarged, and a JPEG that is small enough
    stays as it is, byte by byte. One that cannot be read is named and has no bytes in its shard:
    its captions stay, so that a split is the same one as before. Stopped, the same call goes on
    with the shards that are whole.

    Args:
        splits: default those of ``train``, ``val`` and ``test`` that the data has.
        options: how an own table is read.

    Returns:
        What lies in the pack, a line.

    Raises:
        CaptuneError: wrong data or values, no photo that can be read, no room, or a folder that
            holds something else.
    """
    check_side(side, "--side")
    if not 1 <= quality <= 100:
        raise CaptuneError(f"--quality {quality}: give 1 to 100")
    folder = Path(out).expanduser()
    # Absolute, so that the same data is the same from any folder.
    source = open_source(Path(data).expanduser().absolute(), (options or TableOptions()).resolved())
    asked = list(splits or [name for name in USUAL_SPLITS if name in source.splits])
    if not asked:
        raise CaptuneError(
            f"{data} has none of the splits {', '.join(USUAL_SPLITS)}: name some of "
            f"{', '.join(source.splits)} with --splits"
        )
    tables = {split: _named(source.table(split)) for split in asked}
    with alone_in(folder, "pack"), full_disk_is_an_error(folder):
        packing = _Packing(folder, source, tables, side, quality)
        packing.begin()
        packing.write_shards()
        packing.finish()
    return describe(folder, packing.manifest)


def describe(folder: Path, manifest: Manifest) -> str:
    """``data/pack: 140 photos in 2 shards, 3.1 MB (side 256, quality 90)``."""
    shards = [file for group in manifest.shards.values() for file in group]
    left_out = len(manifest.unreadable())
    photos = sum(file.rows for file in shards) - left_out
    return (
        f"{folder}: {photos:,} photos in {len(shards):,} shards, "
        f"{gigabytes(sum(file.bytes for file in shards))} (side {manifest.side}, quality "
        f"{manifest.quality}{f', {left_out:,} unreadable left out' if left_out else ''})"
    )


class _Packing:
    """One pack on its way to ``folder``."""

    def __init__(
        self,
        folder: Path,
        source: Source,
        tables: dict[str, CaptionTable],
        side: int,
        quality: int,
    ) -> None:
        self.folder = folder
        self.source = source
        self.tables = tables
        self.manifest = Manifest(
            name=source.name,
            layout=TABLE if is_of_table(source) else COCO,
            side=side,
            quality=quality,
            source=_digest(tables),
            shards={split: [] for split in tables},
        )
        self.plan = planned(tables, rows_of_shard(side))
        self.done: dict[str, PackedFile] = {}

    def begin(self) -> None:
        """Take over what an earlier run left whole, and see whether the rest has room.

        Raises:
            CaptuneError: the folder holds another pack or other files, or the disk is too small.
        """
        if is_pack(self.folder):
            found = Manifest.read(self.folder)
            self._refuse_another(found)
            rows = {name: len(jobs) for group in self.plan.values() for name, jobs in group}
            listed = [file for group in found.shards.values() for file in group]
            whole = [f for f in listed if f.is_whole(self.folder) and rows.get(f.file) == f.rows]
            self.done = {file.file: file for file in whole}
        elif any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise CaptuneError(
                f"{self.folder} is not empty and holds no {MANIFEST}: give another folder with "
                "--out"
            )
        remove_stale(self.folder)
        check_room(self.folder, self._needed())

    def write_shards(self) -> None:
        """Write the shards that are not there, each recorded once it is whole."""
        self._record()
        total = sum(len(jobs) for group in self.plan.values() for _, jobs in group)
        there = sum(file.rows for file in self.done.values())
        with tqdm(total=total, initial=there, unit="image", desc="packing photos") as bar:
            for name, jobs in self._missing():
                self.done[name] = self._write(name, jobs, bar)
                self._record()

    def finish(self) -> None:
        """Write the tables of all splits that the photos make up, and call the pack complete."""
        unreadable = self.manifest.unreadable()
        if len(unreadable) == sum(file.rows for file in self.done.values()):
            raise CaptuneError(
                f"none of the {len(unreadable):,} photos of {self.source.name} can be read, such "
                f"as {unreadable[0]}"
            )
        if unreadable:
            say(
                f"{len(unreadable):,} unreadable photos left out: {some(unreadable)} (all are in "
                f"{self.folder / MANIFEST})"
            )
        address = {
            str(job.path): photo_address(name, row)
            for group in self.plan.values()
            for name, jobs in group
            for row, job in enumerate(jobs)
        }
        for split, table in {**self.tables, **self._made_up(set(address))}.items():
            addresses = [address[path] for path in table.images["path"].to_pylist()]
            self.manifest.tables[split] = write_tables(self.folder, table, addresses)
        self._copy_annotations()
        source = self.source
        self.manifest.usual = {
            "train": source.train_split,
            "val": source.val_split,
            "evaluation": source.evaluation_split,
        }
        self.manifest.complete = True
        self.manifest.write(self.folder)

    def _refuse_another(self, found: Manifest) -> None:
        mine = self.manifest
        rows = [
            ("data", found.name, mine.name),
            ("side", found.side, mine.side),
            ("quality", found.quality, mine.quality),
            ("splits", " ".join(found.shards), " ".join(mine.shards)),
        ]
        differing = [f"{key} {old} -> {new}" for key, old, new in rows if old != new]
        if not differing and found.source != mine.source:
            differing = ["captions or photos were changed or moved since"]
        if differing:
            raise CaptuneError(
                f"{self.folder} holds another pack ({', '.join(differing)}): give another folder "
                "with --out"
            )

    def _missing(self) -> list[tuple[str, list[Job]]]:
        every = [shard for group in self.plan.values() for shard in group]
        return [(name, jobs) for name, jobs in every if name not in self.done]

    def _needed(self) -> int:
        """About how many bytes the missing shards will take."""
        files = [photo_file(job.path) for _, jobs in self._missing() for job in jobs]
        originals = sum(file.stat().st_size for file in set(files))  # a shard holds many
        # The estimate is for the usual quality; above it a photo may come near its first size.
        finer = self.manifest.quality > QUALITY
        return originals if finer else shrunk_bytes(len(files), originals, self.manifest.side)

    def _record(self) -> None:
        for split, group in self.plan.items():
            self.manifest.shards[split] = [self.done[n] for n, _ in group if n in self.done]
        self.manifest.write(self.folder)

    def _write(self, name: str, jobs: list[Job], bar: tqdm[None]) -> PackedFile:
        """One shard, decoded in several threads, a batch of rows at a time."""
        side, quality = self.manifest.side, self.manifest.quality
        unreadable: list[str] = []

        def prepare(numbered: tuple[int, Job]) -> tuple[int, ShardRow, str]:
            row, job = numbered
            try:
                content, width, height = packed_photo(job.path, side, quality)
            except MemoryError:  # says nothing about the photo: another run would read it
                raise
            # Pillow's decoders raise far more than OSError (SyntaxError, ValueError, …).
            except Exception as error:
                bare = ShardRow(job.image_id, job.file_name, 0, 0, b"")
                return row, bare, f"{job.file_name}: {error}"
            return row, ShardRow(job.image_id, job.file_name, width, height, content), ""

        def batches() -> Iterator[list[ShardRow]]:
            for start in range(0, len(jobs), BATCH):
                found = []
                for one in bounded(
                    prepare, enumerate(jobs[start : start + BATCH]), threads=workers()
                ):
                    found.append(one)
                    bar.update()
                found.sort(key=lambda item: item[0])
                unreadable.extend(fault for _, _, fault in found if fault)
                yield [row for _, row, _ in found]

        write_shard(self.folder / name, batches())
        return PackedFile.of(self.folder / name, len(jobs), unreadable)

    def _made_up(self, packed: set[str]) -> dict[str, CaptionTable]:
        """The other splits of the source, such as Karpathy's, whose photos are all packed."""
        found = {}
        for split in self.source.splits:
            if split in self.tables:
                continue
            try:
                table = _named(self.source.table(split))
            except CaptuneError:  # not complete, or empty: nobody asked for it
                continue
            if packed.issuperset(table.images["path"].to_pylist()):
                found[split] = table
        return found

    def _copy_annotations(self) -> None:
        """COCO's instance annotations, where they lie beside the photos."""
        if self.manifest.layout != COCO:
            return
        paths = {path for table in self.tables.values() for path in instance_files(table)}
        for path in sorted(paths):
            target = self.folder / "annotations" / path.name
            with replacing(target) as temporary:
                shutil.copyfile(path, temporary)
            self.manifest.annotations.append(PackedFile.of(target, 0))


def _named(table: CaptionTable) -> CaptionTable:
    """Refuse a split whose name is none for a file."""
    if not re.fullmatch(r"[\w.-]+", table.split):
        raise CaptuneError(
            f"the split {table.split!r} cannot be packed, for files are named after it: give it a "
            "name of letters, digits and hyphens"
        )
    return table


def _digest(tables: dict[str, CaptionTable]) -> str:
    """Tells whether captions, or photos by their sizes and times, are the same as before."""
    state = hashlib.blake2b(digest_size=16)
    for split, table in tables.items():
        state.update(f"{split}\0{table.digest}\0{table.files_digest()}\0".encode())
    return state.hexdigest()
