"""Atomic writes and careful reads: a file is whole or absent, never half written."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captune.errors import CaptuneError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it is flushed and renamed to ``path``.

    On any exception, Ctrl-C included, the temporary file is removed and ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 with ``\\n`` line ends, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *, what: str) -> Any:
    """Read a JSON file; ``what`` names it in the error.

    Raises:
        CaptuneError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CaptuneError(f"no {what} at {path}") from None
    # ValueError: no UTF-8, no JSON, numbers of thousands of digits; RecursionError: nested deeply.
    except (OSError, ValueError, RecursionError) as error:
        raise CaptuneError(f"{what} {path} cannot be read as JSON: {error}") from None


def read_versioned(path: Path, *, what: str, version: int) -> dict[str, Any]:
    """Read a JSON object that carries ``format_version``.

    Raises:
        CaptuneError: missing, not JSON, not an object, or written by another format version.
    """
    value = read_json(path, what=what)
    found = value.get("format_version") if isinstance(value, dict) else None
    if found != version:
        raise CaptuneError(
            f"{what} {path} has format_version {found!r}, this captune reads {version}: "
            "open it with the captune release that wrote it, or make it anew"
        )
    assert isinstance(value, dict)
    return value


def cache_dir() -> Path:
    """Where caches shared by runs live: ``$CAPTUNE_CACHE``, else ``~/.cache/captune``."""
    named = os.environ.get("CAPTUNE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "captune"
