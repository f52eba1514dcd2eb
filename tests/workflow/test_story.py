"""What the page tells: chance and sample queries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from captune.data.sources import open_source
from captune.data.table import CaptionTable
from captune.evaluation.embeddings import embed_images
from captune.evaluation.retrieval import search_images
from captune.models import CLIPModel
from captune.training.run import Run
from captune.workflow.story import (
    SAMPLE_QUERIES,
    chance_metrics,
    measure_before,
    sample_subject,
)
from captune.workflow.train import Outcome

DRAWS = 20_000


def simulated(images: int, per_image: int) -> dict[str, dict[str, float]]:
    """Random rankings: where the first own caption stands, and where the own image stands."""
    rng = np.random.default_rng(0)
    captions = images * per_image
    own = rng.random((DRAWS, captions)).argsort(axis=1)[:, :per_image]  # places of own captions
    ranks = {
        "image_to_text": own.min(axis=1) + 1,
        "text_to_image": rng.integers(1, images + 1, DRAWS),
    }
    return {
        direction: {
            **{f"R@{k}": 100 * float((found <= k).mean()) for k in (1, 5, 10)},
            "median_rank": float(np.median(found)),
        }
        for direction, found in ranks.items()
    }


@pytest.mark.parametrize(
    ("images", "per_image"), [(8, 5), (40, 1), (20, 3), (3, 2), (1, 5), (1, 1)]
)
def test_chance_equals_a_simulation_of_random_rankings(images: int, per_image: int) -> None:
    found = chance_metrics(images, images * per_image)
    for direction, expected in simulated(images, per_image).items():
        for k in (1, 5, 10):
            # Four standard errors of a share estimated from that many draws.
            wide = 400 * 0.5 / DRAWS**0.5
            assert found[direction][f"R@{k}"] == pytest.approx(expected[f"R@{k}"], abs=wide)
        assert found[direction]["median_rank"] == pytest.approx(expected["median_rank"], abs=1)
        assert found[direction]["median_rank"] >= 1


def test_the_rsum_of_chance_is_the_sum_of_its_six_recalls() -> None:
    found = chance_metrics(1000, 5000)
    six = [found[d][f"R@{k}"] for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert found["rsum"] == pytest.approx(sum(six))
    assert found["text_to_image"]["R@10"] == pytest.approx(1.0)


@pytest.fixture
def table(coco: Path) -> CaptionTable:
    return open_source(coco).table("train")


def test_sample_queries_are_captions_of_different_pictures_over_the_whole_split(
    outcome: Outcome, table: CaptionTable
) -> None:
    subject = sample_subject(outcome.run, table)
    assert list(subject.queries) == [table.caption(5 * row) for row in (0, 4, 8, 12, 16, 20)]
    assert len(subject.queries) == SAMPLE_QUERIES


def test_a_sample_query_is_answered_rightly_by_its_own_picture_alone(
    outcome: Outcome, table: CaptionTable, tiny_clip: Path
) -> None:
    model = CLIPModel.zero_shot(str(tiny_clip))
    embeddings = embed_images(model, table, precision="fp32")
    subject = sample_subject(outcome.run, table)
    assert subject.judge is not None
    query = subject.queries[1]
    hits = search_images(model, table, embeddings, [query], k=len(table))[0]
    right = [hit.image for hit in hits if subject.judge(query, hit)]
    assert right == [str(table.path(4))]


def test_a_split_of_two_pictures_is_told_by_two_queries(
    outcome: Outcome, table: CaptionTable
) -> None:
    assert len(sample_subject(outcome.run, table.take_images([3, 9])).queries) == 2


def test_before_training_is_measured_from_kept_features_or_from_photos_alike(
    outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there was a stage 1 no photo is decoded again; rounding is all that may differ."""
    subject = sample_subject(outcome.run, open_source(outcome.run.provenance.data).table("val"))
    config = outcome.run.config.replace(precision="fp32")
    assert config.head_epochs > 0
    run = Run(outcome.run.folder, config, outcome.run.provenance)
    measure_before(run, subject)  # keeps the features
    with monkeypatch.context() as patch:
        patch.setattr("captune.data.dataset.load_image", None)
        kept = measure_before(run, subject)
    plain = Run(outcome.run.folder, config.replace(head_epochs=0), outcome.run.provenance)
    decoded = measure_before(plain, subject)
    for one, other in zip(kept.hits, decoded.hits, strict=True):
        assert [hit.score for hit in one] == pytest.approx([hit.score for hit in other], abs=2e-3)
