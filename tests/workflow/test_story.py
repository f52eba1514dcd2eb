"""What the page tells: chance, failures and sample queries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from captune.bank import CaptionBank
from captune.data.sources import open_source
from captune.data.table import CaptionTable
from captune.evaluation.embeddings import ImageEmbeddings, embed_images
from captune.workflow.opening import Opened, open_model
from captune.workflow.story import (
    FAILURES,
    SAMPLE_QUERIES,
    chance_metrics,
    sample_subject,
    worst_captions,
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


@pytest.fixture
def measured(tiny_clip: Path, table: CaptionTable) -> tuple[Opened, ImageEmbeddings]:
    opened = open_model(str(tiny_clip))
    return opened, embed_images(opened.model, table, precision="fp32")


def test_failures_are_the_captions_whose_own_picture_came_last(
    table: CaptionTable, measured: tuple[Opened, ImageEmbeddings]
) -> None:
    opened, embeddings = measured
    failures = worst_captions(opened, table, embeddings)
    bank = CaptionBank.build(table.texts(), opened.model.text_encoder)
    scores = (embeddings.vectors @ bank.all().T).tolist()
    worst: dict[str, int] = {}  # the worst rank of each picture's captions
    for caption, owner in enumerate(table.image_of_caption.tolist()):
        column = [row[caption] for row in scores]
        rank = sum(score >= column[owner] for score in column)
        path = str(table.path(owner))
        worst[path] = max(worst.get(path, 0), rank)
    assert [f.rank for f in failures] == sorted(worst.values(), reverse=True)[:FAILURES]
    assert all(worst[f.own_image] == f.rank for f in failures)


def test_a_picture_fails_once_at_most_and_its_caption_is_the_query(
    table: CaptionTable, measured: tuple[Opened, ImageEmbeddings]
) -> None:
    failures = worst_captions(measured[0], table, measured[1])
    assert len({failure.own_image for failure in failures}) == len(failures) == FAILURES
    row_of = {str(table.path(row)): row for row in range(len(table))}
    for failure in failures:
        own = [table.caption(int(c)) for c in table.captions_of(row_of[failure.own_image])]
        assert failure.answer.query in own


def test_the_marks_of_a_failure_say_which_picture_was_meant(
    table: CaptionTable, measured: tuple[Opened, ImageEmbeddings]
) -> None:
    for failure in worst_captions(measured[0], table, measured[1]):
        meant = [hit.image == failure.own_image for hit in failure.answer.hits]
        # Of the others nothing is known: a caption may fit several pictures.
        assert failure.answer.right == [True if own else None for own in meant]


def test_a_model_that_finds_every_picture_first_has_no_failures(
    table: CaptionTable, measured: tuple[Opened, ImageEmbeddings]
) -> None:
    opened, embeddings = measured
    one = table.take_images([4])
    found = ImageEmbeddings(np.array([0], dtype=np.int64), embeddings.vectors[4:5], 0)
    assert worst_captions(opened, one, found) == []


def test_sample_queries_are_captions_of_different_pictures_over_the_whole_split(
    outcome: Outcome, table: CaptionTable
) -> None:
    subject = sample_subject(outcome.run, table)
    assert list(subject.queries) == [table.caption(5 * row) for row in (0, 4, 8, 12, 16, 20)]
    assert len(subject.queries) == SAMPLE_QUERIES


def test_a_sample_query_is_answered_rightly_by_its_own_picture_alone(
    outcome: Outcome,
    table: CaptionTable,
    measured: tuple[Opened, ImageEmbeddings],
) -> None:
    from captune.evaluation.retrieval import search_images

    subject = sample_subject(outcome.run, table)
    assert subject.judge is not None
    query = subject.queries[1]
    hits = search_images(measured[0].model, table, measured[1], [query], k=len(table))[0]
    right = [hit.image for hit in hits if subject.judge(query, hit)]
    assert right == [str(table.path(4))]


def test_a_split_of_two_pictures_is_told_by_two_queries(
    outcome: Outcome, table: CaptionTable
) -> None:
    assert len(sample_subject(outcome.run, table.take_images([3, 9])).queries) == 2
