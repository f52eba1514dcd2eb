"""Protocols against slow loops over each gallery, and refused where they are not defined."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captune.data.table import CaptionTable
from captune.errors import CaptuneError
from captune.evaluation import protocols
from captune.evaluation.protocols import (
    COCO_1K,
    COCO_5K,
    FULL,
    ONE_CAPTION,
    PROTOCOLS,
    Protocol,
    Ranked,
    find_protocol,
)


def unit(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 6, generator=generator), dim=-1)


@pytest.fixture
def owner() -> Tensor:
    """Of 40 images, one to four captions each, in no order."""
    counts = torch.arange(40) % 4 + 1
    owner = torch.arange(40).repeat_interleave(counts)
    return owner[torch.randperm(len(owner), generator=torch.Generator().manual_seed(0))]


def slow(
    image: Tensor, text: Tensor, owner: Tensor, gallery: list[int], kept: list[int]
) -> tuple[list[int], list[int]]:
    """Ranks of the images ``gallery`` and the captions ``kept`` among each other."""
    similarity = (image @ text.T).tolist()
    of_images, of_captions = [], []
    for i in gallery:
        best = max(similarity[i][c] for c in kept if owner[c] == i)
        of_images.append(1 + sum(similarity[i][c] >= best for c in kept if owner[c] != i))
    for c in kept:
        mine = int(owner[c])
        of_captions.append(
            1 + sum(similarity[i][c] >= similarity[mine][c] for i in gallery if i != mine)
        )
    return of_images, of_captions


@pytest.mark.parametrize("name", PROTOCOLS)
def test_ranks_equal_a_slow_loop_over_each_gallery(
    name: str, owner: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocols, "FOLD", 8)
    image, text = unit(40, 1), unit(len(owner), 2)
    captions = list(range(len(owner)))
    first = [owner.tolist().index(i) for i in range(40)]
    galleries = {
        "full": [(list(range(40)), captions)],
        "coco-5k": [(list(range(40)), captions)],
        "one-caption": [(list(range(40)), first)],
        "coco-1k": [
            (list(range(k, k + 8)), [c for c in captions if k <= owner[c] < k + 8])
            for k in range(0, 40, 8)
        ],
    }[name]
    found = Ranked.by(PROTOCOLS[name], image, text, owner)
    parts = [slow(image, text, owner, *gallery) for gallery in galleries]
    assert found.ranks.image.tolist() == [rank for part in parts for rank in part[0]]
    assert found.ranks.caption.tolist() == [rank for part in parts for rank in part[1]]
    assert found.owner.tolist() == [int(owner[c]) for _, kept in galleries for c in kept]


def test_a_smaller_gallery_is_easier(owner: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason why a result must say its protocol."""
    monkeypatch.setattr(protocols, "FOLD", 8)
    image, text = unit(40, 1), unit(len(owner), 2)
    mean = {
        p.name: float(Ranked.by(p, image, text, owner).ranks.caption.double().mean())
        for p in (FULL, COCO_1K)
    }
    assert mean["coco-1k"] < mean["full"] / 3


@pytest.mark.parametrize("protocol", [COCO_5K, COCO_1K])
def test_coco_protocols_are_defined_on_all_of_karpathy_test_only(protocol: Protocol) -> None:
    images = [(row, f"{row}.jpg", Path(f"{row}.jpg")) for row in range(8)]
    captions = [(row, f"caption {row}", row) for row in range(8)]
    table = CaptionTable.build(images, captions, name="made", split="val")
    with pytest.raises(CaptuneError, match=r"coco-.k is defined on karpathy-test.*--split"):
        protocol.check(table, 0)
    FULL.check(table, 3), ONE_CAPTION.check(table, 3)


def test_a_result_says_what_it_is_of() -> None:
    for name, protocol in PROTOCOLS.items():
        stamp = protocol.stamp()
        assert stamp["name"] == name and "ties" in stamp["ties"] and "K" in stamp["hit"]
    assert "not to be compared" in ONE_CAPTION.stamp()["words"]


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(CaptuneError, match=r"no protocol 'coco1k'.*coco-1k"):
        find_protocol("coco1k")
