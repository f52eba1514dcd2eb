"""Reading over HTTP: what passes is waited out, what does not is said in one line."""

from __future__ import annotations

import hashlib
import io
import json
import random
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from captune.download.http import RemoteFile
from captune.download.stumbling import Patience
from captune.download.whole import download_file
from captune.errors import CaptuneError
from download.web import QUICK, Server

CONTENT = np.random.default_rng(1).bytes(3_000_000)
PATH = "/some/file.bin"


@pytest.fixture
def shop(server: Server) -> Server:
    server.files[PATH] = CONTENT
    return server


def read_all(server: Server) -> bytes:
    with RemoteFile(server.url(PATH), patience=QUICK) as remote:
        return io.BufferedReader(remote, 1 << 20).read()


def test_a_whole_file_costs_one_request_after_the_first_look(shop: Server) -> None:
    assert read_all(shop) == CONTENT
    assert shop.asked == [(PATH, "bytes=0-0"), (PATH, "bytes=0-")]


def test_reads_at_random_places_are_those_of_the_file(shop: Server) -> None:
    """Against a file in memory, seek by seek."""
    rng = random.Random(5)
    reference = io.BytesIO(CONTENT)
    with io.BufferedReader(RemoteFile(shop.url(PATH), patience=QUICK), 1 << 12) as remote:
        for _ in range(60):
            whence = rng.choice([io.SEEK_SET, io.SEEK_END])
            offset = rng.randrange(len(CONTENT) + 10)
            offset = -min(offset, len(CONTENT)) if whence == io.SEEK_END else offset
            assert remote.seek(offset, whence) == reference.seek(offset, whence)
            size = rng.choice([0, 1, 100, 70_000])
            assert remote.read(size) == reference.read(size)


def test_a_short_step_ahead_reads_on_and_a_long_one_asks_anew(shop: Server) -> None:
    with RemoteFile(shop.url(PATH), patience=QUICK) as remote:
        remote.read(10)
        remote.seek(500_000)
        assert remote.read(4) == CONTENT[500_000:500_004]
        assert len(shop.asked) == 2
        remote.seek(2_900_000)
        assert remote.read(4) == CONTENT[2_900_000:2_900_004]
        assert shop.asked[-1] == (PATH, "bytes=2900000-") and len(shop.asked) == 3


def test_dropped_connections_are_taken_up_where_they_broke(shop: Server) -> None:
    shop.drop_after = 200_000
    assert read_all(shop) == CONTENT
    # 15 pieces: patience of 4 is not used up, since bytes came in between.
    assert [span for _, span in shop.asked][1:4] == ["bytes=0-", "bytes=200000-", "bytes=400000-"]
    assert len(shop.asked) == 1 + 15


def test_a_connection_that_always_breaks_at_once_is_given_up(shop: Server) -> None:
    def begin_to_break(path: str) -> None:
        shop.drop_after = 0 if len(shop.asked) > 1 else None

    shop.on_request = begin_to_break
    with pytest.raises(CaptuneError, match=r"file\.bin.* 4 times in a row; the same command goes"):
        read_all(shop)
    assert len(shop.asked) == 1 + 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_for_a_while_is_asked_again(shop: Server, status: int) -> None:
    shop.failures, shop.failure_status = 3, status
    assert read_all(shop) == CONTENT
    assert len(shop.asked) == 3 + 2


def test_a_server_that_stays_busy_is_given_up(shop: Server) -> None:
    shop.failures = 1000
    with pytest.raises(CaptuneError, match="503 Service Unavailable, 4 times in a row"):
        read_all(shop)
    assert len(shop.asked) == 4


def test_retry_after_is_heeded_up_to_the_longest_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    patience = Patience(first_wait=1.0, longest_wait=60.0)
    for failures, asked in ((1, 0.0), (3, 0.0), (1, 7.0), (1, 999.0), (30, 0.0)):
        patience.wait(failures, asked)
    assert slept == [1.0, 4.0, 7.0, 60.0, 60.0]


