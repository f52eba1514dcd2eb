"""Retrieval protocols: which captions count, and among which pictures each query looks.

Published numbers differ by protocol more than by model, so every result says which one it is of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captune.data.table import CaptionTable
from captune.errors import CaptuneError, nearest
from captune.processes import processes
from captune.ranks import Ranks, retrieval_ranks

HIT_RULE = (
    "image to text: any of the image's own captions is among the first K; text to image: the "
    "caption's own image is among the first K"
)
TIE_RULE = "ties count against the query"
FOLD = 1_000

Fold = tuple[Tensor, Tensor]
"""Rows of images ``(n,)`` and of captions ``(m,)`` that are ranked among each other."""


@dataclass(frozen=True)
class Protocol:
    """``folds`` cuts images and captions into galleries, given each caption's image and N.

    ``split`` is the only one that it is defined on, empty where it is defined on any.
    """

    name: str
    words: str
    folds: Callable[[Tensor, int], Iterator[Fold]]
    split: str = ""

    def check(self, table: CaptionTable, unreadable: int) -> None:
        """Refuse a table that the protocol is not defined for.

        Raises:
            CaptuneError: another split, or an incomplete one.
        """
        if self.split and table.split != self.split:
            raise CaptuneError(
                f"protocol {self.name} is defined on {self.split}, and this is {table.describe()}: "
                f"take --split {self.split}, or --protocol full"
            )
        if self.split and unreadable:
            raise CaptuneError(
                f"protocol {self.name} needs all of {self.split}, and {unreadable} of its images "
                "cannot be read: fetch them again"
            )

    def stamp(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"name": self.name, "words": self.words, "hit": HIT_RULE, "ties": TIE_RULE}


def _whole(owner: Tensor, images: int) -> Iterator[Fold]:
    yield torch.arange(images), torch.arange(len(owner))


def _thousands(owner: Tensor, images: int) -> Iterator[Fold]:
    for first in range(0, images, FOLD):
        inside = (owner >= first) & (owner < first + FOLD)
        yield torch.arange(first, min(first + FOLD, images)), inside.nonzero().flatten()


def _one_caption(owner: Tensor, images: int) -> Iterator[Fold]:
    places = torch.arange(len(owner))
    first = torch.full((images,), len(owner)).scatter_reduce(0, owner, places, "amin")
    yield torch.arange(images), first


FULL = Protocol("full", "all images and all captions of the split, any number an image", _whole)
COCO_5K = Protocol(
    "coco-5k",
    "COCO 5K: all 5,000 images of the Karpathy test split, five captions each",
    _whole,
    split="karpathy-test",
)
COCO_1K = Protocol(
    "coco-1k",
    "COCO 1K: the mean over five folds of 1,000 images of the Karpathy test split, in its order, "
    "five captions each",
    _thousands,
    split="karpathy-test",
)
ONE_CAPTION = Protocol(
    "one-caption",
    "N x N: the first caption of each image only; easier than the protocols that papers use, and "
    "not to be compared with them",
    _one_caption,
)
PROTOCOLS = {protocol.name: protocol for protocol in (FULL, COCO_5K, COCO_1K, ONE_CAPTION)}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        CaptuneError: there is none; the nearest right name is given.
    """
    if name not in PROTOCOLS:
        raise CaptuneError(f"no protocol {name!r}{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Ranked:
    """Ranks within the folds of a protocol, folds one after the other.

    ``owner (m,)`` is the place in ``ranks.image`` of each caption's image. As folds are of one
    size, a mean over these ranks is the mean over folds.
    """

    ranks: Ranks
    owner: Tensor

    @classmethod
    def by(
        cls,
        protocol: Protocol,
        image: Tensor,
        text: Tensor,
        owner: Tensor,
        device: torch.device | None = None,
    ) -> Ranked:
        """Of embeddings ``(N, D)`` and ``(M, D)``; ``owner (M,)`` int64, each caption's image.

        Several processes share the counting, and all have the result; ``device`` as that of
        :func:`captune.ranks.retrieval_ranks`.
        """
        how: dict[str, Any] = {"every_caption": True, "device": device, "here": processes()}
        parts: list[Ranks] = []
        owners: list[Tensor] = []
        seen = 0
        for rows, captions in protocol.folds(owner, len(image)):
            place = torch.full((len(image),), -1)
            place[rows] = torch.arange(len(rows))
            inside = place[owner[captions]]
            parts.append(retrieval_ranks(image[rows], text[captions], inside, **how))
            owners.append(inside + seen)
            seen += len(rows)
        joined = (
            torch.cat([_some(part) for part in column]) for column in zip(*parts, strict=True)
        )
        return cls(Ranks(*joined), torch.cat(owners))


def _some(part: Tensor | None) -> Tensor:
    assert part is not None
    return part
