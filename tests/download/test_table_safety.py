"""What lies in a folder is not written over; slow servers and odd images cost no table."""

from __future__ import annotations

import errno
import io
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from captune.data import photos
from captune.data.photos import open_image, open_photo
from captune.download import links
from captune.download import photos as download_photos
from captune.download.links import fetch_images
from captune.download.photos import shrunk_or_same
from captune.download.stumbling import Patience
from captune.download.table import convert_table
from captune.errors import CaptuneError
from download.web import QUICK, Server, photo


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "a.jpg").write_bytes(photo(1))
    path = tmp_path / "t.csv"
    path.write_text("image,caption\na.jpg,hello\nnone.jpg,gone\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["failures.csv", "captions.parquet"])
def test_the_input_is_never_an_output(table: Path, name: str) -> None:
    first = convert_table(table, table.parent / "own")
    path = first.written.with_name(name)
    before = path.read_bytes()
    for out in (path.parent, path.parent / ".." / "own"):
        if name == "failures.csv":
            path.write_bytes(before := b"image,caption\n../a.jpg,hello\n")
        with pytest.raises(CaptuneError, match="would be written over it"):
            convert_table(path, out)
        assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["failures.csv", "captions.parquet"])
def test_files_that_captune_did_not_write_are_left_alone(table: Path, name: str) -> None:
    out = table.parent / "out"
    out.mkdir()
    (out / name).write_bytes(b"mine")
    with pytest.raises(CaptuneError, match=rf"{name} is there but no download\.json"):
        convert_table(table, out)
    assert (out / name).read_bytes() == b"mine" and not (out / "download.json").exists()


def test_a_killed_run_leaves_no_temporary_table(table: Path) -> None:
    out = convert_table(table, table.parent / "out").written.parent
    (out / ".captions.parquet.abc.tmp").write_bytes(b"half")
    convert_table(table, out)
    assert not list(out.glob(".*.tmp"))


def test_a_name_too_long_for_the_disk_is_listed(table: Path) -> None:
    with table.open("a", encoding="utf-8") as file:
        file.write("x" * 300 + ".jpg,long\n")
    report = convert_table(table, table.parent / "out")
    assert [name[:4] for name, _ in report.failures] == ["none", "xxxx"]


def test_a_full_disk_while_the_table_is_written_is_one_line(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    calls: list[int] = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 1:  # download.json still fits
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CaptuneError, match="is full: free some room"):
        convert_table(table, table.parent / "out")


# -- odd images -------------------------------------------------------------------------------
def saved(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def test_too_many_pixels_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = saved(Image.new("L", (400, 300)), "PNG")
    monkeypatch.setattr(photos, "LARGEST_PIXELS", 400 * 300 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="megapixels: 400 x 300"):
        open_photo(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow raises from twice this on
    with pytest.raises(ValueError, match="megapixels"):
        open_photo(content)


def test_an_eps_is_no_photo() -> None:
    content = saved(Image.new("RGB", (40, 30)), "EPS")
    assert Image.open(io.BytesIO(content)).format == "EPS"
    with pytest.raises(Image.UnidentifiedImageError):
        open_image(content)


def test_every_usual_kind_is_a_photo() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO"):
        image = Image.new("RGB", (40, 30))
        assert open_photo(saved(image, kind)).size == (40, 30)


def test_want_of_memory_is_not_taken_for_a_broken_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(download_photos, "shrunk_jpeg", fail)
    with pytest.raises(MemoryError):
        shrunk_or_same(photo(1), 64, "a.jpg")


# -- slow servers -----------------------------------------------------------------------------
def test_a_server_that_trickles_is_given_up_in_time(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/slow"] = photo(1)
    server.piece, server.pause = 1, 0.02
    monkeypatch.setattr(links, "_LONGEST", 0.2)
    start = time.monotonic()
    patience = Patience(attempts=1, timeout=2.0, first_wait=0.0)
    (got,) = fetch_images([server.url("/slow")], tmp_path, shrink=None, patience=patience).values()
    assert "not whole after" in got.reason and time.monotonic() - start < 2


def test_links_are_asked_for_unpacked(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = photo(1)
    fetch_images([server.url("/a")], tmp_path, shrink=None, patience=QUICK)
    assert server.encodings == ["identity"]
