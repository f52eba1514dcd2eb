"""Flickr8k and Flickr30k, in the forms they go around in, become COCO 2014's layout."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from captune.cli.main import main
from captune.data.coco import CocoSource
from captune.download.flickr import FLICKR8K, FLICKR30K, convert_flickr
from captune.download.flickr_captions import read_captions
from captune.errors import CaptuneError
from download.web import packed, photo

NAMES = [f"{number}_abc.jpg" for number in range(10)]
SPLIT_OF = dict.fromkeys(NAMES[:6], "train") | dict.fromkeys(NAMES[6:8], "dev")
SPLIT_OF |= {NAMES[8]: "test"}  # the last one is in no list
TOKEN = "".join(f"{name}#{i}\tA thing, number {i} .\n" for name in NAMES for i in range(5))
LISTS = {
    f"Flickr_8k.{split}Images.txt": "\n".join(n for n in NAMES if SPLIT_OF.get(n) == split)
    for split in ("train", "dev", "test")
}
KARPATHY = json.dumps(
    {
        "images": [
            {
                "filename": name,
                "split": SPLIT_OF.get(name, "test").replace("dev", "val"),
                "sentences": [{"raw": f"A thing, number {i} ."} for i in range(5)],
            }
            for name in NAMES
        ]
    }
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The archive of photos as it is sent: a folder, and what a Mac leaves beside it."""
    path = tmp_path / "Flickr8k_Dataset.zip"
    photos = {f"Flicker8k_Dataset/{name}": photo(i) for i, name in enumerate(NAMES)}
    junk = {f"__MACOSX/Flicker8k_Dataset/._{name}": b"junk" for name in NAMES}
    path.write_bytes(packed(photos | junk))
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "Flickr8k_text.zip"
    others = {"Flickr8k.lemma.token.txt": "x#0\tthing", "readme.txt": "hello"}
    files = {"Flickr8k.token.txt": TOKEN, **LISTS, **others}
    path.write_bytes(packed({name: text.encode() for name, text in files.items()}))
    return path


