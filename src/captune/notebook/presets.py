"""One word chooses the data, and with it towers, queries and labels that suit it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captune.console import say
from captune.data.demo import draw_demo
from captune.data.sources import open_source
from captune.errors import CaptuneError
from captune.notebook.display import plainly, show_table
from captune.workflow.demo import DEMO_CONFIG, QUERIES, TEST_SCENES, TRAIN_SCENES, VAL_SCENES
from captune.workflow.story import LABELS

COCO_QUERIES = (
    "sport",
    "a cat",
    "a plate of food",
    "a train at a station",
    "people on a beach",
    "a red bus",
)
# Shrunk to a shorter side that still holds the towers' 224 pixels.
SHORTER_SIDE = 256
COSTS = {
    "demo": "draws 2,800 little pictures: 30 MB of disk, half a minute, no network",
    "coco": (
        "fetches 20 GB from COCO's own host and keeps 5 GB of it (shorter side 256 pixels): half "
        "an hour to two hours by the line and the cores; run again, it goes on where it stopped"
    ),
    "kaggle": (
        "takes Kaggle's copy of COCO 2014 and keeps 5 GB of it (shorter side 256 pixels): half an "
        "hour where the copy is attached to a notebook on Kaggle; elsewhere it needs 41 GB of disk "
        "while it is fetched, and an hour or two by the line"
    ),
}


@dataclass(frozen=True)
class Preset:
    """What follows from the choice of the data.

    Attributes:
        data: ``demo``, ``coco``, ``kaggle``, or the path of an own folder or table.
        config: config values that suit it; the others keep their defaults.
        queries: to search for.
        labels: to tell apart; ``None``: some that the data itself suggests.
        why: queries to explain on the pictures that they find.
        sketch: config values that make a training small, for the comparison of flags.
    """

    data: str
    config: Mapping[str, Any] = field(default_factory=dict)
    queries: Sequence[str] = COCO_QUERIES
    labels: Sequence[str] | None = LABELS
    why: Sequence[str] = ("a cat", "a train at a station", "a red bus")
    sketch: Mapping[str, Any] = field(default_factory=lambda: {"num_epochs": 1})


@plainly
def preset(data: str) -> Preset:
    """``demo`` (offline, small towers), ``coco`` or ``kaggle`` (CLIP and ResNet-50), or own data.

    Raises:
        CaptuneError: neither a preset nor anything that is there.
    """
    if data == "demo":
        named = {"recipe": DEMO_CONFIG.recipe, "towers": DEMO_CONFIG.towers}
        values = {**named, **DEMO_CONFIG.differences()}
        sketch = {"num_epochs": 1, "image_size": 96}
        why = ("a microscope", "fruit", "animals")
        return Preset(data, values, tuple(QUERIES), None, why, sketch)
    if data not in COSTS and not Path(data).expanduser().exists():
        raise CaptuneError(
            f"no preset and no file or folder is called {data!r}: give {', '.join(COSTS)}, a "
            "folder in the COCO 2014 layout, or a table of images and captions"
        )
    return Preset(data)


@plainly
def prepare_data(data: str | Preset, folder: str | Path = "data") -> str:
    """Say what it costs, then draw or download the data, or look at one's own; show its splits.

    Args:
        data: a preset or its word, or the path of an own folder or table.
        folder: where drawn or downloaded data is put; a local disk, for it is many small files.

    Returns:
        The path of the data, as :func:`captune.open_source` takes it.

    Raises:
        CaptuneError: it cannot be had: the disk is full, a server does not answer, nothing is
            there.
    """
    kind = data.data if isinstance(data, Preset) else data
    if kind in COSTS:
        say(f"{kind}: {COSTS[kind]}")
    path = _fetched(kind, Path(folder))
    source = open_source(path)
    rows = []
    for split in dict.fromkeys((source.train_split, source.val_split, *_test_split(source.splits))):
        table = source.table(split)
        rows.append((split, f"{len(table):,}", f"{table.captions.num_rows:,}"))
    show_table(f"Data in {path}", ("split", "images", "captions"), rows)
    return str(path)


def _fetched(kind: str, folder: Path) -> Path:
    if kind == "demo":
        root = folder / "demo"
        # Notebooks paint stderr, where its bar is drawn, like an error.
        with contextlib.redirect_stderr(sys.stdout):
            draw_demo(root, train=TRAIN_SCENES, val=VAL_SCENES, test=TEST_SCENES)
        return root
    if kind == "coco":
        from captune.download.coco import download_coco

        return Path(download_coco(folder / "coco2014", shrink=SHORTER_SIDE))
    if kind == "kaggle":
        from captune.download.kaggle import download_kaggle

        return Path(download_kaggle(folder / "coco2014-kaggle", shrink=SHORTER_SIDE))
    return Path(kind).expanduser()


def _test_split(splits: Sequence[str]) -> list[str]:
    return [split for split in ("test",) if split in splits]
