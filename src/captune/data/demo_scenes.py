"""What the demo's scenes hold: which things, how many, where, and on which background.

Nothing here draws. A scene lives in unit coordinates (0 to 1, the origin in the upper left
corner), so that the same seed gives the same scenes at every picture size.
"""

from __future__ import annotations

import csv
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from random import Random

# Colours of the backgrounds: light or middling, so that the black outlines of the things show.
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 243),
    "grey": (178, 182, 186),
    "beige": (235, 218, 185),
    "yellow": (250, 226, 110),
    "orange": (246, 172, 92),
    "red": (226, 108, 98),
    "pink": (250, 178, 202),
    "purple": (176, 142, 218),
    "blue": (104, 152, 226),
    "turquoise": (96, 202, 196),
    "green": (122, 192, 112),
    "brown": (176, 134, 98),
}
PATTERNS = (
    "plain",
    "gradient",
    "rows",
    "columns",
    "diagonal",
    "checks",
    "dots",
    "grid",
    "waves",
    "speckles",
)
_TEST_SHARE = 5  # one pair of things in five is kept for the test scenes


@dataclass(frozen=True)
class Thing:
    """One kind of thing: its glyph, its name, the plural and its supercategory."""

    emoji: str
    name: str
    plural: str
    category: str


@dataclass(frozen=True)
class Placed:
    """One thing in a scene: centre and size as shares of the side, rotation in degrees."""

    thing: int
    x: float
    y: float
    size: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """A scene before it is drawn: things from back to front, on a pattern of two colours.

    `seed` feeds what is left to chance after this: the wording and the fine details.
    """

    placed: tuple[Placed, ...]
    pattern: str
    colours: tuple[str, str]
    seed: int


def load_things() -> list[Thing]:
    """Read the list of things that ships with captune, in the order of its category ids."""
    text = (resources.files("captune.data") / "demo_things.csv").read_text(encoding="utf-8")
    return [Thing(**row) for row in csv.DictReader(text.splitlines())]


def is_test_pair(seed: int, one: int, other: int) -> bool:
    """Whether two things may meet in test scenes only (True) or in train and val only (False).

    A hash decides, not a drawn list: the answer does not depend on how many scenes are asked for.
    """
    low, high = sorted((one, other))
    return zlib.crc32(f"{seed}/{low}/{high}".encode()) % _TEST_SHARE == 0


def compose_scene(things: Sequence[Thing], *, split: str, number: int, seed: int) -> Scene:
    """Make scene `number` of `split` ("train", "val" or "test").

    Each scene has a random stream of its own, so a larger set begins with the smaller one's
    scenes. Scenes of the test split hold two or three kinds, every two of which are a test pair;
    the others hold one to three kinds and no test pair.
    """
    rng = Random(f"captune-demo/{seed}/{split}/{number}")
    kinds = _choose_kinds(rng, things, split=split, seed=seed)
    counts = _choose_counts(rng, len(kinds))
    placed = _place(rng, kinds, counts)
    first, second = rng.sample(list(COLOURS), 2)
    return Scene(tuple(placed), rng.choice(PATTERNS), (first, second), rng.randrange(2**32))


def _choose_kinds(rng: Random, things: Sequence[Thing], *, split: str, seed: int) -> list[int]:
    for_test = split == "test"
    wanted = rng.choices((1, 2, 3), (0, 3, 2) if for_test else (2, 5, 3))[0]
    kinds = [rng.randrange(len(things))]
    alike = [i for i, thing in enumerate(things) if thing.category == things[kinds[0]].category]
    for _ in range(2000):  # bounded: a pair may have no third kind that fits both
        if len(kinds) == wanted:
            break
        # Things that look alike often meet, so that a coarse glance cannot tell scenes apart.
        pool = alike if rng.random() < 0.4 else range(len(things))
        new = rng.choice(pool)
        if new not in kinds and all(is_test_pair(seed, new, k) == for_test for k in kinds):
            kinds.append(new)
    return kinds


def _choose_counts(rng: Random, kinds: int) -> list[int]:
    counts = [rng.choices((1, 2, 3, 4), (50, 25, 16, 9))[0] for _ in range(kinds)]
    while sum(counts) > 6:  # more would not fit without hiding one another
        counts[counts.index(max(counts))] -= 1
    return counts


def _place(rng: Random, kinds: Sequence[int], counts: Sequence[int]) -> list[Placed]:
    """Put the things down, each kind around an anchor of its own, overlapping a little."""
    crowd = {1: 1.15, 2: 1.05, 3: 0.95}.get(sum(counts), 0.82)
    cells = rng.sample([(x, y) for x in (0.2, 0.5, 0.8) for y in (0.2, 0.5, 0.8)], len(kinds))
    placed: list[Placed] = []
    for kind, count, (cell_x, cell_y) in zip(kinds, counts, cells, strict=True):
        kind_size = rng.uniform(0.24, 0.4) * crowd
        for _ in range(count):
            size = kind_size * rng.uniform(0.88, 1.12)
            x, y = _free_place(rng, cell_x, cell_y, size, placed)
            placed.append(Placed(kind, x, y, size, rng.uniform(-25, 25)))
    return placed


def _free_place(
    rng: Random, cell_x: float, cell_y: float, size: float, placed: Sequence[Placed]
) -> tuple[float, float]:
    """A place near the anchor that overlaps little, or else the one that overlaps least."""
    margin = 0.6 * size + 0.01  # a turned thing is a little wider
    best, most_room = (cell_x, cell_y), -1.0
    for step in range(50):
        spread = 0.05 + 0.004 * step
        x = min(max(rng.gauss(cell_x, spread), margin), 1 - margin)
        y = min(max(rng.gauss(cell_y, spread), margin), 1 - margin)
        gaps = (math.dist((x, y), (p.x, p.y)) / (size + p.size) for p in placed)
        room = min(gaps, default=1.0)
        if room > most_room:
            best, most_room = (x, y), room
        if room >= 0.42:
            break
    return best
