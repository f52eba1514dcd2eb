"""``download.json``: what a folder of captune's making holds, and who may write into it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from captune.download.disk import full_disk_is_an_error
from captune.download.photos import remove_stale, sizes
from captune.errors import CaptuneError
from captune.files import read_json, read_versioned, write_json

_VERSION = 1
FILE = "download.json"
LAYOUT = ("annotations", "train2014", "val2014", "test2014")


@dataclass
class Record:
    """What was asked for and what is complete.

    Attributes:
        folder: where it lies.
        data: what it is, such as ``coco-2014``.
        source: where it comes from.
        shrink: the shorter side of its photos in pixels, None where they are as they came.
        photos: photos of each complete split.
        captions: a digest of captions and splits, where they come from an own file; else ``""``.
    """

    folder: Path
    data: str
    source: str
    shrink: int | None
    photos: dict[str, int]
    captions: str = ""

    def write(self) -> None:
        """Put it on disk; from then on the folder is captune's."""
        content: dict[str, Any] = {"format_version": _VERSION, "data": self.data}
        content |= {"source": self.source, "shrink": self.shrink, "photos": self.photos}
        if self.captions:
            content["captions"] = self.captions
        write_json(self.folder / FILE, content)

    def is_complete(self, split: str) -> bool:
        """Whether the split was once complete and as many photos and its captions lie here."""
        if split not in self.photos or not captions_file(self.folder, split).is_file():
            return False
        return len(sizes(self.folder / f"{split}2014")) >= self.photos[split]

    def finish(self, split: str) -> int:
        """Check that every photo that the captions speak of lies here, and record it.

        Captions that cannot be read are removed, so that the next run gets them anew.

        Raises:
            CaptuneError: photos are absent, or the captions cannot be read.
        """
        folder = self.folder / f"{split}2014"
        path = captions_file(self.folder, split)
        try:
            listed = read_json(path, what="annotation file")["images"]
            names = {str(image["file_name"]) for image in listed}
        except (CaptuneError, KeyError, TypeError) as error:
            path.unlink(missing_ok=True)
            told = isinstance(error, CaptuneError)
            reason = error if told else f"{path} is not a COCO captions file: no list of images"
            raise CaptuneError(
                f"{reason}; it is removed: run the same command again to get it anew"
            ) from None
        absent = sorted(names - set(sizes(folder)))
        if absent:
            raise CaptuneError(
                f"{folder} lacks {len(absent):,} of the {len(names):,} photos that {path.name} "
                f"lists, such as {absent[0]}: {self.source} does not hold all of them"
            )
        self.photos = {**self.photos, split: len(names)}
        self.write()
        return len(names)


def captions_file(folder: Path, split: str) -> Path:
    """Where COCO's layout has the captions of a split."""
    return folder / "annotations" / f"captions_{split}2014.json"


@contextlib.contextmanager
def claimed(
    folder: Path, *, data: str, source: str, shrink: int | None, captions: str = ""
) -> Iterator[Record]:
    """Hold the folder for this process, and say what it holds already.

    Nothing is recorded before :meth:`Record.write`: a command that fails at once leaves the folder
    free for another.

    Raises:
        CaptuneError: another process writes here, or the folder holds something else, or photos of
            another size, or other captions; or the disk is full, also while it is held.
    """
    with alone_in(folder, "download"):
        remove_stale(folder, f"{FILE}.*")
        record = _open(Record(folder, data, source, shrink, {}, captions))
        if (folder / FILE).exists():  # else the folder is not captune's to tidy
            for place in (".", *LAYOUT, "images"):
                remove_stale(folder / place)
        with full_disk_is_an_error(folder):
            yield record


@contextlib.contextmanager
def alone_in(folder: Path, work: str) -> Iterator[None]:
    """Make the folder where it is not there, and keep other processes from the same work in it.

    Raises:
        CaptuneError: another process is at it, or the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise CaptuneError(f"{folder} is a file: give a folder to {work} into")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{work}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CaptuneError(
            f"another captune is {work}ing into {folder}: wait for it or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _open(asked: Record) -> Record:
    """What is asked for, with the splits that are complete already."""
    folder, path = asked.folder, asked.folder / FILE
    taken = [name for name in LAYOUT if sizes(folder / name)]
    if not path.exists():
        if taken:
            raise CaptuneError(
                f"{folder} holds {', '.join(taken)} but no {FILE}, so captune did not download "
                "it: choose another folder"
            )
        return asked
    found = read_versioned(path, what="record of a download", version=_VERSION)
    if found.get("data") != asked.data:
        raise CaptuneError(
            f"{folder} holds {found.get('data')!r}, asked for is {asked.data!r}: choose another "
            "folder"
        )
    if found.get("shrink") != asked.shrink:
        raise CaptuneError(
            f"{folder} holds photos {_size(found.get('shrink'))}, asked for are photos "
            f"{_size(asked.shrink)}: choose another folder, or ask for the same size"
        )
    if taken and found.get("captions", "") != asked.captions:
        raise CaptuneError(
            f"{folder} holds other captions or another split than asked for; mixed, photos of its "
            "test split would be trained on: choose another folder"
        )
    photos = found.get("photos")
    if not isinstance(photos, dict) or not all(isinstance(n, int) for n in photos.values()):
        raise CaptuneError(
            f"{path} is damaged (its 'photos' are {photos!r}): choose another folder"
        )
    return replace(asked, photos=photos)


def _size(shrink: int | None) -> str:
    return f"of --shrink {shrink}" if shrink else "as they came (without --shrink)"
