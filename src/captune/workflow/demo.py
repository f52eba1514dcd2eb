"""demo: draw pictures, train on them, and show what was learnt; needs no network and no data."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from captune.config import Config
from captune.console import say
from captune.data.demo import ATTRIBUTION, draw_demo
from captune.data.sources import open_source
from captune.data.table import CaptionTable
from captune.evaluation.retrieval import Hit
from captune.files import read_json
from captune.recipes import DEFAULT_RECIPE
from captune.training.run import Provenance
from captune.workflow.story import Subject
from captune.workflow.train import Outcome, train_and_tell

# Small enough for five minutes on two cores; what differs from the recipe is said aloud.
SMALL = {
    "towers": "minilm-lite0",
    "image_size": 128,
    "batch_size": 32,
    "num_epochs": 4,
    "learning_rate": 1e-3,
}
# Drawn scenes are far from ImageNet's photos, and four passes are few: all layers and BatchNorm's
# statistics must move, fast, features of the untrained backbone are worth less than a pass of all
# of it (no stage 1), and what guards against overfitting only costs. Chosen on the demo's val; its
# test scenes are others.
SHORT = {
    "train_size_share": 1.0,
    "augment": False,
    "head_epochs": 0,
    "mixup": 0.0,
    "dropout": 0.1,
    "feature_dropout": 0.0,
    "frozen_layers": 0.0,
    "layer_decay": 1.0,
    "freeze_batch_norm": False,
    "ema_decay": 0.98,
}


def demo_config(**overrides: Any) -> Config:
    """The demo's configuration with ``overrides``; ``plain`` is left as plain as it is.

    Raises:
        CaptuneError: an unknown key or a bad value.
    """
    recipe = overrides.get("recipe", DEFAULT_RECIPE)
    short = {} if recipe == "plain" else SHORT
    return Config.from_mapping({"recipe": recipe, **SMALL, **short, **overrides})


DEMO_CONFIG = demo_config()
TRAIN_SCENES, VAL_SCENES, TEST_SCENES = 2000, 300, 500

Things = Counter[tuple[str, str]]
"""How often each ``(name, category)`` stands in a scene."""

EDIBLE = {"fruit", "vegetable", "food"}
LIVING = {"animal", "bird", "insect", "sea animal"}


def _named(*names: str) -> Callable[[Things], bool]:
    return lambda things: any(name in names for name, _ in things)


def _of(*categories: str) -> Callable[[Things], bool]:
    return lambda things: any(category in categories for _, category in things)


# The last three are words that no training caption holds: only the text tower knows that a
# banana is a fruit.
QUERIES: dict[str, Callable[[Things], bool]] = {
    "red hearts": _named("red heart"),
    "a monkey": _named("monkey", "monkey face"),
    "a microscope": _named("microscope"),
    "fruit": _of("fruit"),
    "something to eat": _of(*EDIBLE),
    "animals": _of(*LIVING),
}


def demo(
    out: str | Path = Path("runs") / "demo",
    *,
    images: int = TRAIN_SCENES,
    overrides: Mapping[str, Any] | None = None,
) -> Outcome:
    """Draw ``images`` training scenes beside ``out``, train on them, report on unseen ones.

    A demo that was stopped goes on; one that is complete is measured again.

    Raises:
        CaptuneError: a package of the ``demo`` extra is missing, or ``out`` is occupied.
        TrainingStopped: Ctrl-C; everything is saved.
    """
    folder = Path(out)
    config = demo_config(**(overrides or {}))
    data = folder.with_name(f"{folder.name}-data")
    say(config.describe())
    say(f"drawing {images:,} scenes to learn from, and {TEST_SCENES} in combinations unseen there")
    draw_demo(data, train=images, val=VAL_SCENES, test=TEST_SCENES, seed=config.seed)
    source = open_source(data)
    return train_and_tell(
        source,
        Provenance(str(data.resolve()), train_split="train", val_split="val"),
        config=config,
        out=folder,
        resume=(folder / "last" / "state.safetensors").is_file(),
        subject=demo_subject(folder, data, source.table("test")),
    )


def demo_subject(out: Path, data: Path, table: CaptionTable) -> Subject:
    """The page of the demo: queries whose answers are known from the instances file."""
    things = scene_things(data, table)
    by_path = {str(table.path(row)): found for row, found in enumerate(things)}

    def judge(query: str, hit: Hit) -> bool:
        return QUERIES[query](by_path[hit.image])

    counts = [sum(map(matches, things)) for matches in QUERIES.values()]
    pictures = _zero_shot_pictures(things)
    return Subject(
        table=table,
        title="captune demo: scenes of emoji, searched by text",
        queries=list(QUERIES),
        queries_note=(
            "Pictures are test scenes in combinations unseen in training; ✓ and ✗ say whether the "
            "picture truly holds what was asked for. No training caption holds the words “fruit”, "
            "“eat” or “animals”: what the model makes of them comes from the frozen text tower."
        ),
        judge=judge,
        query_notes=[f"{count} of {len(table)} pictures match" for count in counts],
        labels=[str(truth) for _, truth in pictures],
        pictures=pictures[:5],
        commands=[
            (
                "Search the unseen scenes in your own words:",
                f"captune search {shlex.quote(str(out))} 'two green apples' "
                f"--data {shlex.quote(str(data))} --split test",
            ),
            (
                "Your own photos: a table with the columns image and caption, then",
                "captune train photos.csv --towers minilm-lite0",
            ),
        ],
        attribution=ATTRIBUTION,
    )


def scene_things(data: Path, table: CaptionTable) -> list[Things]:
    """What stands in each picture of ``table``, from the split's instances file."""
    path = data / "annotations" / f"instances_{table.split}2014.json"
    content = read_json(path, what="instances file")
    kinds = {c["id"]: (str(c["name"]), str(c["supercategory"])) for c in content["categories"]}
    row_of = {int(image_id): row for row, image_id in enumerate(table.image_ids)}
    things: list[Things] = [Counter() for _ in range(len(table))]
    for instance in content["annotations"]:
        things[row_of[instance["image_id"]]][kinds[instance["category_id"]]] += 1
    return things


def _zero_shot_pictures(things: list[Things], count: int = 10) -> list[tuple[int, str | None]]:
    """Scenes with a thing each that stands in none of the others, and that thing's name."""
    chosen: list[tuple[int, str | None]] = []
    met: set[str] = set()
    for row, found in enumerate(things):
        names = {name for name, _ in found}
        if not names & met and len(chosen) < count:
            chosen.append((row, max(found, key=lambda thing: found[thing])[0]))
            met |= names
    return chosen
