"""Intervals over images and seeds: against slow loops and against scipy's own bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from captune.evaluation.intervals import METRICS, QueryHits, mean_over_seeds, paired_bootstrap
from captune.metrics import summarise_ranks


def draw(
    images: int, seed: int, *, most: int = 5, worst: int = 30
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ranks of ``images`` images, of their one to ``most`` captions, and whose those are."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(images), rng.integers(1, most + 1, images))
    rng.shuffle(owner)
    image_rank = rng.integers(1, worst, images)
    caption_rank = rng.integers(1, worst, len(owner))
    return torch.from_numpy(image_rank), torch.from_numpy(caption_rank), torch.from_numpy(owner)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(0, 10**6))
def test_recalls_from_hits_are_those_of_the_ranks(images: int, seed: int) -> None:
    image_rank, caption_rank, owner = draw(images, seed)
    found = QueryHits.from_ranks(image_rank, caption_rank, owner).recalls()
    direct = {"image_to_text": image_rank, "text_to_image": caption_rank}
    expected = [summarise_ranks(direct[direction])[key] for direction, key in METRICS]
    assert found == pytest.approx(expected)


def test_weights_mean_images_drawn_again_with_all_their_captions() -> None:
    image_rank, caption_rank, owner = draw(6, 3)
    weights = np.array([2.0, 0, 1, 0, 3, 0])
    found = QueryHits.from_ranks(image_rank, caption_rank, owner).recalls(weights)
    chosen = [0, 0, 2, 4, 4, 4]
    captions = [int(r) for image in chosen for r in caption_rank[owner == image]]
    expected = [100 * np.mean([int(image_rank[i]) <= k for i in chosen]) for k in (1, 5, 10)]
    expected += [100 * np.mean([rank <= k for rank in captions]) for k in (1, 5, 10)]
    assert found == pytest.approx(expected)


def test_the_mean_over_seeds_has_student_s_interval() -> None:
    values = [30.0, 31.5, 29.2]
    found = mean_over_seeds(values)
    sem = np.std(values, ddof=1) / np.sqrt(3)
    low, high = stats.t.interval(0.95, 2, np.mean(values), sem)
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high))


def test_one_seed_has_no_interval_and_so_excludes_nothing() -> None:
    found = mean_over_seeds([30.0])
    assert found.value == 30 and np.isnan(found.low) and not found.excludes_zero


def test_the_bootstrap_agrees_with_scipy_s_on_one_caption_an_image() -> None:
    """With as many captions as images, R@1 is a plain mean, which scipy can resample itself."""
    rng = np.random.default_rng(5)
    owner = torch.arange(300)
    ranks = [torch.from_numpy(rng.integers(1, 4, 300)) for _ in range(2)]
    sides = [QueryHits.from_ranks(rank, rank, owner) for rank in ranks]
    found = paired_bootstrap([sides[0]], [sides[1]], resamples=4000)
    difference = 100 * ((ranks[0] == 1).double() - (ranks[1] == 1).double()).numpy()
    theirs = stats.bootstrap(
        (difference,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert found[0].value == pytest.approx(difference.mean())
    assert (found[0].low, found[0].high) == pytest.approx((theirs.low, theirs.high), abs=0.7)


def test_the_last_interval_is_of_rsum_the_sum_of_the_six() -> None:
    ours, theirs = (QueryHits.from_ranks(*draw(40, 7, worst=worst)) for worst in (10, 30))
    found = paired_bootstrap([ours], [theirs])
    assert len(found) == 7
    assert found[-1].value == pytest.approx(sum(interval.value for interval in found[:-1]))
    assert all(interval.low <= interval.value <= interval.high for interval in found)


def test_a_side_against_itself_differs_by_nothing() -> None:
    side = QueryHits.from_ranks(*draw(30, 1))
    for interval in paired_bootstrap([side], [side]):
        assert (interval.value, interval.low, interval.high) == (0, 0, 0)
        assert not interval.excludes_zero


def test_drawing_captions_with_their_image_widens_the_interval() -> None:
    """Five captions that succeed and fail together are one observation, not five."""
    owner = torch.arange(200).repeat_interleave(5)
    rng = np.random.default_rng(0)
    luck = torch.from_numpy(rng.integers(1, 3, 200))
    together = QueryHits.from_ranks(luck, luck[owner], owner)
    apart = QueryHits.from_ranks(luck, torch.from_numpy(rng.integers(1, 3, 1000)), owner)
    never = QueryHits(np.zeros((200, 6)), together.captions)
    wide, narrow = (paired_bootstrap([side], [never])[3] for side in (together, apart))
    assert wide.high - wide.low > 1.8 * (narrow.high - narrow.low)


def test_seeds_are_averaged_before_images_are_drawn() -> None:
    sides = [QueryHits.from_ranks(*draw(50, 2)) for _ in range(2)]
    same = paired_bootstrap([sides[0]], [sides[1]])
    assert paired_bootstrap([sides[0]] * 3, [sides[1]] * 3) == same


def test_other_images_are_refused() -> None:
    ours, theirs = (QueryHits.from_ranks(*draw(images, 2)) for images in (20, 21))
    with pytest.raises(ValueError, match="same images"):
        paired_bootstrap([ours], [theirs])


def test_coverage_is_near_the_promised_95_percent() -> None:
    """Of many samples from a known difference, about 95 in 100 intervals must hold it."""
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        owner = torch.arange(150)
        ours, theirs = (
            QueryHits.from_ranks(
                *[torch.from_numpy(np.where(rng.random(150) < p, 1, 99))] * 2, owner
            )
            for p in (0.55, 0.40)
        )
        interval = paired_bootstrap([ours], [theirs], resamples=500, seed=seed)[0]
        held += interval.low <= 15 <= interval.high
    assert 180 <= held <= 198
