"""Ranks and recalls against a slow full-matrix reference, and against eccv_caption."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from captune.data.coco import karpathy_ids
from captune.metrics import (
    retrieval_metrics,
    retrieval_ranks,
    rows_per_block,
    similarity_rows,
    summarise_ranks,
)


def slow_ranks(similarity: np.ndarray, owner: np.ndarray) -> tuple[list[int], list[int]]:
    """Straight from the definition, one query at a time; ties count against the query."""
    images, captions = similarity.shape
    image_ranks, caption_ranks = [], []
    for i in range(images):
        own = [c for c in range(captions) if owner[c] == i]
        best = max(similarity[i, c] for c in own)
        rivals = [c for c in range(captions) if owner[c] != i and similarity[i, c] >= best]
        image_ranks.append(1 + len(rivals))
    for c in range(captions):
        score = similarity[owner[c], c]
        rivals = [i for i in range(images) if i != owner[c] and similarity[i, c] >= score]
        caption_ranks.append(1 + len(rivals))
    return image_ranks, caption_ranks


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    images = draw(st.integers(1, 9))
    extra = draw(st.lists(st.integers(0, images - 1), max_size=20))
    owner = np.array(draw(st.permutations([*range(images), *extra])), dtype=np.int64)
    levels = draw(st.sampled_from([2, 5, 1000]))  # few levels: many ties
    flat = draw(
        st.lists(st.integers(0, levels), min_size=images * len(owner), max_size=images * len(owner))
    )
    similarity = np.array(flat, dtype=np.float32).reshape(images, len(owner)) / levels
    return similarity, owner, draw(st.integers(1, 10))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_ranks_equal_the_slow_reference(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    similarity, owner, block = case
    matrix = torch.from_numpy(similarity)
    image_ranks, caption_ranks = retrieval_ranks(
        lambda start, stop: matrix[start:stop].clone(),
        torch.from_numpy(owner),
        len(matrix),
        block=block,
    )
    assert (image_ranks.tolist(), caption_ranks.tolist()) == slow_ranks(similarity, owner)


def random_unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_block_size_changes_nothing(block: int) -> None:
    image, text = random_unit(100, 16, 0), random_unit(260, 16, 1)
    owner = torch.cat([torch.arange(100), torch.randint(0, 100, (160,))])
    whole = retrieval_ranks(similarity_rows(image, text), owner, 100, block=100)
    parts = retrieval_ranks(similarity_rows(image, text), owner, 100, block=block)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


def test_duplicate_images_count_against_each_other() -> None:
    """Two equal pictures cannot both be first for their captions."""
    image = random_unit(1, 8, 2).repeat(2, 1)
    metrics = retrieval_metrics(image, random_unit(2, 8, 3), torch.tensor([0, 1]))
    assert metrics["text_to_image"]["R@1"] == 0.0
    assert metrics["text_to_image"]["R@5"] == 100.0


def test_all_captions_count_and_any_of_them_hits() -> None:
    image = torch.eye(3)
    text = F.normalize(torch.tensor([[0, 1.0, 0], [1, 0.1, 0], [0, 1, 0.1], [0, 0, 1]]), dim=-1)
    owner = torch.tensor([0, 0, 1, 2])  # image 0: one caption astray, one right
    metrics = retrieval_metrics(image, text, owner)
    assert metrics["image_to_text"]["R@1"] == pytest.approx(100 * 2 / 3)
    assert metrics["text_to_image"]["R@1"] == pytest.approx(75.0)


def test_rsum_is_the_sum_of_the_six_recalls() -> None:
    metrics = retrieval_metrics(random_unit(30, 8, 4), random_unit(30, 8, 5), torch.arange(30))
    six = [metrics[d][f"R@{k}"] for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert metrics["rsum"] == pytest.approx(sum(six))


def test_median_rank_of_an_even_count_is_between_the_middle_two() -> None:
    assert summarise_ranks(torch.tensor([1, 2, 9, 50]))["median_rank"] == 5.5
    assert summarise_ranks(torch.tensor([3, 1, 2]))["median_rank"] == 2.0


def test_nan_is_refused() -> None:
    image = random_unit(4, 8, 6)
    image[2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        retrieval_metrics(image, random_unit(4, 8, 7), torch.arange(4))


def test_an_image_without_captions_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one caption"):
        retrieval_metrics(random_unit(3, 8, 8), random_unit(2, 8, 9), torch.tensor([0, 1]))


def test_blocks_keep_within_their_budget() -> None:
    assert rows_per_block(202_654) * 202_654 * 4 <= 1 << 27
    assert rows_per_block(10**12) == 1


def test_agrees_with_eccv_caption_on_the_karpathy_5k_protocol() -> None:
    """The same similarities, with noise around the truth so that recalls are not near zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from eccv_caption import Metrics
    ids = karpathy_ids()
    image_ids, caption_ids = ids["test"].astype(int), ids["test_captions"].astype(int)
    image = random_unit(5000, 48, 10)
    owner = torch.arange(5000).repeat_interleave(5)
    text = F.normalize(image[owner] + 2.2 * random_unit(25000, 48, 11), dim=-1)
    similarity = image @ text.T
    ours = retrieval_metrics(image, text, owner)

    image_to_text = {
        int(i): caption_ids[row.topk(60).indices.numpy()].tolist()
        for i, row in zip(image_ids, similarity, strict=True)
    }
    text_to_image = {
        int(c): image_ids[row.topk(60).indices.numpy()].tolist()
        for c, row in zip(caption_ids, similarity.T, strict=True)
    }
    theirs = Metrics().compute_all_metrics(
        image_to_text, text_to_image, target_metrics=["coco_5k_recalls"], Ks=[1, 5, 10]
    )
    for direction, key in (("image_to_text", "i2t"), ("text_to_image", "t2i")):
        for k in (1, 5, 10):
            assert 5 < ours[direction][f"R@{k}"] < 99
            expected = 100 * theirs[f"coco_5k_r{k}"][key]
            assert ours[direction][f"R@{k}"] == pytest.approx(expected, abs=1e-9)
