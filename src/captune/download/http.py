"""Files over HTTP: a server that stumbles is asked again, and reading goes on where it stopped."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests

from captune import __version__
from captune.download.stumbling import (
    PATIENCE,
    Patience,
    StumbleError,
    raise_for_status,
    stumbles,
)
from captune.errors import CaptuneError

T = TypeVar("T")

USER_AGENT = f"captune/{__version__}"
_CHUNK = 1 << 15  # bytes of one read; what a dropped connection may cost
_READ_ON = 1 << 20  # a seek ahead by this much or less reads on in place of a new request
# Real files have far fewer than 10^18 bytes, and Python refuses numbers of thousands of digits.
_SPAN = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_FIRST_ATTEMPTS = 3  # a host that never answered at all is given up sooner


class RemoteFile(io.RawIOBase):
    """A file on a web server: read-only and seekable, unchanged from first byte to last.

    One streaming answer serves sequential reads; a seek, or a connection that breaks, asks for the
    rest of the file from there (``Range``). Wrap it in an ``io.BufferedReader``.

    Attributes:
        url: its address.
        length: bytes.
        validator: the server's ETag or date for this version of the file, ``""`` without one.

    Raises:
        CaptuneError: no such host or file, a server that serves no parts of files or contradicts
            itself, a file that changed while it was read, ``patience`` used up. Reading raises it
            as well as opening.
    """

    def __init__(self, url: str, *, patience: Patience = PATIENCE) -> None:
        self._session = requests.Session()
        self._body: requests.Response | None = None
        if not url.startswith(("http://", "https://")):
            raise CaptuneError(
                f"{url!r} is no address to fetch from: it must start with http(s)://"
            )
        self.url = url
        self.patience = patience
        self.length = 0
        self.validator = ""
        # Compressed in transit, the bytes of a range could not be counted.
        self._session.headers.update({"Accept-Encoding": "identity", "User-Agent": USER_AGENT})
        self._body_at = 0
        self._position = 0
        self._failures = 0
        self._met = False
        self._insist(self._look)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; nothing is requested before the next read."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset} in {self.url}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the front of ``buffer``; 0 at the end of the file."""
        if self._position >= self.length or not len(buffer):
            return 0
        piece = self._insist(lambda: self._read(min(len(buffer), self.length - self._position)))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._drop()
        self._session.close()
        super().close()

    def _insist(self, work: Callable[[], T]) -> T:
        """``work()``, again and again where it stumbles, as long as patience lasts."""
        while True:
            try:
                return work()
            except StumbleError as stumble:
                self._drop()
                self._failures += 1
                if not self._met and self._failures >= min(_FIRST_ATTEMPTS, self.patience.attempts):
                    raise CaptuneError(
                        f"no connection to {urlsplit(self.url).netloc}: {stumble} ({self.url}); "
                        "check the network and the address"
                    ) from None
                if self._failures >= self.patience.attempts:
                    raise CaptuneError(
                        f"{self.url}: {stumble}, {self._failures} times in a row; "
                        "the same command goes on where it stopped"
                    ) from None
                self.patience.wait(self._failures, stumble.asked)

    def _look(self) -> None:
        """Ask for the first byte: the answer tells the length and the version."""
        answer = self._ask(0, 0)
        with contextlib.closing(answer):
            *_, self.length = self._span(answer)
            self.validator = _validator(answer)

    def _read(self, size: int) -> bytes:
        gap = self._position - self._body_at
        if self._body is None or not 0 <= gap <= _READ_ON:
            self._drop()
            answer = self._ask(self._position)
            self._body, self._body_at = answer, self._position
            self._check_same(answer)
        while self._body_at < self._position:
            self._next(self._position - self._body_at)
        piece = self._next(size)
        self._position += len(piece)
        self._failures = 0
        return piece

    def _next(self, size: int) -> bytes:
        """The next bytes of the open answer, ``size`` or fewer."""
        assert self._body is not None
        with stumbles(self.url):
            piece = read_some(self._body, min(size, _CHUNK))
        if not piece:
            raise StumbleError(f"the connection ended at byte {self._body_at:,} of {self.length:,}")
        self._body_at += len(piece)
        return piece

    def _ask(self, first: int, last: int | None = None) -> requests.Response:
        headers = {"Range": f"bytes={first}-{'' if last is None else last}"}
        # Where the file is another one by now, the server sends it whole in place of a part. A
        # weak tag ("W/") may not be asked with.
        if self.validator and not self.validator.startswith("W/"):
            headers["If-Range"] = self.validator
        with stumbles(self.url):
            answer = self._session.get(
                self.url, headers=headers, stream=True, timeout=self.patience.timeout
            )
        self._met = True
        if answer.status_code != 206:
            answer.close()
            raise_for_status(answer, self.url)
            if answer.status_code == 416:
                raise CaptuneError(f"{self.url} has no byte {first:,}: it is empty or has changed")
            self._check_same(answer)
            raise CaptuneError(
                f"{self.url}: the server sent the whole file in place of a part (it ignores Range, "
                "or the file has just changed): run the same command again, or fetch from another "
                "address with --source"
            )
        return answer

    def _span(self, answer: requests.Response) -> tuple[int, int, int]:
        """First and last byte of a part, and the length of the whole."""
        stated = answer.headers.get("Content-Range", "")
        match = re.fullmatch(_SPAN, stated.strip())
        first, last, length = (int(number) for number in match.groups()) if match else (1, 0, 0)
        if not first <= last < length:
            raise CaptuneError(
                f"{self.url}: the server sent a part with Content-Range {stated[:80]!r}"
            )
        return first, last, length

    def _check_same(self, answer: requests.Response) -> None:
        """Refuse an answer that is of another version, or another part than was asked for."""
        if answer.status_code == 206:
            first, last, length = self._span(answer)
        else:
            stated = answer.headers.get("Content-Length", "").strip()
            first = self._position
            length = int(stated) if re.fullmatch("[0-9]{1,18}", stated) else self.length
            last = length - 1
        changed = self.validator and _validator(answer) not in ("", self.validator)
        if self.length and (changed or length != self.length):
            raise CaptuneError(
                f"{self.url} changed on the server while it was read ({self.length:,} bytes, "
                f"version {self.validator or 'unknown'}, now {length:,}, "
                f"{_validator(answer) or 'unknown'}): run the same command again"
            )
        if self.length and (first, last) != (self._position, self.length - 1):
            raise CaptuneError(
                f"{self.url}: asked for bytes {self._position}-{self.length - 1}, the server sent "
                f"{first}-{last}"
            )

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None


def _validator(answer: requests.Response) -> str:
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


def read_some(answer: requests.Response, size: int, *, decode: bool = False) -> bytes:
    """What has come of an answer's body, ``size`` bytes at most; ``b""`` at its end.

    It waits for the first byte only: whoever calls it again and again can look at a clock, however
    slowly the server sends.
    """
    raw = answer.raw
    if hasattr(raw, "read1"):
        return raw.read1(size, decode_content=decode) or b""
    # An old urllib3 waits until it has all that is asked for.
    return raw.read(min(size, 1 << 10), decode_content=decode) or b""
