"""Own tables: the usual spellings, templates, lists of captions, and splits."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captune.data.sources import open_source
from captune.data.tabular import TableOptions, image_id
from captune.errors import CaptuneError
from conftest import write_scene


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with photos/0.jpg to photos/39.jpg."""
    for number in range(40):
        write_scene(tmp_path / "photos" / f"{number}.jpg", "red", "blue")
    return tmp_path


def csv(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "header", ["image,caption", "file_name,text", "filepath,title", "Image,Caption"]
)
def test_the_usual_spellings_are_recognised(photos: Path, header: str) -> None:
    path = csv(photos, f"{header}\nphotos/0.jpg,one\nphotos/1.jpg,two\n")
    assert open_source(path).table("all").texts() == ["one", "two"]


def test_captions_of_an_image_gather_from_rows_columns_and_lists(photos: Path) -> None:
    path = csv(
        photos,
        "image,title,note\nphotos/0.jpg,a,b\nphotos/1.jpg,c,\n./photos/0.jpg,d,e\n",
    )
    table = open_source(path, TableOptions(caption_columns=("title", "note"))).table("all")
    assert [[table.caption(int(r)) for r in table.captions_of(i)] for i in range(2)] == [
        ["a", "b", "d", "e"],
        ["c"],
    ]
    rows = [
        {"image": "photos/0.jpg", "captions": ["x", "y"]},
        {"image": "photos/1.jpg", "captions": ["z"]},
    ]
    lines = csv(photos, "\n".join(map(json.dumps, rows)), "table.jsonl")
    assert open_source(lines).table("all").caption_counts.tolist() == [2, 1]
    pq.write_table(pa.Table.from_pylist(rows), photos / "table.parquet")
    assert open_source(photos / "table.parquet").table("all").texts() == ["x", "y", "z"]


def test_a_template_writes_captions_from_columns(photos: Path) -> None:
    path = csv(photos, "image,title,colour\nphotos/0.jpg,shoe,red\nphotos/1.jpg,hat,007\n")
    table = open_source(path, TableOptions(caption="{title}, {colour}")).table("all")
    assert table.texts() == ["shoe, red", "hat, 007"]


def test_a_template_runs_no_code(photos: Path) -> None:
    path = csv(photos, "image,title\nphotos/0.jpg,shoe\n")
    with pytest.raises(CaptuneError, match=r"title\.__class__"):
        open_source(path, TableOptions(caption="{title.__class__}")).table("all")


def test_quoted_fields_hold_commas_quotes_and_lines(photos: Path) -> None:
    path = csv(photos, 'image,caption\nphotos/0.jpg,"one, ""two""\nthree"\n')
    assert open_source(path).table("all").texts() == ['one, "two"\nthree']


def test_a_split_column_is_obeyed(photos: Path) -> None:
    rows = ["image,caption,split"]
    for number, split in enumerate(["train", "training", "val", "validation", "dev", "test"]):
        rows.append(f"photos/{number}.jpg,c{number},{split}")
    source = open_source(csv(photos, "\n".join(rows)))
    assert source.evaluation_split == "val"
    assert [source.table(s).texts() for s in ("train", "val", "test")] == [
        ["c0", "c1"],
        ["c2", "c3", "c4"],
        ["c5"],
    ]


def test_without_a_split_a_tenth_of_the_images_is_held_out(photos: Path) -> None:
    rows = [f"photos/{i}.jpg,c{i}-{turn}" for turn in range(2) for i in range(40)]
    source = open_source(csv(photos, "image,caption\n" + "\n".join(rows)))
    train, val = source.table("train"), source.table("val")
    expected = {f"photos/{i}.jpg" for i in range(40) if image_id(f"photos/{i}.jpg") % 10 == 0}
    assert set(val.file_keys()) == expected and expected
    assert not set(train.file_keys()) & set(val.file_keys())
    assert len(train) + len(val) == 40 == len(source.table("all"))


