"""COCO 2014 from a made-up host: whole, small, and taken up where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from captune.data.coco import CocoSource
from captune.errors import CaptuneError
from download.web import Server, fetch, found, photo, photo_name, stock


def test_the_folder_is_coco_2014_and_captune_reads_it(server: Server, tmp_path: Path) -> None:
    files = stock(server)
    folder = fetch(server, tmp_path / "coco")
    lying = found(folder)
    record = json.loads(lying.pop("download.json"))
    assert lying == files
    assert record == {
        "format_version": 1,
        "data": "coco-2014",
        "source": server.address,
        "shrink": None,
        "photos": {"train": 12, "val": 5},
    }
    source = CocoSource(folder)
    assert len(source.table("train")) == 12 and len(source.table("val")) == 5


def test_one_split_alone_and_the_other_later(server: Server, tmp_path: Path) -> None:
    files = stock(server)
    fetch(server, tmp_path, splits=["val"])
    assert not (tmp_path / "train2014").exists()
    assert not any("train2014.zip" in path for path, _ in server.asked)
    fetch(server, tmp_path)
    assert {name: text for name, text in found(tmp_path).items() if name in files} == files


def test_shrunk_photos_have_the_shorter_side(server: Server, tmp_path: Path) -> None:
    files = stock(server)
    fetch(server, tmp_path, shrink=48)
    for name in files:
        if name.endswith(".jpg"):
            with Image.open(tmp_path / name) as image:
                assert image.size == (64, 48)


def test_a_second_run_asks_the_server_nothing(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(server)
    fetch(server, tmp_path)
    before = found(tmp_path)
    server.asked.clear()
    capsys.readouterr()
    fetch(server, tmp_path)
    assert (server.asked, found(tmp_path)) == ([], before)
    assert "12 photos, all that have captions" in capsys.readouterr().err


def test_what_was_lost_since_is_fetched_alone(server: Server, tmp_path: Path) -> None:
    stock(server, make=lambda number: photo(number, 640, 480))
    fetch(server, tmp_path)
    before = found(tmp_path)
    (tmp_path / "train2014" / photo_name("train", 12)).unlink()
    (tmp_path / "val2014" / photo_name("val", 5)).write_bytes(b"")
    server.sent = 0
    fetch(server, tmp_path)
    assert found(tmp_path) == before
    assert server.sent < sum(map(len, before.values())) / 2


def test_a_run_that_gave_up_is_taken_up(server: Server, tmp_path: Path) -> None:
    files = stock(server)
    path = "/zips/val2014.zip"
    target = server.files[path].index(files[f"val2014/{photo_name('val', 3)}"]) + 50

    def spoil(asked: str, first: int, piece: bytes) -> bytes:
        place = target - first
        if asked != path or not 0 <= place < len(piece):
            return piece
        return piece[:place] + bytes([piece[place] ^ 1]) + piece[place + 1 :]

    server.spoil = spoil
    with pytest.raises(CaptuneError, match="damaged"):
        fetch(server, tmp_path)
    server.spoil = None
    fetch(server, tmp_path)
    assert {name: text for name, text in found(tmp_path).items() if name in files} == files


def test_annotations_that_are_no_archive_are_fetched_anew_by_the_next_run(
    server: Server, tmp_path: Path
) -> None:
    files = stock(server)
    path = "/annotations/annotations_trainval2014.zip"
    honest = server.files[path]
    server.files[path] = b"<html>sign in</html>" * 100
    with pytest.raises(CaptuneError, match="is no whole zip archive"):
        fetch(server, tmp_path)
    server.files[path] = honest
    fetch(server, tmp_path)
    assert {name: text for name, text in found(tmp_path).items() if name in files} == files


def test_stale_temporary_files_are_removed(server: Server, tmp_path: Path) -> None:
    stock(server)
    fetch(server, tmp_path)
    before = found(tmp_path)
    (tmp_path / "train2014" / f".{photo_name('train', 1)}.tmp").write_bytes(b"half")
    (tmp_path / "annotations" / ".captions_train2014.json.abc.tmp").write_bytes(b"half")
    fetch(server, tmp_path)
    assert found(tmp_path) == before
