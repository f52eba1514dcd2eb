"""Pairs of a batch against a slow loop over images and captions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from captune.matching import match_pairs, one_to_one


def slow_near(
    images: list[int], owners: list[int], text: torch.Tensor, own: int, threshold: float
) -> list[list[bool]]:
    return [
        [
            any(
                owners[j] == image and float(text[j] @ text[c]) >= threshold - 1e-6
                for j in range(own)
            )
            for c in range(len(owners))
        ]
        for image in images
    ]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], int, torch.Tensor]:
    images = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))  # an image may stand twice
    rest = draw(st.lists(st.sampled_from(images), max_size=6))
    first = draw(st.permutations([*images, *rest]))
    bank = draw(st.lists(st.integers(0, 12), max_size=8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    # Two dimensions, so that near-duplicates are common.
    text = F.normalize(torch.randn(len(first) + len(bank), 2, generator=generator), dim=-1)
    return images, [*first, *bank], len(first), text


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from([0.5, 0.9, 0.99]), st.sampled_from(["ignore", "positive"]))
def test_equals_the_slow_loop(
    batch: tuple[list[int], list[int], int, torch.Tensor], threshold: float, duplicates: str
) -> None:
    images, owners, own, text = batch
    pairs = match_pairs(
        torch.tensor(images),
        torch.tensor(owners),
        text,
        own=own,
        duplicate_threshold=threshold,
        duplicates=duplicates,
    )
    near = slow_near(images, owners, text, own, threshold)
    for b, image in enumerate(images):
        for c, owner in enumerate(owners):
            mine, alike = owner == image, near[b][c]
            want = (
                (mine or (alike and duplicates == "positive")),
                (alike and not mine and duplicates == "ignore"),
            )
            assert (bool(pairs.positive[b, c]), bool(pairs.ignored[b, c])) == want, (b, c)
    assert pairs.own == own
    assert pairs.images.tolist() == images and pairs.caption_images.tolist() == owners


def test_a_threshold_of_0_looks_at_no_text() -> None:
    text = torch.ones(3, 4) / 2  # all alike
    pairs = match_pairs(torch.tensor([1, 2]), torch.tensor([1, 2, 3]), text, own=2)
    assert pairs.positive.tolist() == [[True, False, False], [False, True, False]]
    assert not pairs.ignored.any()


def test_equal_captions_are_found_at_a_threshold_of_1() -> None:
    generator = torch.Generator().manual_seed(0)
    row = F.normalize(torch.randn(200, 384, generator=generator), dim=-1)
    text = torch.cat((row, row))
    pairs = match_pairs(
        torch.arange(200), torch.arange(400), text, own=200, duplicate_threshold=1.0
    )
    assert torch.equal(pairs.ignored, torch.cat((torch.zeros(200, 200), torch.eye(200)), 1).bool())


def test_captions_of_absent_images_find_no_duplicates() -> None:
    text = torch.ones(2, 4) / 2
    pairs = match_pairs(
        torch.tensor([7]), torch.tensor([8, 9]), text, own=2, duplicate_threshold=0.5
    )
    assert not pairs.positive.any() and not pairs.ignored.any()


def test_a_permutation_of_images_permutes_the_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    text = F.normalize(torch.randn(12, 3, generator=generator), dim=-1)
    images, owners = torch.tensor([4, 2, 9]), torch.tensor([2, 4, 9, 9, 2, 4, 1, 5, 9, 3, 2, 0])
    order = torch.tensor([2, 0, 1])
    one = match_pairs(images, owners, text, own=6, duplicate_threshold=0.8)
    other = match_pairs(images[order], owners, text, own=6, duplicate_threshold=0.8)
    assert one.ignored.any()
    assert torch.equal(one.positive[order], other.positive)
    assert torch.equal(one.ignored[order], other.ignored)


def test_one_to_one_is_the_diagonal() -> None:
    text = F.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    ids = torch.arange(5)
    found, want = one_to_one(5), match_pairs(ids, ids, text, own=5)
    assert found[5:] == want[5:] == (None, None)
    for one, other in zip(found[:5], want[:5], strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"own": 0}, "own must"),
        ({"own": 4}, "own must"),
        ({"duplicate_threshold": 1.1}, "duplicate_threshold"),
        ({"duplicate_threshold": float("nan")}, "duplicate_threshold"),
        ({"duplicates": "drop"}, "duplicates must"),
        ({"text": torch.ones(2, 2)}, "match_pairs wants"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], words: str) -> None:
    good = {
        "images": torch.tensor([1]),
        "caption_images": torch.tensor([1, 2, 3]),
        "text": torch.ones(3, 2),
        "own": 1,
    }
    match_pairs(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        match_pairs(**{**good, **changes})  # type: ignore[arg-type]