@pytest.mark.parametrize("stated", ["1", "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_retry_after_is_a_number_or_a_date(shop: Server, stated: str) -> None:
    shop.failures, shop.failure_headers = 1, {"Retry-After": stated}
    patience = Patience(attempts=3, timeout=5.0, first_wait=0.0, longest_wait=0.2)
    start = time.monotonic()
    RemoteFile(shop.url(PATH), patience=patience).close()
    assert time.monotonic() - start >= 0.2


def test_a_missing_file_fails_at_once(shop: Server) -> None:
    with pytest.raises(CaptuneError, match=r"/none: the server answered 404 Not Found"):
        RemoteFile(shop.url("/none"), patience=QUICK)
    assert len(shop.asked) == 1


def test_a_server_that_ignores_range_is_refused(shop: Server) -> None:
    shop.ignores_range = True
    with pytest.raises(CaptuneError, match="whole file in place of a part"):
        read_all(shop)


def test_a_file_that_changes_midway_is_noticed(shop: Server) -> None:
    shop.drop_after = 200_000

    def change(path: str) -> None:
        if len(shop.asked) == 3:
            shop.versions[PATH] = "2"

    shop.on_request = change
    with pytest.raises(CaptuneError, match="changed on the server while it was read"):
        read_all(shop)


def test_a_change_is_noticed_even_where_only_the_first_answer_tells_the_version(
    shop: Server,
) -> None:
    """``If-Range`` makes the server compare: it sends the other version whole, not a part of it."""
    shop.drop_after, shop.tells_versions = 200_000, False

    def change(path: str) -> None:
        if len(shop.asked) == 3:
            shop.versions[PATH], shop.files[PATH] = "2", CONTENT[::-1]

    shop.on_request = change
    with pytest.raises(CaptuneError, match="whole file"):
        read_all(shop)


def test_a_file_that_shrinks_midway_is_noticed(shop: Server) -> None:
    shop.drop_after = 200_000

    def shrink(path: str) -> None:
        if len(shop.asked) == 3:
            shop.files[PATH] = CONTENT[:-1]

    shop.on_request = shrink
    with pytest.raises(CaptuneError, match="changed on the server"):
        read_all(shop)


@pytest.mark.parametrize("span", ["bytes 5-9/3000000", "bytes 0-1/*", "elephants", "bytes 3-2/9"])
def test_a_wrong_content_range_is_refused(shop: Server, span: str) -> None:
    def begin_to_lie(path: str) -> None:
        shop.span = span if len(shop.asked) > 1 else ""

    shop.on_request = begin_to_lie
    with pytest.raises(CaptuneError, match=r"Content-Range|the server sent 5-9"):
        read_all(shop)


def test_a_content_length_that_is_too_long_does_no_harm(shop: Server) -> None:
    shop.overstate = 1000
    assert read_all(shop) == CONTENT


def test_a_content_length_that_is_too_short_does_no_harm(shop: Server) -> None:
    """The client reads less than the part has and asks for the rest."""

    def understate(path: str) -> None:
        shop.overstate = -500_000 if len(shop.asked) == 2 else 0

    shop.on_request = understate
    assert read_all(shop) == CONTENT
    assert shop.asked[-1] == (PATH, "bytes=2500000-")


def test_no_connection_is_one_line_that_names_the_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(CaptuneError, match=rf"no connection to 127\.0\.0\.1:{port}: .*refused"):
        RemoteFile(f"http://127.0.0.1:{port}/x", patience=QUICK)


def test_a_host_that_does_not_exist_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(CaptuneError, match=r"to nowhere\.invalid: Name or") as caught:
        RemoteFile("http://nowhere.invalid/x.zip", patience=QUICK)
    assert "\n" not in str(caught.value) and "HTTPConnectionPool" not in str(caught.value)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://host/x", "images.org", "http://"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(CaptuneError):
        RemoteFile(address, patience=QUICK)


def test_a_silent_server_is_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        quick = Patience(attempts=2, timeout=0.1, first_wait=0.001)
        with pytest.raises(CaptuneError, match="timed out"):
            RemoteFile(url, patience=quick)


# -- whole files ------------------------------------------------------------------------------
def test_a_file_is_fetched_whole_and_leaves_nothing_else(shop: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    digest = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    download_file(shop.url(PATH), target, length=len(CONTENT), checksum=digest, patience=QUICK)
    assert target.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [target]


def interrupted(shop: Server, target: Path) -> None:
    """A download that gave up after 1,200,000 bytes."""

    def break_down(path: str) -> None:
        shop.drop_after = 1_200_000 if len(shop.asked) == 2 else 0 if len(shop.asked) > 2 else None

    shop.on_request = break_down
    with pytest.raises(CaptuneError, match="goes on where it stopped"):
        download_file(shop.url(PATH), target, patience=QUICK)
    shop.on_request, shop.drop_after = None, None
    shop.asked.clear()
    assert not target.exists()


def test_another_run_goes_on_where_one_stopped(shop: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    interrupted(shop, target)
    have = (tmp_path / "file.bin.part").stat().st_size
    assert have > 1_000_000
    download_file(shop.url(PATH), target, patience=QUICK)
    assert target.read_bytes() == CONTENT
    assert [span for _, span in shop.asked] == ["bytes=0-0", f"bytes={have}-"]


def test_a_part_of_another_version_is_not_used(shop: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    interrupted(shop, target)
    shop.files[PATH], shop.versions[PATH] = CONTENT[::-1], "2"
    download_file(shop.url(PATH), target, patience=QUICK)
    assert target.read_bytes() == CONTENT[::-1]


def test_a_note_that_is_damaged_starts_the_file_anew(shop: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    interrupted(shop, target)
    (tmp_path / "file.bin.part.json").write_text("{", encoding="utf-8")
    download_file(shop.url(PATH), target, patience=QUICK)
    assert target.read_bytes() == CONTENT


def test_another_length_is_refused_before_a_byte_is_written(shop: Server, tmp_path: Path) -> None:
    with pytest.raises(CaptuneError, match=r"has 3,000,000 bytes, expected are 7"):
        download_file(shop.url(PATH), tmp_path / "f", length=7, patience=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_another_checksum_is_refused_and_the_next_run_fetches_anew(
    shop: Server, tmp_path: Path
) -> None:
    target, digest = tmp_path / "f", f"md5:{hashlib.md5(CONTENT).hexdigest()}"
    shop.spoil = lambda path, first, piece: bytes(len(piece))
    with pytest.raises(CaptuneError, match="md5"):
        download_file(shop.url(PATH), target, checksum=digest, patience=QUICK)
    shop.spoil = None
    download_file(shop.url(PATH), target, checksum=digest, patience=QUICK)
    assert target.read_bytes() == CONTENT


def test_the_note_says_which_version_the_part_is_of(shop: Server, tmp_path: Path) -> None:
    interrupted(shop, tmp_path / "f")
    note = json.loads((tmp_path / "f.part.json").read_text(encoding="utf-8"))
    assert note == {
        "format_version": 1,
        "url": shop.url(PATH),
        "length": len(CONTENT),
        "validator": '"1"',
    }