def test_a_table_too_small_for_the_draw_holds_one_image_out_and_does_not_train_on_it(
    photos: Path,
) -> None:
    names = [f"photos/{i}.jpg" for i in range(40) if image_id(f"photos/{i}.jpg") % 10][:3]
    text = "image,caption\n" + "\n".join(f"{name},c" for name in names)
    source = open_source(csv(photos, text))
    train, val = source.table("train"), source.table("val")
    assert val.file_keys() == [min(names, key=image_id)]
    assert set(train.file_keys()) == set(names) - set(val.file_keys())


def test_the_held_out_images_stay_when_the_table_grows(photos: Path) -> None:
    rows = [f"photos/{i}.jpg,c" for i in range(40)]
    small = open_source(csv(photos, "image,caption\n" + "\n".join(rows[:25]), "small.csv"))
    large = open_source(csv(photos, "image,caption\n" + "\n".join(rows), "large.csv"))
    assert set(small.table("val").file_keys()) <= set(large.table("val").file_keys())


def test_a_val_file_is_the_validation_split(photos: Path) -> None:
    train = csv(photos, "image,caption\n" + "\n".join(f"photos/{i}.jpg,c{i}" for i in range(5)))
    val = csv(photos, "image,caption\nphotos/9.jpg,nine\n", "val.csv")
    source = open_source(train, TableOptions(val=str(val)))
    assert len(source.table("train")) == 5
    assert source.table("val").texts() == ["nine"]


def test_evaluating_a_bare_table_takes_all_of_it(photos: Path) -> None:
    path = csv(photos, "image,caption\nphotos/0.jpg,one\nphotos/1.jpg,two\n")
    source = open_source(path)
    assert len(source.table(source.evaluation_split)) == 2


def test_images_that_are_not_there_are_counted(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = csv(photos, "image,caption\nphotos/0.jpg,one\nnowhere.jpg,two\n")
    assert open_source(path).table("all").texts() == ["one"]
    assert "1 images are not there: nowhere.jpg" in capsys.readouterr().err


def test_windows_paths_are_read(photos: Path) -> None:
    path = csv(photos, "image,caption\nphotos\\0.jpg,one\n")
    assert open_source(path).table("all").texts() == ["one"]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("picture,caption\na,b\n", TableOptions(), "no image column.*--image-column"),
        ("image,words\na,b\n", TableOptions(), "no caption column.*--caption-column"),
        ("image,caption\na,b\n", TableOptions(image_column="img"), "no column 'img'"),
        ("image,title\na,b\n", TableOptions(caption="{titel}"), "did you mean 'title'"),
        ("image,title\na,b\n", TableOptions(caption="title"), "names no column"),
        ("image,caption\nnowhere.jpg,b\n", TableOptions(), "none of the 1 images"),
        ("image,caption\n", TableOptions(), "no rows"),
    ],
)
def test_wrong_tables_are_refused(
    tmp_path: Path, text: str, options: TableOptions, words: str
) -> None:
    with pytest.raises(CaptuneError, match=words):
        open_source(csv(tmp_path, text), options).table("all")


def test_splits_are_those_that_have_rows(photos: Path) -> None:
    rows = "photos/0.jpg,a,train\nphotos/1.jpg,b,test\n"
    path = csv(photos, f"image,caption,split\n{rows}")
    assert open_source(path).splits == ["test", "train", "all"]
    val = csv(photos, "image,caption\nphotos/9.jpg,nine\n", "val.csv")
    assert open_source(path, TableOptions(val=str(val))).splits == ["test", "train", "val", "all"]
    bare = csv(photos, "image,caption\nphotos/0.jpg,a\n", "bare.csv")
    assert open_source(bare).splits == ["train", "val", "all"]


def test_two_columns_of_one_name_are_refused(photos: Path) -> None:
    path = csv(photos, "image,caption,caption\nphotos/0.jpg,a,b\n")
    with pytest.raises(CaptuneError, match="several columns 'caption'"):
        open_source(path).table("all")
