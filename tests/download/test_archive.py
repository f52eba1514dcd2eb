"""Archives that stream: honest ones are unpacked to the byte, hostile ones leave nothing."""

from __future__ import annotations

import io
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from captune.download.archive import Archive, missing, unpack_photos
from captune.download.photos import bounded, shrunk_jpeg, write_photo
from captune.errors import CaptuneError
from download.web import QUICK, Server, found, packed, photo

PATH = "/a.zip"


def place_in(folder: Path) -> Callable[[str], Path | None]:
    """Every entry, wherever it says it belongs: the checks alone are to stop it."""
    return lambda name: folder / name


def unpack(server: Server, folder: Path, shrink: int | None = None) -> None:
    with Archive(server.url(PATH), patience=QUICK) as archive:
        unpack_photos(archive, archive.wanted(place_in(folder)), shrink=shrink)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_entries_are_unpacked_to_the_byte_in_five_requests(
    server: Server, tmp_path: Path, method: int
) -> None:
    files = {f"p/{number}.jpg": photo(number) for number in range(30)}
    server.files[PATH] = packed(files, method)
    unpack(server, tmp_path)
    assert found(tmp_path) == files
    # The first look, two at the end, the list of entries, and all photos in one go.
    assert len(server.asked) == 5


def test_what_lies_there_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    files = {f"p/{number}.jpg": photo(number, 400, 300) for number in range(30)}
    server.files[PATH] = packed(files)
    unpack(server, tmp_path)
    server.asked.clear()
    server.sent = 0
    unpack(server, tmp_path)
    assert len(server.asked) == 4
    (tmp_path / "p" / "29.jpg").unlink()
    (tmp_path / "p" / "28.jpg").write_bytes(b"")  # what a power cut leaves
    (tmp_path / "p" / "27.jpg").write_bytes(files["p/27.jpg"][:-1])
    server.sent = 0
    unpack(server, tmp_path)
    assert found(tmp_path) == files
    assert server.sent < len(server.files[PATH]) / 2


