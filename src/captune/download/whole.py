"""One file from a web server onto disk, over several runs of the program if need be."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

from tqdm.auto import tqdm

from captune.download.disk import full_disk_is_an_error
from captune.download.http import RemoteFile
from captune.download.stumbling import PATIENCE, Patience
from captune.errors import CaptuneError
from captune.files import read_versioned, write_json

_VERSION = 1
_BUFFER = 1 << 20


def download_file(
    url: str,
    path: Path,
    *,
    length: int | None = None,
    checksum: str = "",
    patience: Patience = PATIENCE,
) -> None:
    """Fetch ``url`` to ``path``; what an earlier run left in ``path.part`` is not fetched again.

    Args:
        length: the bytes it must have; unknown where None.
        checksum: what it must hash to, such as ``md5:0a37…`` or ``sha256:…``; unchecked where "".

    Raises:
        CaptuneError: as :class:`RemoteFile`, or another length or checksum than stated (the part
            is then removed), or the disk is full.
    """
    part, note = (path.with_name(path.name + end) for end in (".part", ".part.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with RemoteFile(url, patience=patience) as remote, full_disk_is_an_error(path.parent):
        if length is not None and remote.length != length:
            raise CaptuneError(f"{url} has {remote.length:,} bytes, expected are {length:,}")
        have = _claim(part, note, remote)
        _append(part, have, remote, path.name.lstrip("."))
    if checksum:
        kind, _, wanted = checksum.partition(":")
        with part.open("rb") as file:
            found = hashlib.file_digest(file, kind).hexdigest()
        if found != wanted:
            part.unlink()
            raise CaptuneError(
                f"{url} has the {kind} {found}, expected is {wanted}: damaged on the way, or "
                "another file; run the same command again to fetch it anew"
            )
    os.replace(part, path)
    note.unlink(missing_ok=True)


def _claim(part: Path, note: Path, remote: RemoteFile) -> int:
    """The bytes of this very version that lie in the part file; else start it anew."""
    version = {"url": remote.url, "length": remote.length, "validator": remote.validator}
    wanted = {"format_version": _VERSION, **version}
    try:
        found = read_versioned(note, what="note of a download", version=_VERSION)
    except CaptuneError:
        found = {}
    if found == wanted and part.is_file() and part.stat().st_size <= remote.length:
        return part.stat().st_size
    part.unlink(missing_ok=True)
    write_json(note, wanted)
    return 0


def _append(part: Path, have: int, remote: RemoteFile, name: str) -> None:
    remote.seek(have)
    bar = tqdm(total=remote.length, initial=have, unit="B", unit_scale=True, desc=name)
    # Not closed before `remote` is: closing the reader closes it too.
    reader = io.BufferedReader(remote, _BUFFER)
    with bar, part.open("ab") as file:
        while piece := reader.read1(_BUFFER):
            file.write(piece)
            bar.update(len(piece))
        file.flush()
        os.fsync(file.fileno())
