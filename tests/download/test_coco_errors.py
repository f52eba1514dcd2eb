"""What is said where a download of COCO cannot be had."""

from __future__ import annotations

import shutil
import socket
import time
from collections import namedtuple
from pathlib import Path

import pytest

from captune.cli.main import main
from captune.download import coco as coco_module
from captune.errors import CaptuneError
from download.web import Server, fetch, found, packed, photo_name, stock

Usage = namedtuple("Usage", "total used free")


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a command that fails."""
    assert main(["data", "coco", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    (line,) = [one for one in said.err.splitlines() if one.startswith("captune: error: ")]
    return line


def test_no_server_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    line = error_of(capsys, str(tmp_path / "c"), "--source", address)
    assert "no connection to 127.0.0.1" in line and "refused" in line
    assert slept == [1.0, 2.0]
    # Nothing is claimed: another --shrink may be asked for.
    assert not (tmp_path / "c" / "download.json").exists()


def test_a_missing_archive_is_named(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(capsys, str(tmp_path), "--source", server.address + "/")
    assert f"{server.address}/zips/train2014.zip: the server answered 404" in line


def test_a_page_in_place_of_an_archive_is_named(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(server)
    server.files["/zips/val2014.zip"] = b"<html>sign in</html>" * 100
    line = error_of(capsys, str(tmp_path), "--source", server.address)
    assert "val2014.zip (2,000 bytes) is no whole zip archive" in line


def test_an_archive_without_photos_is_named(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(server)
    server.files["/zips/val2014.zip"] = packed({"readme.txt": b"moved"})
    line = error_of(capsys, str(tmp_path), "--source", server.address)
    assert "holds no val2014/*.jpg" in line


def test_a_disk_that_is_too_small_is_said_before_a_photo_is_fetched(
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = stock(server)
    size = sum(len(content) for name, content in files.items() if name.endswith(".jpg"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, size - 1))
    line = error_of(capsys, str(tmp_path), "--source", server.address)
    assert f"needs about {size / 1e6:.1f} MB" in line and "--shrink 256" in line
    assert found(tmp_path) == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, size))
    fetch(server, tmp_path)


def test_the_official_size_is_asked_for_without_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**11, 0, 15 * 10**9))
    line = error_of(capsys, str(tmp_path / "c"))
    assert "needs about 21.3 GB, its disk has 15.0 GB free" in line
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**11, 0, 10**9))
    line = error_of(capsys, str(tmp_path / "c"), "--shrink", "256")
    assert "needs about 5.4 GB, its disk has 1.0 GB free" in line


def test_the_official_archives_are_known_by_their_lengths(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock(server)
    monkeypatch.setattr(coco_module, "OFFICIAL", server.address)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))
    with pytest.raises(CaptuneError, match=r"COCO's has 13,510,573,713"):
        fetch(server, tmp_path)
    lengths = {s: len(server.files[f"/zips/{s}2014.zip"]) for s in ("train", "val")}
    monkeypatch.setattr(coco_module, "_LENGTHS", lengths)
    with pytest.raises(CaptuneError, match=r"expected are 252,872,794"):
        fetch(server, tmp_path)
    annotations = len(server.files["/annotations/annotations_trainval2014.zip"])
    monkeypatch.setattr(coco_module, "_ANNOTATIONS_LENGTH", annotations)
    with pytest.raises(CaptuneError, match=r"expected is 0a379cfc70b0e71301e0f377548639bd"):
        fetch(server, tmp_path)


def test_a_disk_that_fills_up_midway_is_one_line(
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import errno

    from captune.download import archive

    stock(server)

    def full(path: Path, pieces: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archive, "write_photo", full)
    line = error_of(capsys, str(tmp_path), "--source", server.address)
    assert f"the disk of {tmp_path / 'train2014'} is full" in line


def test_a_file_in_place_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c").write_bytes(b"")
    assert "is a file: give a folder" in error_of(capsys, str(tmp_path / "c"))


def test_photos_of_another_size_are_not_mixed(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(server)
    fetch(server, tmp_path, shrink=64)
    for words, asked in ((["--shrink", "48"], "of --shrink 48"), ([], "as they came")):
        line = error_of(capsys, str(tmp_path), "--source", server.address, *words)
        assert "holds photos of --shrink 64" in line and asked in line


def test_a_folder_that_captune_did_not_download_is_left_alone(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(server)
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "own.jpg").write_bytes(b"mine")
    (tmp_path / "val2014" / ".note.tmp").write_bytes(b"mine, too")
    before = found(tmp_path)
    assert "val2014 but no download.json" in error_of(
        capsys, str(tmp_path), "--source", server.address
    )
    assert found(tmp_path) == before


def test_photos_that_the_captions_name_and_the_archive_lacks(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = stock(server)
    photos = {name: text for name, text in files.items() if name.startswith("val2014/")}
    photos.pop(f"val2014/{photo_name('val', 2)}")
    server.files["/zips/val2014.zip"] = packed(photos)
    line = error_of(capsys, str(tmp_path), "--source", server.address)
    assert (
        f"lacks 1 of the 5 photos that captions_val2014.json lists, such as {photo_name('val', 2)}"
        in line
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--shrink", "8"], "--shrink 8: give 32 pixels or more"),
        (["--splits", "test"], "no split 'test'"),
        (["--source", "images.example"], "must start with http(s)://"),
        (["--shrinc", "8"], "did you mean '--shrink'"),
    ],
)
def test_wrong_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert expected in error_of(capsys, str(tmp_path / "c"), *words)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "cannot be read as JSON"),
        ('{"format_version": 9}', "format_version 9"),
        ('{"format_version": 1, "data": "coco-2014", "photos": [1]}', "is damaged"),
    ],
)
def test_a_damaged_record_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, expected: str
) -> None:
    (tmp_path / "download.json").write_text(content, encoding="utf-8")
    line = error_of(capsys, str(tmp_path))
    assert expected in line and str(tmp_path / "download.json") in line
