"""Tar archives, as little trusted as zip archives: streamed, in bounded memory."""

from __future__ import annotations

import contextlib
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from captune.download.archive import MOST_ENTRIES
from captune.download.disk import gigabytes
from captune.errors import CaptuneError

_PIECE = 1 << 20
_LARGEST_HEADER = 1 << 20  # bytes; a header that extends another holds a long name or a few words
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _HostileError(Exception):
    """What no honest archive holds."""


class _Header(tarfile.TarInfo):
    """Refuses headers that tarfile would read whole, however large they claim to be."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENSIONS and header.size > _LARGEST_HEADER:
            raise _HostileError(f"holds a header that claims {gigabytes(header.size)}")
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise _HostileError("holds a file with holes")
        return header


def is_tar(path: Path) -> bool:
    """Whether a file is a tar archive, packed or not.

    Raises:
        CaptuneError: it is one that is hostile, or damaged at its very beginning.
    """
    with _sound(path):
        try:
            with tarfile.open(path, tarinfo=_Header):
                return True
        except (tarfile.TarError, zlib.error, lzma.LZMAError):
            return False


def read_tar(
    path: Path,
    wanted: Callable[[str, int], bool],
    take: Callable[[str, Iterable[bytes]], object],
    *,
    largest: int,
    progress: Callable[[int], object] = lambda at: None,
) -> None:
    """Hand the regular files of an archive to ``take``: the bare name, and the bytes in pieces.

    Args:
        wanted: whether the file of that bare name and size is to be taken.
        largest: bytes that a wanted file may have.
        progress: told how many bytes of the archive are read.

    Raises:
        CaptuneError: the archive is hostile, damaged or not whole.
    """
    with (
        path.open("rb") as raw,
        _sound(path),
        tarfile.open(fileobj=raw, mode="r|*", tarinfo=_Header) as archive,
    ):
        for count, member in enumerate(archive):
            if count >= MOST_ENTRIES:
                raise _HostileError(f"holds more than {MOST_ENTRIES:,} entries")
            name = PurePosixPath(member.name).name
            if member.isreg() and wanted(name, member.size):
                if member.size > largest:
                    raise _HostileError(f"holds {name!r}, which claims {gigabytes(member.size)}")
                content = archive.extractfile(member)
                assert content is not None
                take(name, _pieces(content))
            progress(raw.tell())


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece


@contextlib.contextmanager
def _sound(path: Path) -> Iterator[None]:
    try:
        yield
    except _HostileError as error:
        raise CaptuneError(f"{path} {error}: it is not trusted, nothing more is unpacked") from None
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise CaptuneError(f"{path} is damaged or not whole: {error}") from None