@pytest.mark.parametrize(
    ("size", "expected"), [((640, 480), (341, 256)), ((300, 500), (256, 427)), ((90, 60), (90, 60))]
)
def test_shrunk_photos_have_the_shorter_side_and_none_grows(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    content = photo(1, *size)
    small = Image.open(io.BytesIO(shrunk_jpeg(content, 256)))
    assert (small.size, small.format, small.mode) == (expected, "JPEG", "RGB")
    assert shrunk_jpeg(content, 256) == shrunk_jpeg(content, 256)


def test_a_shrunk_photo_shows_what_the_photo_shows() -> None:
    """Against a plain resize of the whole photo, without the shortcut of decoding at a fraction."""
    import numpy as np

    content = photo(3, 1300, 1000, noise=0.0)
    small = Image.open(io.BytesIO(shrunk_jpeg(content, 128)))
    plain = Image.open(io.BytesIO(content)).resize(small.size, Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(small, dtype=float) - np.asarray(plain, dtype=float))
    assert difference.mean() < 2.0


def test_orientation_and_transparency_are_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    out = io.BytesIO()
    Image.new("RGB", (100, 60)).save(out, "JPEG", exif=exif)
    assert Image.open(io.BytesIO(shrunk_jpeg(out.getvalue(), 40))).size == (40, 67)
    out = io.BytesIO()
    Image.new("RGBA", (50, 50), (255, 0, 0, 0)).save(out, "PNG")
    pixel = Image.open(io.BytesIO(shrunk_jpeg(out.getvalue(), 50))).getpixel((25, 25))
    assert pixel == (255, 255, 255)


def test_a_photo_that_cannot_be_decoded_stays_as_it_came(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files[PATH] = packed({"a.jpg": b"no photo", "b.jpg": photo(1)})
    unpack(server, tmp_path, shrink=32)
    assert (tmp_path / "a.jpg").read_bytes() == b"no photo"
    assert "a.jpg cannot be decoded" in capsys.readouterr().err


def test_a_photo_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"

    def pieces() -> Iterator[bytes]:
        yield b"half"
        assert not path.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_photo(path, pieces())
    assert list(tmp_path.iterdir()) == []
    write_photo(path, [b"ha", b"lf"])
    assert path.read_bytes() == b"half"


# -- damage -----------------------------------------------------------------------------------
def spoil_once(server: Server, target: int, times: int) -> Callable[[str, int, bytes], bytes]:
    left = [times]

    def spoil(path: str, first: int, piece: bytes) -> bytes:
        place = target - first
        if left[0] and 0 <= place < len(piece):
            left[0] -= 1
            return piece[:place] + bytes([piece[place] ^ 1]) + piece[place + 1 :]
        return piece

    return spoil


@pytest.mark.parametrize("shrink", [None, 64])
def test_damage_on_the_way_is_read_once_more(
    server: Server, tmp_path: Path, shrink: int | None
) -> None:
    files = {f"{number}.jpg": photo(number) for number in range(5)}
    server.files[PATH] = packed(files)
    unpack(server, tmp_path / "honest", shrink)
    server.spoil = spoil_once(server, server.files[PATH].index(files["3.jpg"]) + 100, 1)
    unpack(server, tmp_path / "damaged", shrink)
    assert found(tmp_path / "damaged") == found(tmp_path / "honest")


def test_damage_that_stays_is_an_error_that_names_the_entry(server: Server, tmp_path: Path) -> None:
    files = {f"{number}.jpg": photo(number) for number in range(5)}
    server.files[PATH] = packed(files)
    server.spoil = spoil_once(server, server.files[PATH].index(files["3.jpg"]) + 100, 9)
    with pytest.raises(CaptuneError, match=r"'3\.jpg' is damaged .*Bad CRC"):
        unpack(server, tmp_path)
    assert sorted(found(tmp_path)) == ["0.jpg", "1.jpg", "2.jpg"]


def test_what_is_no_archive_or_half_of_one_is_refused(server: Server, tmp_path: Path) -> None:
    whole = packed({"a.jpg": photo(1), "b.jpg": photo(2)})
    for content in (b"<html>hello</html>" * 50, whole[:-30], whole[: len(whole) // 2]):
        server.files[PATH] = content
        with pytest.raises(CaptuneError, match=r"a\.zip .* is no whole zip archive"):
            unpack(server, tmp_path)
    assert found(tmp_path) == {}


# -- hostile archives -------------------------------------------------------------------------
def entry(name: str, content: bytes = b"x", mode: int = 0, flags: int = 0) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("good.jpg", photo(1))
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, content)
    return out.getvalue()


def bomb() -> bytes:
    return packed({"good.jpg": photo(1), "big.jpg": bytes(70 << 20)}, zipfile.ZIP_DEFLATED)


def many_bombs() -> bytes:
    """Each below the limit of one photo, together far above what an archive of photos holds."""
    zeros = bytes(60 << 20)
    return packed({f"{number}.jpg": zeros for number in range(2)}, zipfile.ZIP_DEFLATED)


def overlapping() -> bytes:
    """Two entries of the list point at the same bytes: how a small file claims to be a huge one."""
    content = bytearray(packed({"a.jpg": b"x" * 100, "b.jpg": b"x" * 100}))
    second = content.rindex(b"PK\x01\x02")
    content[second + 42 : second + 46] = struct.pack("<I", 5)
    return bytes(content)


def encrypted() -> bytes:
    content = bytearray(packed({"a.jpg": b"x"}))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


HOSTILE = {
    "parent": (entry("../evil.jpg"), "outside"),
    "parent inside": (entry("p/../../evil.jpg"), "outside"),
    "absolute": (entry("/evil.jpg"), "absolute"),
    "drive": (entry("C:/evil.jpg"), "absolute"),
    "backslash": (entry("..\\evil.jpg"), "proper name"),
    "symlink": (entry("link.jpg", b"/etc/passwd", mode=0o120777), "link"),
    "device": (entry("pipe.jpg", mode=0o010644), "link or a device"),
    "bomb": (bomb(), "claims"),
    "overlap": (overlapping(), "shares bytes"),
    "encrypted": (encrypted(), "encrypted"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_refused_before_a_byte_is_written(
    server: Server, tmp_path: Path, case: str
) -> None:
    server.files[PATH], expected = HOSTILE[case]
    folder = tmp_path / "deep" / "folder"
    with pytest.raises(CaptuneError, match=rf"a\.zip.*{expected}.*nothing was unpacked") as caught:
        unpack(server, folder)
    assert "\n" not in str(caught.value)
    assert found(tmp_path) == {}


def test_many_small_bombs_are_refused_together(server: Server, tmp_path: Path) -> None:
    server.files[PATH] = many_bombs()
    with pytest.raises(CaptuneError, match="claims to hold"):
        unpack(server, tmp_path)


def test_an_entry_that_holds_more_than_it_declares_is_cut_and_caught(
    server: Server, tmp_path: Path
) -> None:
    content = bytearray(packed({"a.jpg": bytes(1 << 20)}, zipfile.ZIP_DEFLATED))
    listed = content.index(b"PK\x01\x02")
    for place in (listed + 24, 22):  # the list of entries, and the entry's own header
        content[place : place + 4] = struct.pack("<I", 1000)
    server.files[PATH] = bytes(content)
    with pytest.raises(CaptuneError, match="damaged"):
        unpack(server, tmp_path)
    assert found(tmp_path) == {}


def test_two_different_entries_for_one_file_are_refused(server: Server, tmp_path: Path) -> None:
    server.files[PATH] = packed({"a.jpg": photo(1), "A.jpg": photo(2)})
    with pytest.raises(CaptuneError, match=r"two different entries .*'a\.jpg' and 'A\.jpg'"):
        unpack(server, tmp_path)
    assert found(tmp_path) == {}


def test_the_same_entry_twice_is_unpacked_once(server: Server, tmp_path: Path) -> None:
    content = photo(1)
    server.files[PATH] = packed({"x/a.jpg": content, "y/a.jpg": content})
    with Archive(server.url(PATH), patience=QUICK) as archive:
        wanted = archive.wanted(lambda name: tmp_path / Path(name).name)
        assert len(wanted) == len(missing(wanted, shrink=None)) == 1


# -- memory -----------------------------------------------------------------------------------
def test_jobs_are_taken_only_as_fast_as_they_are_worked_off() -> None:
    taken = finished = most = 0
    lock = threading.Lock()

    def jobs() -> object:
        nonlocal taken, most
        for number in range(60):
            with lock:
                taken += 1
                most = max(most, taken - finished)
            yield number

    def work(number: int) -> int:
        nonlocal finished
        time.sleep(0.002)
        with lock:
            finished += 1
        return number

    assert sorted(bounded(work, jobs(), threads=2)) == list(range(60))  # type: ignore[arg-type]
    assert 2 <= most <= 2 * 3 + 1


def test_a_failing_job_ends_the_work_and_starts_no_other() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 3:
            raise OSError("full")
        done.append(number)

    with pytest.raises(OSError, match="full"):
        list(bounded(work, range(1000), threads=2))
    assert len(done) < 20


def test_whoever_stops_early_tells_the_threads() -> None:
    stop = threading.Event()
    results = bounded(str, range(1000), threads=2, stop=stop)
    next(results)
    assert not stop.is_set()
    results.close()  # type: ignore[attr-defined]
    assert stop.is_set()
