"""Labelled pictures: by folder, by COCO's objects, by a table; and what is none of these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captune.data.labelled import open_labelled, read_names, training_part
from captune.data.objects import read_objects
from captune.data.sources import open_source
from captune.data.tabular import TableOptions
from captune.errors import CaptuneError
from conftest import write_scene, write_split


def write_classes(root: Path, **counts: int) -> Path:
    """``counts`` pictures in a folder for each class."""
    for name, count in counts.items():
        for number in range(count):
            write_scene(root / name / f"{number}.jpg", "black", "red")
    return root


def write_instances(
    folder: Path, split: str, objects: list[list[tuple[int, float, int]]], **changes: Any
) -> None:
    """``objects`` of each image in the order of the captions file: ``(category, area, crowd)``."""
    annotations = folder / "annotations"
    captions = json.loads((annotations / f"captions_{split}2014.json").read_text(encoding="utf-8"))
    listed = [
        {"image_id": image["id"], "category_id": category, "area": area, "iscrowd": crowd}
        for image, found in zip(captions["images"], objects, strict=False)
        for category, area, crowd in found
    ]
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "traffic_light"}]
    value = {"images": captions["images"], "annotations": listed, "categories": categories}
    path = annotations / f"instances_{split}2014.json"
    path.write_text(json.dumps({**value, **changes}), encoding="utf-8")


# -- a folder for each class --------------------------------------------------------------------
def test_the_folder_is_the_class(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "pets", hot_dog=2, cat=3)
    (root / "hot_dog" / "notes.txt").write_text("no picture", encoding="utf-8")
    found = open_labelled(root)
    assert (found.keys, found.names) == (["cat", "hot_dog"], ["cat", "hot dog"])
    assert found.target.tolist() == [0, 0, 0, 1, 1]
    assert [found.table.file_name(row) for row in (0, 3)] == ["cat/0.jpg", "hot_dog/0.jpg"]
    assert (found.table.name, found.table.split) == ("pets", "all")
    assert found.present is None and training_part(root, found) is None


def test_split_folders_stand_above_the_classes(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    write_classes(root / "train", cat=4, dog=1, owl=1)
    write_classes(root / "test", cat=2, dog=1)
    test = open_labelled(root)
    assert (test.table.split, len(test.table)) == ("test", 3)
    train = training_part(root, test)
    assert train is not None and train.table.split == "train"
    assert train.keys == ["cat", "dog"]
    assert train.target.tolist() == [0, 0, 0, 0, 1, -1]  # an owl is of none of the test's classes
    own = open_labelled(root, "train")
    assert own.keys == ["cat", "dog", "owl"] and training_part(root, own) is None


def test_an_unknown_split_is_named(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    write_classes(root / "test", cat=1, dog=1)
    with pytest.raises(CaptuneError, match=r"no split 'tset' in .*; did you mean 'test'"):
        open_labelled(root, "tset")
    with pytest.raises(CaptuneError, match="it holds the classes themselves"):
        open_labelled(root / "test", "val")


def test_pictures_that_lie_loose_are_no_classes(tmp_path: Path) -> None:
    write_scene(tmp_path / "loose" / "1.jpg", "black", "red")
    with pytest.raises(CaptuneError, match="a folder for each class"):
        open_labelled(tmp_path / "loose")


def test_one_class_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(CaptuneError, match="shows 1 classes: at least two"):
        open_labelled(write_classes(tmp_path / "pets", cat=2))


def test_an_empty_class_is_said_and_stays_a_candidate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_classes(tmp_path / "pets", cat=1, dog=1)
    (root / "owl").mkdir()
    assert open_labelled(root).keys == ["cat", "dog", "owl"]
    assert "1 of 3 classes have no picture" in capsys.readouterr().err


# -- words --------------------------------------------------------------------------------------
def test_other_words_for_some_classes(tmp_path: Path) -> None:
    found = open_labelled(write_classes(tmp_path / "pets", n01=1, n02=1))
    path = tmp_path / "names.json"
    path.write_text('{"n01": "tabby cat"}', encoding="utf-8")
    assert found.named(read_names(path)).names == ["tabby cat", "n02"]
    with pytest.raises(CaptuneError, match="'n03'; did you mean"):
        found.named({"n03": "owl"})


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', "{"])
def test_names_of_another_form_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "names.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CaptuneError, match=r"names\.json"):
        read_names(path)


# -- COCO's objects -----------------------------------------------------------------------------
@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Six pictures of 40 x 40 pixels."""
    folder = tmp_path / "squares"
    write_split(folder, "val", 6)
    return folder


def test_the_largest_object_decides_where_it_dominates(scenes: Path) -> None:
    half, tenth = 800.0, 160.0
    write_instances(
        scenes,
        "val",
        [
            [(7, half, 0), (3, tenth, 0)],  # a dog, far larger
            [(7, half, 0), (3, half * 0.6, 0)],  # neither
            [(3, tenth, 0)] * 3,  # three lights, and nothing else
            [(7, 0.04 * 1600, 0)],  # too small to be what the picture is of
            [(7, tenth, 0), (3, half, 1)],  # a crowd has no size
            [],
        ],
    )
    found = open_labelled(scenes)
    assert (found.keys, found.names) == (["traffic_light", "dog"], ["traffic light", "dog"])
    assert found.target.tolist() == [1, -1, 0, -1, 1, -1]
    assert found.present is not None
    assert found.present.tolist() == [
        [True, True],
        [True, True],
        [True, False],
        [False, True],
        [True, True],
        [False, False],
    ]
    objects = read_objects(open_source(scenes).table("val"))
    assert objects.counts.sum(axis=1).tolist() == [2, 2, 3, 1, 2, 0]
    assert objects.largest[0].tolist() == pytest.approx([0.1, 0.5])


