"""Zip archives unpacked while they stream: every entry is checked before one byte is written."""

from __future__ import annotations

import io
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from tqdm.auto import tqdm

from captune.download.disk import full_disk_is_an_error, gigabytes
from captune.download.http import RemoteFile
from captune.download.photos import bounded, shrunk_or_same, sizes, workers, write_photo
from captune.download.stumbling import PATIENCE, Patience
from captune.errors import CaptuneError

T = TypeVar("T")

LARGEST_PHOTO = 64 << 20  # bytes unpacked; COCO's largest is below 1 MB
LARGEST_TABLE = 4 << 30  # COCO's largest annotation file has half a gigabyte
# COCO's largest archive lists 82,783 entries in 8 MB; the list is read whole, and each takes a
# kilobyte of memory.
_LARGEST_LIST, MOST_ENTRIES = 128 << 20, 500_000
_BUFFER = 1 << 20
_PIECE = 1 << 20
# Photos pack 1:1 and annotations 5:1; what claims far more than that is a bomb. The second number
# spares small archives, where the ratio says little.
_LARGEST_RATIO, _HARMLESS = 30, 100 << 20
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BROKEN = (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error, zlib.error)


@dataclass(frozen=True)
class Wanted:
    """An entry to unpack, and where to."""

    info: zipfile.ZipInfo
    path: Path


class _Bounded(io.BufferedReader):
    """Refuses to read at once what no honest list of entries takes: zipfile reads it whole."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGEST_LIST:
            raise zipfile.BadZipFile(f"its list of entries claims {gigabytes(size)}")
        content = super().read(size)
        if len(content) > _PIECE and content.count(b"PK\x01\x02") > MOST_ENTRIES:
            raise zipfile.BadZipFile(f"it lists more than {MOST_ENTRIES:,} entries")
        return content


class Archive:
    """A zip archive on a web server or on disk; its list of entries is read, and all are checked.

    Attributes:
        name: its address or path.
        length: bytes.
        entries: files (no folders), in the order in which they lie in the archive.

    Raises:
        CaptuneError: no zip archive or a truncated one; an entry that would land outside the
            folder it is unpacked to, a link, an encrypted one, a claim of absurd size, two that
            share a name or bytes. As :class:`RemoteFile` besides.
    """

    def __init__(
        self, source: str | Path, *, largest: int = LARGEST_PHOTO, patience: Patience = PATIENCE
    ) -> None:
        self.name = str(source)
        raw = (
            RemoteFile(source, patience=patience)
            if isinstance(source, str)
            else source.open("rb", buffering=0)
        )
        self._file = _Bounded(raw, _BUFFER)
        try:
            self.length = self._file.seek(0, io.SEEK_END)
            self._zip = self._open()
            files = [info for info in self._zip.infolist() if not info.is_dir()]
            self.entries = sorted(files, key=lambda info: info.header_offset)
            self._check(largest)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()
        self._file.close()

    def wanted(self, place: Callable[[str], Path | None]) -> list[Wanted]:
        """The entries that ``place`` gives a path, each path once, in the archive's order.

        Raises:
            CaptuneError: two entries that differ would land in one file.
        """
        chosen: dict[str, Wanted] = {}
        for info in self.entries:
            path = place(info.filename)
            if path is None:
                continue
            # Some file systems take A.jpg and a.jpg for the same file.
            first = chosen.setdefault(str(path).casefold(), Wanted(info, path)).info
            if (first.CRC, first.file_size) != (info.CRC, info.file_size):
                raise CaptuneError(
                    f"{self.name} holds two different entries for {path.name}: "
                    f"{first.filename!r} and {info.filename!r}; nothing was unpacked"
                )
        return list(chosen.values())

    def fetch(self, info: zipfile.ZipInfo, take: Callable[[Iterable[bytes]], T]) -> T:
        """What ``take`` makes of an entry's bytes; their CRC-32 is checked behind the last.

        A damaged entry is read once more: ``take`` may be called twice.

        Raises:
            CaptuneError: it is damaged again.
        """
        try:
            return take(self._pieces(info))
        except _BROKEN:
            # The damage may have come on the way: the bytes in the buffer are not to be reused.
            self._file.seek(0, io.SEEK_END)
        try:
            return take(self._pieces(info))
        except _BROKEN as error:
            raise CaptuneError(
                f"{self.name}: the entry {info.filename!r} is damaged ({error}), read twice; "
                "run the same command again, or fetch from another address with --source"
            ) from None

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self._file)
        except _BROKEN as error:
            raise CaptuneError(
                f"{self.name} ({self.length:,} bytes) is no whole zip archive: {error}"
            ) from None

    def _pieces(self, info: zipfile.ZipInfo) -> Iterator[bytes]:
        count = 0
        with self._zip.open(info) as file:
            while piece := file.read(_PIECE):
                count += len(piece)
                yield piece
        if count != info.file_size:
            raise zipfile.BadZipFile(f"{count:,} bytes in place of {info.file_size:,}")

    def _check(self, largest: int) -> None:
        faults = ((info, _fault(info, largest)) for info in self._zip.infolist())
        for info, fault in faults:
            if fault:
                raise CaptuneError(
                    f"{self.name} holds an entry {info.orig_filename!r} that {fault}: "
                    "it is not trusted, nothing was unpacked"
                )
        end = 0
        for info in self.entries:
            if info.header_offset < end:
                raise CaptuneError(
                    f"{self.name}: the entry {info.filename!r} shares bytes with another: "
                    "it is not trusted, nothing was unpacked"
                )
            end = info.header_offset + info.compress_size
            if end > self.length:
                raise CaptuneError(
                    f"{self.name}: the entry {info.filename!r} lies beyond its end: "
                    "it is not trusted, nothing was unpacked"
                )
        total = sum(info.file_size for info in self.entries)
        if total > _LARGEST_RATIO * self.length + _HARMLESS:
            raise CaptuneError(
                f"{self.name} ({gigabytes(self.length)}) claims to hold {gigabytes(total)}: "
                "it is not trusted, nothing was unpacked"
            )


def _fault(info: zipfile.ZipInfo, largest: int) -> str:
    """What makes an entry one that no honest archive of photos holds; ``""`` for none."""
    name = info.orig_filename
    kind = stat.S_IFMT(info.external_attr >> 16)
    if "\0" in name or "\\" in name or not name:
        return "has no proper name"
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "has an absolute path"
    if ".." in PurePosixPath(name).parts:
        return "would land outside the folder"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if info.flag_bits & 1 or info.compress_type not in _METHODS:
        return "is encrypted or packed in an unusual way"
    if info.file_size > largest:
        return f"claims {gigabytes(info.file_size)}"
    return ""


def missing(wanted: Iterable[Wanted], *, shrink: int | None) -> list[Wanted]:
    """What is not on disk: a file counts with the entry's size, shrunk ones unless empty."""
    wanted = list(wanted)
    there = {folder: sizes(folder) for folder in {item.path.parent for item in wanted}}

    def is_there(item: Wanted) -> bool:
        size = there[item.path.parent].get(item.path.name, 0)
        return size > 0 if shrink else size == item.info.file_size

    return [item for item in wanted if not is_there(item)]


