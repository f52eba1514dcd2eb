"""The inverted softmax and the k-occurrence against slow loops over the whole matrix."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captune.evaluation.hubness import (
    TEMPERATURE,
    bank_hubness,
    corrected,
    hubness_corrected,
    hubness_skewness,
    rows_per_block,
    similarity_rows,
)
from captune.metrics import retrieval_metrics
from captune.ranks import retrieval_ranks


def unit(rows: int, dimension: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dimension, generator=generator), dim=-1)


def dot(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def slow_hubness(gallery: Tensor, bank: Tensor, temperature: float) -> list[float]:
    return [
        math.log(sum(math.exp(dot(item, query) / temperature) for query in bank))
        for item in gallery
    ]


@pytest.mark.parametrize("block", [1, 3, 100])
@pytest.mark.parametrize("temperature", [TEMPERATURE, 0.5])
def test_corrected_ranks_equal_a_slow_inverted_softmax(block: int, temperature: float) -> None:
    """The gallery's images are normalised over the bank; among captions nothing moves."""
    image, text, bank = unit(11), unit(29, seed=1), unit(40, seed=2)
    owner = torch.cat([torch.arange(11), torch.arange(11), torch.arange(7)])
    hubness = slow_hubness(image, bank, temperature)
    caption_ranks = []
    for c in range(29):
        scores = [dot(image[i], text[c]) / temperature - hubness[i] for i in range(11)]
        own = int(owner[c])
        caption_ranks.append(1 + sum(scores[i] >= scores[own] for i in range(11) if i != own))

    plain = retrieval_ranks(image, text, owner)
    fairer = corrected(image, text, bank_hubness(image, bank, temperature=temperature, block=block))
    found = retrieval_ranks(*fairer, owner)
    assert found.caption.tolist() == caption_ranks
    assert torch.equal(found.image, plain.image)
    assert not torch.equal(found.caption, plain.caption)


def test_blocks_keep_within_their_budget() -> None:
    assert rows_per_block(202_654) * 202_654 * 4 <= 1 << 27
    assert rows_per_block(10**12) == 1


def test_hubness_lies_between_mean_and_maximum() -> None:
    image, bank = unit(20), unit(30, seed=1)
    similarity = image @ bank.T
    hubness = bank_hubness(image, bank)
    assert bool((similarity.mean(1) < hubness).all() and (hubness < similarity.amax(1)).all())
    soft, hard = (bank_hubness(image, bank, temperature=t) for t in (100.0, 1e-4))
    assert torch.allclose(soft, similarity.mean(1), atol=1e-2)
    assert torch.allclose(hard, similarity.amax(1), atol=1e-2)


def test_a_bank_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="at least one query"):
        bank_hubness(unit(3), unit(0))
    with pytest.raises(ValueError, match="above 0"):
        bank_hubness(unit(3), unit(4), temperature=0)


def slow_skewness(lists: list[list[float]], gallery: int, k: int) -> float:
    counts: Counter[int] = Counter()
    for scores in lists:
        counts.update(sorted(range(gallery), key=lambda item: -scores[item])[:k])
    values = [counts[item] for item in range(gallery)]
    mean = sum(values) / gallery
    second = sum((v - mean) ** 2 for v in values) / gallery
    return sum((v - mean) ** 3 for v in values) / gallery / second**1.5


@pytest.mark.parametrize("block", [1, 4, 100])
@pytest.mark.parametrize("k", [1, 5])
def test_skewness_equals_a_slow_count(k: int, block: int) -> None:
    image, text = unit(17), unit(31, seed=1)
    matrix = image @ text.T
    found = hubness_skewness(similarity_rows(image, text), 17, 31, k=k, block=block)
    assert found["image_to_text"] == pytest.approx(slow_skewness(matrix.tolist(), 31, k))
    assert found["text_to_image"] == pytest.approx(slow_skewness(matrix.T.tolist(), 17, k))


def test_a_gallery_smaller_than_k_has_no_hubs() -> None:
    rows = similarity_rows(unit(4), unit(6, seed=1))
    assert hubness_skewness(rows, 4, 6) == {"image_to_text": 0.0, "text_to_image": 0.0}


def with_a_hub() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Captions share a direction; image 0 lies in it, so that it answers all of them."""
    common = unit(1, 32, 9)
    meaning, other = unit(60, 32, 1), unit(400, 32, 2)
    text = F.normalize(meaning + 1.5 * common, dim=-1)
    bank = F.normalize(other + 1.5 * common, dim=-1)
    image = meaning.clone()
    image[0] = common
    return image, text, torch.arange(60), bank


def test_a_hub_is_found_and_disarmed() -> None:
    image, text, owner, bank = with_a_hub()
    plain = retrieval_metrics(image, text, owner, every_caption=True)
    corrected = hubness_corrected(image, text, owner, bank)
    assert plain["text_to_image"]["R@1"] < 10
    assert corrected["text_to_image"]["R@1"] > 80
    assert corrected["image_to_text"] == plain["image_to_text"]
    # Image 0 in all lists of ten, before; and after no item in nearly so many.
    before, after = corrected["skewness_before"], corrected["skewness_after"]
    assert before["image_to_text"] == after["image_to_text"]
    assert before["text_to_image"] > 1.5 and abs(after["text_to_image"]) < 1


def test_the_object_says_how_it_was_made() -> None:
    image, text, owner, bank = with_a_hub()
    found = hubness_corrected(image, text, owner, bank)
    assert (found["querybank"], found["queries"], found["temperature"]) == (
        "train captions",
        400,
        0.05,
    )
    six = [found[d][f"R@{k}"] for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert found["rsum"] == pytest.approx(sum(six))
