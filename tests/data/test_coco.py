"""The COCO 2014 layout, and the Karpathy splits of the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from captune.data.coco import CocoSource, karpathy_ids
from captune.data.sources import find_dataset_dir, open_source
from captune.errors import CaptuneError
from conftest import write_split


def test_one_split_alone_is_enough(tmp_path: Path) -> None:
    write_split(tmp_path / "only-val", "val", 4, captions=3)
    table = open_source(tmp_path / "only-val").table("val")
    assert (len(table), table.captions.num_rows) == (4, 12)


def test_file_names_come_from_the_json(coco: Path) -> None:
    table = open_source(coco).table("train")
    assert table.file_name(0) == "scene_train_001000.jpg"
    assert all(table.path(row).is_file() for row in range(len(table)))


def test_missing_images_are_left_out_and_counted(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    next((coco / "val2014").iterdir()).unlink()
    assert len(open_source(coco).table("val")) == 7
    assert "1 of 8 images are not there" in capsys.readouterr().err


def test_a_sample_validates_on_its_val(coco: Path) -> None:
    source = CocoSource(coco)
    assert not source.holds_karpathy and source.val_split == "val"


def test_a_karpathy_split_asked_for_by_name_must_be_whole(coco: Path) -> None:
    with pytest.raises(CaptuneError, match=r"karpathy-test needs all of COCO's val2014.*5,000"):
        CocoSource(coco).table("karpathy-test")


def test_karpathy_ids_are_the_published_ones(shared_data: Path) -> None:
    """File names of both splits, and the 25,000 caption ids of the test in their order."""
    ids = karpathy_ids()
    folder = shared_data / "coco_karpathy"
    stated = json.loads((folder / "captions_karpathy_test5k.json").read_text(encoding="utf-8"))
    assert ids["test"].tolist() == [image["id"] for image in stated["images"]]
    assert ids["test_captions"].tolist() == [a["id"] for a in stated["annotations"]]
    for part in ("val", "test"):
        lines = (folder / f"karpathy_{part}_images.txt").read_text(encoding="utf-8").splitlines()
        named = {line.split()[0] for line in lines}
        assert named == {f"val2014/COCO_val2014_{i:012d}.jpg" for i in ids[part]}


def test_karpathy_splits_of_a_whole_coco(whole_coco: Path) -> None:
    ids = karpathy_ids()
    source = CocoSource(whole_coco)
    assert source.holds_karpathy and source.val_split == "karpathy-val"

    test = source.table("karpathy-test")
    assert test.image_ids.tolist() == ids["test"].tolist()
    assert test.captions["caption_id"].to_pylist() == ids["test_captions"].tolist()
    assert test.image_of_caption.tolist() == [i for i in range(5000) for _ in range(5)]

    val = source.table("karpathy-val")
    assert val.image_ids.tolist() == ids["val"].tolist()
    assert val.captions.num_rows == 6 * 5000

    train = source.table("karpathy-train")
    assert len(train) == 3 + 12
    held_out = {*test.file_keys(), *val.file_keys()}
    assert not held_out & set(train.file_keys())
    assert train.caption(int(train.captions_of(3)[0])) == f"caption {10**8 + 900_000}"
    assert len(source.table("train")) == 3


def test_an_incomplete_whole_coco_is_refused_by_name(whole_coco: Path) -> None:
    gone = f"COCO_val2014_{int(karpathy_ids()['test'][0]):012d}.jpg"
    (whole_coco / "val2014" / gone).unlink()
    source = CocoSource(whole_coco)
    assert source.val_split == "val"
    for split in ("karpathy-test", "karpathy-train"):
        with pytest.raises(CaptuneError, match=gone):
            source.table(split)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "no list 'images'"),
        ('{"annotations": []}', "no list 'images'"),
        ('{"images": []}', "no list 'annotations'"),
        ('{"images": [{"id": 1}], "annotations": []}', "'file_name'"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}', "no captions"),
        (
            '{"images": [{"id": 1, "file_name": "a.jpg"}],'
            ' "annotations": [{"id": 5, "image_id": 9, "caption": "x"}]}',
            "caption 5 belongs to image 9",
        ),
        ('{"images": [', "cannot be read as JSON"),
    ],
)
def test_malformed_annotations_are_refused(coco: Path, content: str, words: str) -> None:
    path = coco / "annotations" / "captions_val2014.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CaptuneError, match=words):
        open_source(coco).table("val")


def test_unknown_split_names_the_nearest(coco: Path) -> None:
    with pytest.raises(CaptuneError, match=r"captions_vall2014\.json\); did you mean 'val'"):
        open_source(coco).table("vall")


def test_where_the_data_lies(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CaptuneError, match="CAPTUNE_DATA"):
        find_dataset_dir()
    (tmp_path / "data" / "coco2014").mkdir(parents=True)
    assert find_dataset_dir() == Path("data") / "coco2014"
    monkeypatch.setenv("CAPTUNE_DATA", str(coco))
    assert find_dataset_dir() == coco
    assert find_dataset_dir(tmp_path) == tmp_path
