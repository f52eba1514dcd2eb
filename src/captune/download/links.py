"""Images behind links, many at a time: each becomes a file, or a reason why not."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm.auto import tqdm

from captune.data.photos import open_image, open_photo
from captune.download.disk import full_disk_is_an_error
from captune.download.http import USER_AGENT, read_some
from captune.download.photos import (
    bounded,
    remove_stale,
    shrunk_jpeg,
    write_photo,
)
from captune.download.stumbling import Patience, StumbleError, raise_for_status, stumbles
from captune.errors import CaptuneError

PATIENCE = Patience(attempts=3, timeout=15.0, first_wait=1.0, longest_wait=10.0)
_THREADS = 16  # they wait for servers most of the time
_LARGEST = 64 << 20
_LONGEST = 120.0  # seconds for one image
_PIECE = 1 << 16
_DECODING = threading.Semaphore(2)  # a large photo takes 750 MB while it is decoded
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}


@dataclass(frozen=True)
class Fetched:
    """What became of a link: the file's name, or why there is none."""

    url: str
    name: str = ""
    reason: str = ""


def fetch_images(
    urls: Sequence[str], folder: Path, *, shrink: int | None, patience: Patience = PATIENCE
) -> dict[str, Fetched]:
    """Fetch different addresses into ``folder``; those whose files lie there are not asked for.

    Only what Pillow decodes becomes a file, named after a hash of its address.

    Raises:
        CaptuneError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    there = {path.stem: path.name for path in folder.iterdir() if path.stat().st_size}
    results = {url: Fetched(url, there[_stem(url)]) for url in urls if _stem(url) in there}
    sessions = threading.local()
    stop = threading.Event()

    def fetch(url: str) -> Fetched:
        if not hasattr(sessions, "own"):
            sessions.own = requests.Session()
            # Images are packed as they are: to pack them once more hides how large they are.
            headers = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT}
            sessions.own.headers.update(headers)
        try:
            content = _insist(sessions.own, url, patience, stop)
        except CaptuneError as error:
            return Fetched(url, reason=str(error).removeprefix(f"{url}: "))
        return _store(url, content, folder, shrink)

    todo = [url for url in urls if url not in results]
    bar = tqdm(total=len(urls), initial=len(results), unit="image", desc="images")
    with bar, full_disk_is_an_error(folder):
        for result in bounded(fetch, todo, threads=_THREADS, stop=stop):
            results[result.url] = result
            bar.update()
    return results


def _stem(url: str) -> str:
    return hashlib.blake2b(url.encode("utf-8"), digest_size=10).hexdigest()


def _insist(
    session: requests.Session, url: str, patience: Patience, stop: threading.Event
) -> bytes:
    """The bytes behind a link; what may pass is tried again.

    Raises:
        CaptuneError: it did not pass, never will, or Ctrl-C wants no thread to go on.
    """
    failures = 0
    while True:
        try:
            return _get(session, url, patience, stop)
        except StumbleError as stumble:
            failures += 1
            if failures >= patience.attempts or stop.is_set():
                raise CaptuneError(f"{url}: {stumble}, {failures} times") from None
            patience.wait(failures, stumble.asked)


def _get(session: requests.Session, url: str, patience: Patience, stop: threading.Event) -> bytes:
    start = time.monotonic()
    pieces: list[bytes] = []
    size = 0
    with stumbles(url), session.get(url, stream=True, timeout=patience.timeout) as answer:
        raise_for_status(answer, url)
        while piece := read_some(answer, _PIECE, decode=True):
            pieces.append(piece)
            size += len(piece)
            if size > _LARGEST:
                raise CaptuneError(f"{url}: more than {_LARGEST >> 20} MB")
            if stop.is_set() or time.monotonic() - start > _LONGEST:
                raise CaptuneError(f"{url}: not whole after {time.monotonic() - start:.0f} seconds")
    return b"".join(pieces)


def _store(url: str, content: bytes, folder: Path, shrink: int | None) -> Fetched:
    try:
        with _DECODING:
            if shrink:
                content, suffix = shrunk_jpeg(content, shrink), ".jpg"
            else:
                open_photo(content)
                with open_image(content) as image:
                    suffix = _SUFFIXES.get(image.format or "", ".img")
    # Pillow's decoders raise far more than OSError on broken files (SyntaxError, ValueError, …).
    except Exception as error:
        return Fetched(
            url, reason=f"no image ({' '.join(str(error).split()) or type(error).__name__})"
        )
    name = _stem(url) + suffix
    write_photo(folder / name, [content])
    return Fetched(url, name)
