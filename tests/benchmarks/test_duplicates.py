"""Near-duplicates are counted as one would count them by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from captune.data.table import CaptionTable

Script = Callable[[str], ModuleType]
ANGLES = (0, 20, 40, 3, 90)  # degrees: of two captions of image 0, two of image 1, one of image 2


def test_pairs_are_counted_and_drawn_by_their_cosine(script: Script) -> None:
    duplicates = script("duplicates")
    photos = [(number, f"{number}.jpg", Path(f"{number}.jpg")) for number in range(3)]
    captions = [(place, "words", owner) for place, owner in enumerate((0, 0, 1, 1, 2))]
    table = CaptionTable.build(photos, captions, name="made", split="train")
    turned = [math.radians(angle) for angle in ANGLES]
    text = torch.tensor([[math.cos(a), math.sin(a)] for a in turned])
    rows, cosine, same = duplicates.cosines_of(table, text, 5, 0)
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 4]
    by_threshold = {r["threshold"]: r for r in duplicates.counted(cosine, same, met=50)}
    # Of two images: 0 and 3 (3 degrees), 1 and 2 (20), 1 and 3 (17), 0 and 2 (40).
    assert [by_threshold[t]["met in a step"] for t in (0.75, 0.9, 0.95)] == [16.0, 12.0, 8.0]
    assert [by_threshold[t]["captions with one, %"] for t in (0.75, 0.95)] == [80.0, 60.0]
    # Of one image: 0 and 1 (20 degrees, 0.94), 2 and 3 (37, 0.80).
    assert [by_threshold[t]["pairs of one image, %"] for t in (0.75, 0.9, 0.95)] == [100, 50, 0]

    found = duplicates.drawn(cosine, same, 10, 0)
    meant = {
        band: {frozenset((int(rows[query]), other)) for query, other in pairs}
        for band, pairs in found.items()
    }
    assert meant["0.95 to 1.0"] == {frozenset((0, 3)), frozenset((1, 3))}
    assert meant["0.9 to 0.95"] == {frozenset((1, 2))}
    assert meant["0.75 to 0.8"] == {frozenset((0, 2))} and not meant["0.8 to 0.85"]
    assert {len(p) for p in duplicates.drawn(cosine, same, 1, 0).values()} == {0, 1}