def unpack_photos(archive: Archive, wanted: list[Wanted], *, shrink: int | None) -> None:
    """Write the photos that are not on disk yet, shrunk to ``shrink`` pixels if it is given.

    Photos are read in the archive's order while threads shrink and write those before; the
    archive itself never lies on the disk.

    Raises:
        CaptuneError: as :meth:`Archive.fetch`, or the disk is full.
    """
    todo = missing(wanted, shrink=shrink)
    if not todo:
        return
    folders = {item.path.parent for item in todo}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    total, left = (sum(item.info.file_size for item in items) for items in (wanted, todo))

    def write_shrunk(job: tuple[Wanted, bytes]) -> int:
        item, content = job
        assert shrink is not None
        write_photo(item.path, [shrunk_or_same(content, shrink, item.path.name)])
        return item.info.file_size

    def write_same(item: Wanted) -> int:
        archive.fetch(item.info, lambda pieces: write_photo(item.path, pieces))
        return item.info.file_size

    if shrink:
        fetched = ((item, archive.fetch(item.info, b"".join)) for item in todo)
        written: Iterator[int] = bounded(write_shrunk, fetched, threads=workers())
    else:
        written = map(write_same, todo)
    title = ", ".join(sorted(folder.name for folder in folders))
    with (
        full_disk_is_an_error(next(iter(folders))),
        tqdm(total=total, initial=total - left, unit="B", unit_scale=True, desc=title) as bar,
    ):
        for size in written:
            bar.update(size)
