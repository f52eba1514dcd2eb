"""Margins, groups, shared captions and twins against slow loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captune.evaluation import analysis
from captune.evaluation.analysis import (
    caption_margins,
    groups_by_length,
    groups_by_objects,
    near_twins,
    shared_captions,
)
from captune.ranks import Ranks


def unit(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 4, generator=generator), dim=-1)


@pytest.fixture(params=[3, 10**6])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Few rows at a time, and all at once."""
    monkeypatch.setattr(analysis, "rows_per_block", lambda _: request.param)
    return int(request.param)


def test_margins_equal_a_loop(block: int) -> None:
    image, text = unit(7, 0), unit(20, 1)
    owner = torch.arange(20) % 7
    scores = (text @ image.T).tolist()
    expected = [
        row[own] - max(s for place, s in enumerate(row) if place != own)
        for row, own in zip(scores, owner.tolist(), strict=True)
    ]
    assert caption_margins(image, text, owner).tolist() == pytest.approx(expected, abs=1e-6)


def test_twins_equal_a_loop_and_the_likest_come_first(block: int) -> None:
    image = unit(12, 0)
    image[7] = image[2]
    image[11] = F.normalize(image[4] + 0.02 * unit(1, 5)[0], dim=-1)
    least = 0.7
    expected = {
        (a, b): float(image[a] @ image[b])
        for a in range(12)
        for b in range(a + 1, 12)
        if float(image[a] @ image[b]) >= least
    }
    count, found = near_twins(image, least=least, most=2)
    assert count == len(expected) > 2
    assert [pair[:2] for pair in found] == [(2, 7), (4, 11)]
    for one, other, cosine in found:
        assert cosine == pytest.approx(expected[one, other], abs=1e-6)


def test_images_that_are_not_alike_are_no_twins() -> None:
    assert near_twins(torch.eye(4)) == (0, [])


def test_captions_fall_into_groups_by_length() -> None:
    texts = [" ".join(["word"] * length) for length in (1, 2, 2, 3, 4, 5, 6, 20)]
    ranks = Ranks(torch.ones(1).long(), torch.tensor([1, 2, 6, 1, 1, 20, 1, 3]))
    groups = groups_by_length(ranks, texts)
    assert [g.label for g in groups] == ["1 to 2 words", "3 words", "4 to 5 words", "6 to 20 words"]
    assert [g.queries for g in groups] == [3, 1, 2, 2]
    assert groups[0].recalls == pytest.approx({"R@1": 100 / 3, "R@5": 200 / 3, "R@10": 100.0})


def test_captions_of_one_length_are_one_group() -> None:
    ranks = Ranks(torch.ones(1).long(), torch.tensor([1, 2]))
    (group,) = groups_by_length(ranks, ["one two", "three four"])
    assert (group.label, group.queries) == ("2 words", 2)


def test_images_fall_into_groups_by_objects() -> None:
    objects = np.array([0, 0, 1, 2, 3, 4, 12])
    ranks = Ranks(torch.tensor([1, 9, 1, 1, 6, 1, 1]), torch.ones(7).long())
    groups = groups_by_objects(ranks, objects)
    labels = ["0 objects", "1 object", "2 objects", "3 to 4 objects", "10 to 12 objects"]
    assert [g.label for g in groups] == labels
    assert [g.queries for g in groups] == [2, 1, 1, 2, 1]
    assert groups[3].recalls["R@1"] == 50.0


def test_a_caption_of_one_image_twice_is_not_shared() -> None:
    texts = ["A dog.", "a  dog.", "a cat", "A cat", "a cat", "a bird"]
    owner = np.array([0, 1, 2, 2, 3, 4])
    assert shared_captions(texts, owner) == [("A dog.", 2), ("a cat", 2)]
    assert shared_captions(["a dog", "A DOG"], np.array([5, 5])) == []
