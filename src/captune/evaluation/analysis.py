"""Where retrieval is right and where it goes wrong: easy and hard queries, hubs, groups, twins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captune.evaluation.hubness import rows_per_block
from captune.metrics import RECALL_AT
from captune.ranks import Ranks

ALIKE = 0.98  # cosine of two images' embeddings from which on they are told as near twins
QUARTERS = (0.25, 0.5, 0.75)

Pair = tuple[int, int, float]
"""Two images' places and the cosine of their embeddings."""


@dataclass(frozen=True)
class Group:
    """Recall in percent, ``R@1``, ``R@5`` and ``R@10``, of the queries of one kind."""

    label: str
    queries: int
    recalls: dict[str, float]


def caption_margins(image: Tensor, text: Tensor, owner: Tensor) -> Tensor:
    """How far each caption's own image stands above the best other one; negative where below.

    Args:
        image: ``(N, D)`` unit length, two or more.
        text: ``(M, D)`` unit length.
        owner: ``(M,)`` int64, each caption's image.

    Returns:
        ``(M,)`` differences of cosines.
    """
    block = rows_per_block(len(image))
    parts = []
    for start in range(0, len(text), block):
        scores = text[start : start + block] @ image.T  # (b, N)
        mine = owner[start : start + block, None]
        own = scores.gather(1, mine)
        parts.append((own - scores.scatter(1, mine, -torch.inf).max(1, keepdim=True).values)[:, 0])
    return torch.cat(parts)


def recall_of(ranks: Tensor, label: str) -> Group:
    """Of ``ranks (Q,)``, one or more."""
    recalls = {f"R@{k}": 100 * float((ranks <= k).double().mean()) for k in RECALL_AT}
    return Group(label, len(ranks), recalls)


def groups_by_length(ranks: Ranks, texts: Sequence[str]) -> list[Group]:
    """Text→image recall of captions by their number of words, in about four equal parts."""
    words = np.array([len(text.split()) for text in texts])
    bounds = np.unique(np.quantile(words, QUARTERS, method="lower")).tolist()
    return _grouped(ranks.caption, words, [int(bound) + 1 for bound in bounds], "words", "word")


def groups_by_objects(ranks: Ranks, objects: npt.NDArray[np.int64]) -> list[Group]:
    """Image→text recall of images by their number of ``objects (N,)``."""
    return _grouped(ranks.image, objects, [1, 2, 3, 5, 10], "objects", "object")


def _grouped(
    ranks: Tensor, values: npt.NDArray[np.int64], starts: Sequence[int], many: str, one: str
) -> list[Group]:
    """Recall of the queries whose value lies from one start to the next; empty groups left out."""
    low, high = int(values.min()), int(values.max())
    edges = [low, *(start for start in starts if low < start <= high), high + 1]
    found = []
    for first, after in pairwise(edges):
        inside = torch.from_numpy((values >= first) & (values < after))
        if bool(inside.any()):
            span = str(first) if after == first + 1 else f"{first} to {after - 1}"
            label = f"{span} {one if span == '1' else many}"
            found.append(recall_of(ranks[inside], label))
    return found


def shared_captions(texts: Sequence[str], owner: npt.NDArray[np.int64]) -> list[tuple[str, int]]:
    """Captions that stand with several images, letter case aside, and with how many; most first.

    Such a query cannot be answered but by luck: only one of these images counts as right.
    """
    spelt = {" ".join(text.casefold().split()): text for text in reversed(texts)}
    pairs = {
        (" ".join(text.casefold().split()), int(image))
        for text, image in zip(texts, owner, strict=True)
    }
    counts = Counter(key for key, _ in pairs)
    found = [(spelt[key], count) for key, count in counts.items() if count > 1]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def near_twins(image: Tensor, *, least: float = ALIKE, most: int = 5) -> tuple[int, list[Pair]]:
    """Pairs of images whose embeddings ``(N, D)`` are as alike as ``least``.

    Returns:
        How many pairs there are, and the ``most`` likest.
    """
    block = rows_per_block(len(image))
    count = 0
    found: list[Pair] = []
    for start in range(0, len(image), block):
        scores = image[start : start + block] @ image.T  # (b, N)
        scores = scores.triu(diagonal=start + 1).masked_fill_(scores < least, 0)
        count += int((scores > 0).sum())
        best = scores.flatten().topk(min(most, scores.numel()))
        for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if value > 0:
                found.append((start + place // len(image), place % len(image), value))
    return count, sorted(found, key=lambda pair: -pair[2])[:most]
