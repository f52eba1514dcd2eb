"""Archives that claim too much, and what they leave: nothing, and one line."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import tarfile
from pathlib import Path

import pytest

from captune.cli.main import main
from captune.download import archive as archive_module
from captune.download import coco, flickr, tar
from captune.download.archive import Archive
from captune.download.flickr import FLICKR8K, convert_flickr
from captune.download.flickr_captions import read_captions
from captune.errors import CaptuneError
from download.web import Server, fetch, found, packed, photo, stock

ANNOTATIONS = "annotations_trainval2014.zip"
NAMES = [f"{number}.jpg" for number in range(9)]


# -- lists of entries -------------------------------------------------------------------------
def test_a_list_of_entries_that_claims_too_much_is_not_read(tmp_path: Path) -> None:
    path, size = tmp_path / "sparse.zip", 200 << 20
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(0, io.SEEK_END)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size, 0, 0))
    with pytest.raises(CaptuneError, match=r"list of entries claims 0\.2 GB"):
        Archive(path)


def test_too_many_entries_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "MOST_ENTRIES", 20)
    monkeypatch.setattr(archive_module, "_PIECE", 100)
    path = tmp_path / "a.zip"
    path.write_bytes(packed(dict.fromkeys(map(str, range(21)), b"x")))
    with pytest.raises(CaptuneError, match="lists more than 20 entries"):
        Archive(path)


# -- tar --------------------------------------------------------------------------------------
def tarred(path: Path, *members: tuple[str, bytes, bytes]) -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as archive:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(content)
            archive.fileobj.write(member.tobuf(tarfile.GNU_FORMAT))  # type: ignore[union-attr]
            archive.fileobj.write(content + bytes(-len(content) % 512))  # type: ignore[union-attr]
    return path


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_that_claims_too_much_is_not_read(tmp_path: Path, kind: bytes) -> None:
    path = tarred(tmp_path / "a.tgz", ("x", kind, bytes((1 << 20) + 1)))
    with pytest.raises(CaptuneError, match=r"a header that claims 1\.0 MB: it is not trusted"):
        tar.is_tar(path)


def test_a_photo_that_claims_too_much_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flickr, "LARGEST_PHOTO", 99)
    path = tarred(tmp_path / "a.tgz", ("a.jpg", tarfile.REGTYPE, bytes(100)))
    with pytest.raises(CaptuneError, match=r"'a\.jpg', which claims"):
        flickr._unpack_tar(path, {"a.jpg": tmp_path / "a.jpg"})
    assert not (tmp_path / "a.jpg").exists()


def test_half_a_tar_of_captions_is_one_line(tmp_path: Path) -> None:
    members = [(name, tarfile.REGTYPE, os.urandom(50_000)) for name in ("x", "captions.txt")]
    path = tarred(tmp_path / "c.tar.gz", *members)
    path.write_bytes(path.read_bytes()[:60_000])
    with pytest.raises(CaptuneError, match="is damaged or not whole"):
        read_captions(path, "flickr8k")


# -- Flickr -----------------------------------------------------------------------------------
@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command that makes train, val and test of photos that are links to elsewhere."""
    (tmp_path / "real").mkdir()
    (tmp_path / "links").mkdir()
    rows = []
    for number, name in enumerate(NAMES):
        (tmp_path / "real" / name).write_bytes(photo(number))
        (tmp_path / "links" / name).symlink_to(f"../real/{name}")
        split = ("train", "val", "test")[number % 3]
        rows.append({"filename": name, "split": split, "sentences": [{"raw": "A thing ."}]})
    captions = tmp_path / "dataset_flickr8k.json"
    captions.write_text(json.dumps({"images": rows}), encoding="utf-8")
    images = str(tmp_path / "links")
    return [str(tmp_path / "out"), "--images", images, "--captions", str(captions)]


def test_links_to_photos_become_photos(words: list[str]) -> None:
    assert main(["data", "flickr8k", *words]) == 0
    assert (Path(words[0]) / "train2014" / NAMES[0]).read_bytes() == photo(0)


def test_other_captions_are_not_mixed_in(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "flickr8k", *words]) == 0
    before = found(Path(words[0]))
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{name}#0\tA thing .\n" for name in NAMES), encoding="utf-8")
    assert main(["data", "flickr8k", *words[:-1], str(other)]) == 2
    assert "other captions or another split" in capsys.readouterr().err
    assert found(Path(words[0])) == before


def test_a_quotation_mark_without_its_second_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    rows = "b.jpg,a cat on a mat by the door\n" * 6000
    path.write_text(f'image,caption\na.jpg,"A dog\n{rows}', encoding="utf-8")
    with pytest.raises(CaptuneError, match="a quotation mark may lack its second"):
        read_captions(path, "flickr8k")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CaptuneError, match="is full: free some room"):
        convert_flickr(FLICKR8K, words[0], images=words[2], captions=words[4])


# -- COCO's annotations -----------------------------------------------------------------------
@pytest.mark.parametrize("name", [f".{ANNOTATIONS}.part.json", f".{ANNOTATIONS}"])
def test_a_kill_between_two_files_leaves_neither(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    files = stock(server)
    real = Path.unlink

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.name == name and self.exists():
            raise KeyboardInterrupt
        real(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch(server, tmp_path)
    fetch(server, tmp_path)
    assert set(found(tmp_path)) - set(files) == {"download.json"}


def test_captions_that_cannot_be_read_are_fetched_anew(server: Server, tmp_path: Path) -> None:
    files = stock(server)
    path = f"/annotations/{ANNOTATIONS}"
    honest, deep = server.files[path], b"[" * 200_000
    server.files[path] = packed({name: deep for name in files if name.startswith("annotations/")})
    with pytest.raises(CaptuneError, match="the same command again to get it anew"):
        fetch(server, tmp_path)
    server.files[path] = honest
    fetch(server, tmp_path)
    assert {name: text for name, text in found(tmp_path).items() if name in files} == files


def test_a_full_disk_costs_no_archive(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock(server)
    with monkeypatch.context() as patch:
        patch.setattr(coco, "_write_flushed", full)
        with pytest.raises(CaptuneError, match="is full"):
            fetch(server, tmp_path)
    server.asked.clear()
    fetch(server, tmp_path)
    assert not any("annotations" in path for path, _ in server.asked)
