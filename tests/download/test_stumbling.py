"""Odd headers and broken secure connections are waited out or said in one line."""

from __future__ import annotations

import ssl
import time

import pytest
import requests
import urllib3

from captune.download.http import RemoteFile
from captune.download.stumbling import StumbleError, stumbles
from captune.errors import CaptuneError
from download.web import QUICK, Server

PATH = "/f"


@pytest.mark.parametrize("stated", ["\xb2", "Mon, 01 Jan 99999999999 00:00:00 GMT", "9" * 5000])
def test_an_absurd_retry_after_does_no_harm(server: Server, stated: str) -> None:
    server.files[PATH] = b"hello"
    server.failures, server.failure_headers = 1, {"Retry-After": stated}
    with RemoteFile(server.url(PATH), patience=QUICK) as remote:
        assert remote.read() == b"hello"


def test_a_length_of_thousands_of_digits_is_refused(server: Server) -> None:
    server.files[PATH] = b"hello"
    server.span = "bytes 0-0/" + "9" * 5000
    with pytest.raises(CaptuneError, match="a part with Content-Range"):
        RemoteFile(server.url(PATH), patience=QUICK)


def test_a_length_that_is_no_number_is_not_read() -> None:
    answer = requests.Response()
    answer.status_code, answer.headers["Content-Length"] = 200, "many"
    remote = RemoteFile.__new__(RemoteFile)
    remote.length, remote.validator, remote._position = 5, "", 0
    remote._check_same(answer)


def wrapped(error: Exception) -> requests.exceptions.SSLError:
    """As requests and urllib3 hand it on: in part as the cause, in part as an argument."""
    reason = urllib3.exceptions.SSLError(error)
    pool = urllib3.HTTPSConnectionPool("example.invalid")
    retried = urllib3.exceptions.MaxRetryError(pool, "/", reason)
    retried.__cause__ = reason
    return requests.exceptions.SSLError(retried)


def test_a_secure_connection_that_breaks_passes_and_a_certificate_does_not() -> None:
    with pytest.raises(StumbleError), stumbles("u"):
        raise wrapped(ssl.SSLEOFError(8, "EOF occurred in violation of protocol"))
    with pytest.raises(CaptuneError, match="no secure connection"), stumbles("u"):
        raise wrapped(ssl.SSLCertVerificationError(1, "certificate verify failed"))


def test_a_read_gives_what_has_come(server: Server) -> None:
    """In place of waiting for all: Ctrl-C is then heeded between the pieces."""
    server.files[PATH] = bytes(100)
    server.piece, server.pause = 1, 0.02
    with RemoteFile(server.url(PATH), patience=QUICK) as remote:
        start = time.monotonic()
        assert 0 < len(remote.read(100)) < 100
        assert time.monotonic() - start < 1