def test_a_training_split_with_objects_is_learnt_from(scenes: Path) -> None:
    write_split(scenes, "train", 4, first=9)
    write_instances(scenes, "val", [[(7, 800, 0)], [(3, 800, 0)]])
    val = open_labelled(scenes, "val")
    assert training_part(scenes, val) is None
    write_instances(scenes, "train", [[(3, 800, 0)], [(7, 800, 0)], []])
    train = training_part(scenes, val)
    assert train is not None and train.target.tolist() == [0, 1, -1, -1]


def test_captions_alone_are_no_labels(scenes: Path) -> None:
    with pytest.raises(CaptuneError, match=r"no annotations/instances_\*2014\.json"):
        open_labelled(scenes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"categories": []}, "no categories"),
        ({"images": [{"id": 1}]}, "'width'"),
        ({"annotations": [{"image_id": 1000}]}, "'category_id'"),
        ({"annotations": [{"image_id": 5, "category_id": 7, "area": 1}]}, "image 5"),
        ({"images": [{"id": 1, "width": 4, "height": 4}], "annotations": []}, "of other data"),
    ],
)
def test_annotations_of_another_form_are_refused(
    scenes: Path, changes: dict[str, Any], words: str
) -> None:
    write_instances(scenes, "val", [[(7, 800, 0)]], **changes)
    with pytest.raises(CaptuneError, match=words):
        open_labelled(scenes)


# -- a table ------------------------------------------------------------------------------------
def test_a_table_of_labels(tmp_path: Path) -> None:
    write_classes(tmp_path, a=3)
    table = tmp_path / "labels.csv"
    rows = ["image,kind,split"]
    rows += [f"a/{number}.jpg,{('cat', 'dog', 'cat')[number]},test" for number in range(3)]
    table.write_text("\n".join(rows), encoding="utf-8")
    found = open_labelled(table, "test", TableOptions(caption_columns=("kind",)))
    assert (found.keys, found.target.tolist()) == (["cat", "dog"], [0, 1, 0])


def test_several_labels_of_a_picture_are_refused(tmp_path: Path) -> None:
    write_classes(tmp_path, a=2)
    table = tmp_path / "labels.csv"
    table.write_text("image,caption\na/0.jpg,cat\na/1.jpg,dog\na/1.jpg,owl\n", encoding="utf-8")
    with pytest.raises(CaptuneError, match=r"a/1\.jpg has 2 labels"):
        open_labelled(table)


def test_a_table_that_nothing_splits_has_nothing_apart_to_learn_from(tmp_path: Path) -> None:
    write_classes(tmp_path, a=8)
    table = tmp_path / "labels.csv"
    rows = [f"a/{number}.jpg,{('cat', 'dog')[number % 2]}" for number in range(8)]
    table.write_text("\n".join(["image,caption", *rows]), encoding="utf-8")
    found = open_labelled(table)
    assert found.table.split == "all" and training_part(table, found) is None


def test_the_demo_s_scenes_have_objects(tmp_path: Path) -> None:
    """So that the demo can be classified with no other data."""
    from captune.data.demo import draw_demo

    draw_demo(tmp_path / "demo", train=1, val=1, test=12, size=32, progress=False)
    objects = read_objects(open_source(tmp_path / "demo").table("test"))
    assert objects.counts.sum(axis=1).min() >= 1
    assert np.all(objects.largest <= 1)


def test_captions_are_not_taken_for_labels(tmp_path: Path) -> None:
    write_classes(tmp_path, a=1)
    rows = [f"a/{number}.jpg,caption number {number}" for number in range(120)]
    for number in range(1, 120):
        (tmp_path / "a" / f"{number}.jpg").write_bytes((tmp_path / "a" / "0.jpg").read_bytes())
    table = tmp_path / "photos.csv"
    table.write_text("\n".join(["image,caption", *rows]), encoding="utf-8")
    with pytest.raises(CaptuneError, match=r"120 different labels.*--caption-column"):
        open_labelled(table)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "vehicles", bus=1, car=1, train=2)
    found = open_labelled(root)
    assert found.keys == ["bus", "car", "train"] and training_part(root, found) is None


def test_a_training_split_that_cannot_be_had_is_said_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody asked for it: what was asked for is still measured."""
    write_classes(tmp_path, a=2)
    table = tmp_path / "labels.csv"
    table.write_text("image,caption,split\na/0.jpg,cat,test\na/1.jpg,dog,test\n", encoding="utf-8")
    found = open_labelled(table, "test")
    assert training_part(table, found) is None  # it has no such split
    root = tmp_path / "pets"
    write_classes(root / "train", cat=3)
    write_classes(root / "test", cat=1, dog=1)
    assert training_part(root, open_labelled(root)) is None
    assert "no training split to learn from: pets train" in capsys.readouterr().err


def test_a_training_split_of_other_names_has_nothing_to_teach(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    write_classes(root / "train", Cat=2, Dog=2)
    write_classes(root / "test", cat=1, dog=1)
    assert training_part(root, open_labelled(root)) is None
