"""Photos on their way to disk: shrunk, written whole, several at a time in bounded memory."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from PIL import Image

from captune.console import say
from captune.data.photos import LARGEST_OWN, open_image, open_photo
from captune.data.shards import photo_bytes
from captune.errors import CaptuneError

Job = TypeVar("Job")
Result = TypeVar("Result")

LEAST_SIDE = 32
QUALITY = 90
_AHEAD = 3  # jobs that wait for each worker: enough to never idle, little to hold


def check_side(side: int | None, option: str = "--shrink") -> None:
    """Refuse a shorter side that shows nothing.

    Raises:
        CaptuneError: below 32 pixels.
    """
    if side is not None and side < LEAST_SIDE:
        raise CaptuneError(f"{option} {side}: give {LEAST_SIDE} pixels or more")


def workers() -> int:
    """Threads that decode: Pillow works outside Python's lock, so cores count."""
    return min(8, os.cpu_count() or 1)


def shrunk_jpeg(content: bytes | Path, side: int) -> bytes:
    """A JPEG of the photo whose shorter side is ``side`` pixels; a smaller one stays as small.

    The same photo gives the same bytes. EXIF is not kept; the orientation it told is applied.
    """
    return as_jpeg(shrunk(open_photo(content, least_side=side), side), QUALITY)


def shrunk(photo: Image.Image, side: int) -> Image.Image:
    """The photo with its shorter side at ``side`` pixels (bicubic, antialiased), never enlarged."""
    scale = side / min(photo.size)
    if scale >= 1:
        return photo
    width, height = (max(side, round(length * scale)) for length in photo.size)
    return photo.resize((width, height), Image.Resampling.BICUBIC)


def as_jpeg(photo: Image.Image, quality: int) -> bytes:
    """RGB as the bytes of a JPEG."""
    out = io.BytesIO()
    photo.save(out, "JPEG", quality=quality)
    return out.getvalue()


def packed_photo(path: Path, side: int, quality: int) -> tuple[bytes, int, int]:
    """A photo as a pack has it: its JPEG, and the width and height of what that shows.

    Raises:
        Exception: whatever Pillow raises on what it cannot read.
    """
    content = photo_bytes(path)
    with open_image(content, largest=LARGEST_OWN, formats=None) as head:
        stays = head.format == "JPEG" and min(head.size) <= side
    least_side = 0 if stays else side
    photo = open_photo(content, least_side=least_side, largest=LARGEST_OWN, formats=None)
    if stays:
        return content, *photo.size
    photo = shrunk(photo, side)
    return as_jpeg(photo, quality), *photo.size


def shrunk_or_same(content: bytes, side: int, name: str) -> bytes:
    """As :func:`shrunk_jpeg`; what cannot be decoded stays as it came, and is spoken of."""
    try:
        return shrunk_jpeg(content, side)
    except MemoryError:  # says nothing about the photo: another run would shrink it
        raise
    # Pillow's decoders raise far more than OSError on broken files (SyntaxError, ValueError, …).
    except Exception as error:
        say(f"{name} cannot be decoded ({error}): kept as it came")
        return content


def write_photo(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a photo whole or not at all.

    It is not flushed to the disk: that would take longer than the download, and a power cut costs
    a photo that is fetched again, since :func:`sizes` takes an empty file for none.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(pieces)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file in ``folder`` that is not empty, by name; none where it is not there."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    return {name: size for name, size in found.items() if size}


def remove_stale(folder: Path, name: str = "*") -> None:
    """Remove the temporary files that a killed process left; nobody else may be writing here."""
    if folder.is_dir():
        for path in folder.glob(f".{name}.tmp"):
            path.unlink(missing_ok=True)


def bounded(
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    threads: int,
    stop: threading.Event | None = None,
) -> Iterator[Result]:
    """``work(job)`` of each job in a pool of threads, as they finish.

    Jobs are taken from their iterator only as fast as they are worked off: at most a few for each
    thread are held at a time.

    Args:
        stop: set where the work ends, before its end or not: jobs that last should look at it.
    """
    waiting: set[Future[Result]] = set()
    pool = ThreadPoolExecutor(threads)
    try:
        for job in jobs:
            waiting.add(pool.submit(work, job))
            if len(waiting) >= threads * _AHEAD:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        if stop:
            stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
