"""Room on the disk: asked for before a download, spoken of when it runs out."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from captune.errors import CaptuneError

# Photos of COCO's shape (4:3), the shorter side N: N * 4/3 N pixels, as JPEG of quality 90.
# Measured: 0.35 bytes a pixel on about 150 photos; a little more leaves room.
_BYTES_PER_PIXEL = 0.4
_SHAPE = 4 / 3


def shrunk_bytes(photos: int, original_bytes: int, side: int) -> int:
    """About what ``photos`` take once their shorter side is ``side`` pixels."""
    return min(original_bytes, round(photos * side * side * _SHAPE * _BYTES_PER_PIXEL))


def check_room(folder: Path, needed: int, *, advice: str = "") -> None:
    """Refuse to begin what will not fit.

    Args:
        needed: bytes still to be written.
        advice: what would need less.

    Raises:
        CaptuneError: less is free.
    """
    free = shutil.disk_usage(existing(folder)).free
    if needed > free:
        raise CaptuneError(
            f"{folder} needs about {gigabytes(needed)}, its disk has {gigabytes(free)} free: "
            f"free some{advice or ' or choose a folder on another disk'}"
        )


def existing(folder: Path) -> Path:
    """``folder``, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def gigabytes(count: int) -> str:
    """``13.5 GB``; small amounts in MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


@contextlib.contextmanager
def full_disk_is_an_error(folder: Path) -> Iterator[None]:
    """A write that fails for want of room is the user's to mend.

    Raises:
        CaptuneError: the disk or the quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CaptuneError(
            f"the disk of {folder} is full: free some room; the same command goes on where it "
            "stopped"
        ) from None
