"""Metrics from ranks against their definitions, and against independent libraries."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional as F

from captune.data.coco import karpathy_ids
from captune.metrics import average_precision_at_r, retrieval_metrics, summarise_ranks
from captune.ranks import retrieval_ranks


def random_unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


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


def test_mean_rank_and_reciprocal_rank() -> None:
    found = summarise_ranks(torch.tensor([1, 2, 4, 5]))
    assert found["mean_rank"] == 3.0
    assert found["MRR"] == pytest.approx(100 * (1 + 1 / 2 + 1 / 4 + 1 / 5) / 4)


def slow_map_at_r(similarity: torch.Tensor, owner: list[int]) -> float:
    """Straight from the definition, by sorting; without ties the order is the only one."""
    total = 0.0
    for i, row in enumerate(similarity.tolist()):
        mine = [c for c, image in enumerate(owner) if image == i]
        order = sorted(range(len(owner)), key=lambda c: -row[c])[: len(mine)]
        hits = [c in mine for c in order]
        total += sum(sum(hits[: k + 1]) / (k + 1) for k in range(len(mine)) if hits[k]) / len(mine)
    return 100 * total / len(similarity)


@pytest.mark.parametrize("seed", range(5))
def test_map_at_r_equals_a_slow_sort(seed: int) -> None:
    image = random_unit(20, 6, seed)
    owner = torch.cat([torch.arange(20), torch.randint(0, 20, (50,))])
    text = F.normalize(image[owner] + random_unit(70, 6, 100 + seed), dim=-1)
    found = retrieval_metrics(image, text, owner, every_caption=True)
    expected = slow_map_at_r(image @ text.T, owner.tolist())
    assert 5 < expected < 95
    assert found["image_to_text"]["mAP@R"] == pytest.approx(expected)
    assert found["text_to_image"]["mAP@R"] == found["text_to_image"]["R@1"]
    assert "mAP@R" not in retrieval_metrics(image, text, owner)["image_to_text"]


def test_a_perfect_ranking_has_an_average_precision_of_one() -> None:
    owner = torch.tensor([1, 0, 1, 1])
    ranks = retrieval_ranks(torch.eye(2), torch.eye(2)[owner], owner, every_caption=True)
    assert ranks.of_own is not None
    assert average_precision_at_r(ranks.of_own, owner).tolist() == [1.0, 1.0]


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
