"""The same figures from libraries that share no code with captune."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP, RetrievalMRR, RetrievalPrecision

from captune.metrics import RECALL_AT, retrieval_metrics

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # it recommends a faster JSON parser
    from eccv_caption._metrics import compute_eccv_metrics

IMAGES, CAPTIONS = 60, 200


class Case(NamedTuple):
    """Embeddings, each caption's image, and the product's order as numbers without ties."""

    image: Tensor
    text: Tensor
    owner: Tensor
    similarity: Tensor

    @property
    def own(self) -> Tensor:
        """``(N, M)`` whether a caption is of an image."""
        return self.owner == torch.arange(IMAGES)[:, None]


@pytest.fixture(params=range(5))
def case(request: pytest.FixtureRequest) -> Case:
    """One to a dozen captions an image, in no order, and noise so that figures lie in between."""
    generator = torch.Generator().manual_seed(request.param)
    image = F.normalize(torch.randn(IMAGES, 12, generator=generator), dim=-1)
    more = torch.randint(0, IMAGES, (CAPTIONS - IMAGES,), generator=generator)
    owner = torch.cat([torch.arange(IMAGES), more])
    owner = owner[torch.randperm(CAPTIONS, generator=generator)]
    noise = torch.randn(CAPTIONS, 12, generator=generator)
    text = F.normalize(image[owner] + 0.45 * noise, dim=-1)
    similarity = image @ text.T
    for rows in (similarity, similarity.T):
        assert all(len(row.unique()) == len(row) for row in rows)
    return Case(image, text, owner, similarity)


def places(similarity: Tensor) -> Tensor:
    """Each row's scores as 1, 2, 3... upwards: torchmetrics takes nothing below 0 for found."""
    return similarity.argsort(dim=1).argsort(dim=1).float() + 1


def queries(scores: Tensor) -> Tensor:
    """The row of each score."""
    return torch.arange(len(scores))[:, None].expand(scores.shape)


def test_recalls_are_the_hit_rates_of_torchmetrics(case: Case) -> None:
    found = retrieval_metrics(case.image, case.text, case.owner)
    for direction, similarity, own in (
        ("image_to_text", case.similarity, case.own),
        ("text_to_image", case.similarity.T, case.own.T),
    ):
        scores = places(similarity)
        for k in RECALL_AT:
            theirs = 100 * float(RetrievalHitRate(top_k=k)(scores, own, indexes=queries(scores)))
            assert 5 < theirs <= 100
            assert found[direction][f"R@{k}"] == pytest.approx(theirs, abs=1e-4)


def test_mean_reciprocal_ranks_are_those_of_torchmetrics(case: Case) -> None:
    found = retrieval_metrics(case.image, case.text, case.owner)
    scores, turned = places(case.similarity), places(case.similarity.T)
    theirs = RetrievalMRR()(scores, case.own, indexes=queries(scores))
    assert found["image_to_text"]["MRR"] == pytest.approx(100 * float(theirs), abs=1e-4)
    # A caption has one image, so that its average precision is its reciprocal rank.
    for metric in (RetrievalMRR(), RetrievalMAP()):
        theirs = metric(turned, case.own.T, indexes=queries(turned))
        assert found["text_to_image"]["MRR"] == pytest.approx(100 * float(theirs), abs=1e-4)


def test_map_at_r_is_that_of_eccv_caption(case: Case) -> None:
    """torchmetrics has none: its MAP with ``top_k`` divides by the hits, not by R."""
    found = retrieval_metrics(case.image, case.text, case.owner, every_caption=True)
    order = case.similarity.argsort(dim=1, descending=True)
    lists = dict(enumerate(order.tolist()))
    matches = {i: row.nonzero().flatten().tolist() for i, row in enumerate(case.own)}
    theirs = compute_eccv_metrics(lists, matches)
    assert 5 < 100 * theirs["eccv_map_at_r"] < 95
    assert found["image_to_text"]["mAP@R"] == pytest.approx(100 * theirs["eccv_map_at_r"])
    assert found["image_to_text"]["R@1"] == pytest.approx(100 * theirs["eccv_r1"])


def test_map_at_r_of_a_caption_is_the_precision_at_one_of_torchmetrics(case: Case) -> None:
    found = retrieval_metrics(case.image, case.text, case.owner, every_caption=True)
    turned = places(case.similarity.T)
    theirs = RetrievalPrecision(top_k=1)(turned, case.own.T, indexes=queries(turned))
    assert found["text_to_image"]["mAP@R"] == pytest.approx(100 * float(theirs), abs=1e-4)