def test_the_archives_as_they_are_sent(pictures: Path, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flickr8k"
    words = ["data", "flickr8k", str(folder), "--images", str(pictures), "--captions", str(texts)]
    assert main(words) == 0
    source = CocoSource(folder)
    tables = {split: source.table(split) for split in ("train", "val", "test")}
    assert {split: len(table) for split, table in tables.items()} == {
        "train": 6,
        "val": 2,
        "test": 1,
    }
    val = tables["val"]
    assert [val.file_name(row) for row in range(2)] == NAMES[6:8]
    assert val.texts()[:2] == ["A thing, number 0 .", "A thing, number 1 ."]
    assert val.path(1).read_bytes() == photo(7)
    ids = [i for table in tables.values() for i in table.captions["caption_id"].to_pylist()]
    assert len(set(ids)) == len(ids) == 45
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(words) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_photos_in_a_folder_or_a_tar(texts: Path, tmp_path: Path, kind: str) -> None:
    images = tmp_path / "flickr30k-images"
    (images / "deep").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (images / "deep" / name).write_bytes(photo(number))
    if kind == "tar":
        with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as archive:
            archive.add(images, "flickr30k-images")
        images = tmp_path / "images.tar.gz"
    out = convert_flickr(FLICKR8K, tmp_path / "out", images=str(images), captions=str(texts))
    table = CocoSource(out).table("train")
    assert [table.path(row).read_bytes() for row in range(6)] == [photo(n) for n in range(6)]


def test_a_tar_can_write_nothing_but_photos(texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in ((f"../../{NAMES[0]}", tarfile.REGTYPE), (NAMES[1], tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"abcd"))
    out = convert_flickr(FLICKR8K, tmp_path / "a" / "out", images=str(path), captions=str(texts))
    assert [p.name for p in (out / "train2014").iterdir()] == [NAMES[0]]
    assert not (tmp_path / NAMES[0]).exists() and not (tmp_path / "a" / NAMES[0]).exists()


def test_half_a_tar_is_refused(texts: Path, tmp_path: Path) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        for number, name in enumerate(NAMES):
            member = tarfile.TarInfo(name)
            member.size = len(photo(number))
            archive.addfile(member, io.BytesIO(photo(number)))
    path = tmp_path / "images.tar.gz"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(CaptuneError, match="damaged or not whole"):
        convert_flickr(FLICKR8K, tmp_path / "out", images=str(path), captions=str(texts))


# -- captions ---------------------------------------------------------------------------------
BARS = "image_name| comment_number| comment\n" + "".join(
    f"{name}| {i}| A thing, number {i} .\n" for name in NAMES for i in range(5)
).replace("| 4| A thing", "| 4   A thing", 1)  # the row that is known to be short of a bar
COMMAS = "image,caption\n" + "".join(
    f'{name},"A thing, number {i} ."\n' for name in NAMES for i in range(5)
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results_20130124.token", TOKEN),
        ("results.csv", BARS),
        ("captions.txt", COMMAS),
        ("dataset_flickr30k.json", KARPATHY),
        ("renamed.json", KARPATHY),
    ],
)
def test_every_form_of_captions_gives_the_same(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = read_captions(tmp_path / name, "flickr30k")
    assert found.texts == {n: [f"A thing, number {i} ." for i in range(5)] for n in NAMES}
    assert set(found.split_of.values()) <= {"train", "val", "test"}


def test_karpathys_archive_has_lists_of_both_sets(tmp_path: Path) -> None:
    path = tmp_path / "caption_datasets.zip"
    other = KARPATHY.replace("_abc", "_other")
    path.write_bytes(
        packed(
            {"dataset_flickr30k.json": other.encode(), "dataset_flickr8k.json": KARPATHY.encode()}
        )
    )
    assert list(read_captions(path, "flickr8k").texts) == NAMES
    assert "0_other.jpg" in read_captions(path, "flickr30k").texts


def test_captions_without_splits_are_divided_by_name(tmp_path: Path) -> None:
    path = tmp_path / "results.token"
    names = [f"{number}.jpg" for number in range(300)]
    path.write_text("".join(f"{n}#0\tA thing .\n" for n in names), encoding="utf-8")
    found = read_captions(path, "flickr30k")
    assert found.splits == ["train", "val"]
    assert 15 < list(found.split_of.values()).count("val") < 45


# -- what is said -----------------------------------------------------------------------------
@pytest.mark.parametrize("flickr", [FLICKR8K, FLICKR30K])
def test_without_archives_it_says_where_to_ask(
    flickr: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = flickr.name  # type: ignore[attr-defined]
    assert main(["data", name, str(tmp_path / "f")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in ("https://forms.illinois.edu/", "research", f"captune data {name} {tmp_path}/f"):
        assert word in line
    assert not (tmp_path / "f").exists()


def test_wrong_paths_and_captions_are_named(pictures: Path, texts: Path, tmp_path: Path) -> None:
    def convert(images: Path, captions: Path) -> None:
        convert_flickr(FLICKR8K, tmp_path / "o", images=str(images), captions=str(captions))

    with pytest.raises(CaptuneError, match=r"nothing at .*none \(--images\)"):
        convert(tmp_path / "none", texts)
    with pytest.raises(CaptuneError, match="no captions of Flickr8k or Flickr30k"):
        convert(pictures, pictures)
    (tmp_path / "c.txt").write_text("hello", encoding="utf-8")
    with pytest.raises(CaptuneError, match=r"c\.txt starts with 'hello'"):
        convert(pictures, tmp_path / "c.txt")
    (tmp_path / "d.json").write_text('{"images": [{}]}', encoding="utf-8")
    with pytest.raises(CaptuneError, match="KeyError"):
        convert(pictures, tmp_path / "d.json")
    (tmp_path / "e.txt").write_text("../x.jpg#0\thello", encoding="utf-8")
    with pytest.raises(CaptuneError, match="no plain file name"):
        convert(pictures, tmp_path / "e.txt")
    (tmp_path / "f.txt").write_text("x.jpg#0\thello", encoding="utf-8")
    with pytest.raises(CaptuneError, match="none of the 1 photos"):
        convert(pictures, tmp_path / "f.txt")
