"""Easy and hard queries, hubs and groups of a run's page, against slow loops over all scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from captune.bank import CaptionBank
from captune.data.sources import open_source
from captune.data.table import CaptionTable
from captune.evaluation.embeddings import ImageEmbeddings, embed_images
from captune.evaluation.retrieval import evaluate_retrieval
from captune.workflow.analysis import (
    EASIEST,
    FAILURES,
    HUBS,
    Retrieval,
    analyse,
    easiest,
    hardest,
    hubs,
)
from captune.workflow.opening import Opened, open_model


@pytest.fixture
def table(coco: Path) -> CaptionTable:
    return open_source(coco).table("train")


@pytest.fixture
def retrieval(tiny_clip: Path, table: CaptionTable) -> Retrieval:
    opened = open_model(str(tiny_clip))
    embeddings = embed_images(opened.model, table, precision="fp32")
    return ranked(opened, table, embeddings)


def ranked(opened: Opened, table: CaptionTable, embeddings: ImageEmbeddings) -> Retrieval:
    bank = CaptionBank.build(table.texts(), opened.model.text_encoder)
    ranks = evaluate_retrieval(opened.model, table, embeddings, bank).ranks
    return Retrieval.of(opened, table, embeddings, ranks)


def test_failures_are_the_captions_whose_own_picture_came_last(
    table: CaptionTable, retrieval: Retrieval
) -> None:
    failures = hardest(retrieval)
    bank = CaptionBank.build(table.texts(), retrieval.model.text_encoder)
    scores = (retrieval.embeddings.vectors @ bank.all().T).tolist()
    worst: dict[str, int] = {}  # the worst rank of each picture's captions
    for caption, owner in enumerate(table.image_of_caption.tolist()):
        column = [row[caption] for row in scores]
        rank = sum(score >= column[owner] for score in column)
        path = str(table.path(owner))
        worst[path] = max(worst.get(path, 0), rank)
    assert [f.rank for f in failures] == sorted(worst.values(), reverse=True)[:FAILURES]
    assert all(worst[f.own_image] == f.rank for f in failures)


def test_a_picture_fails_once_at_most_and_its_caption_is_the_query(
    table: CaptionTable, retrieval: Retrieval
) -> None:
    failures = hardest(retrieval)
    assert len({failure.own_image for failure in failures}) == len(failures) == FAILURES
    row_of = {str(table.path(row)): row for row in range(len(table))}
    for failure in failures:
        own = [table.caption(int(c)) for c in table.captions_of(row_of[failure.own_image])]
        assert failure.answer.query in own


def test_the_marks_of_a_failure_say_which_picture_was_meant(
    table: CaptionTable, retrieval: Retrieval
) -> None:
    for failure in hardest(retrieval):
        meant = [hit.image == failure.own_image for hit in failure.answer.hits]
        # Of the others nothing is known: a caption may fit several pictures.
        assert failure.answer.right == [True if own else None for own in meant]


def test_a_model_that_finds_every_picture_first_has_no_failures(
    table: CaptionTable, retrieval: Retrieval
) -> None:
    one = table.take_images([4])
    vectors = retrieval.embeddings.vectors[4:5]
    found = ImageEmbeddings(np.array([0], dtype=np.int64), vectors, 0)
    alone = ranked(Opened(retrieval.model, None, "tiny"), one, found)
    assert hardest(alone) == [] and easiest(alone) == []
    assert analyse(alone).twins == []


def test_the_surest_captions_stand_furthest_above_the_best_other_picture(
    table: CaptionTable, retrieval: Retrieval
) -> None:
    scores = (retrieval.embeddings.vectors @ retrieval.text.T).tolist()
    best: dict[str, float] = {}
    for caption, owner in enumerate(table.image_of_caption.tolist()):
        others = max(row[caption] for image, row in enumerate(scores) if image != owner)
        margin = scores[owner][caption] - others
        if margin > 0:
            path = str(table.path(owner))
            best[path] = max(best.get(path, 0.0), margin)
    expected = sorted(best, key=lambda path: -best[path])[:EASIEST]
    found = easiest(retrieval)
    assert [answer.hits[0].image for answer in found] == expected
    assert all(answer.right is not None and answer.right[0] for answer in found)


def test_hubs_are_the_pictures_that_most_captions_find(retrieval: Retrieval) -> None:
    scores = retrieval.text @ retrieval.embeddings.vectors.T
    counts: dict[str, int] = {}
    for row in scores.tolist():
        for image in sorted(range(len(row)), key=lambda i: -row[i])[:10]:
            counts[retrieval.path(image)] = counts.get(retrieval.path(image), 0) + 1
    found = hubs(retrieval)
    assert len(found) == HUBS
    assert [hub.captions for hub in found] == sorted(counts.values(), reverse=True)[:HUBS]
    assert all(counts[hub.image] == hub.captions for hub in found)
    # 24 images, 120 captions, ten found by each.
    assert analyse(retrieval).usual == pytest.approx(50)


def test_images_are_grouped_by_objects_where_their_annotations_lie(
    coco: Path, table: CaptionTable, retrieval: Retrieval
) -> None:
    assert len(analyse(retrieval).tables) == 1
    annotations = coco / "annotations"
    captions = json.loads((annotations / "captions_train2014.json").read_text(encoding="utf-8"))
    objects = [
        {"image_id": image["id"], "category_id": 1, "area": 9.0}
        for number, image in enumerate(captions["images"])
        for _ in range(number % 3)
    ]
    value = {
        "images": captions["images"],
        "annotations": objects,
        "categories": [{"id": 1, "name": "square"}],
    }
    (annotations / "instances_train2014.json").write_text(json.dumps(value), encoding="utf-8")
    title, groups = analyse(retrieval).tables[1]
    assert "number of objects" in title
    assert [group.label for group in groups] == ["0 objects", "1 object", "2 objects"]
    for value, group in enumerate(groups):
        ranks = retrieval.ranks.image[torch.arange(24) % 3 == value]
        assert group.recalls["R@5"] == pytest.approx(100 * float((ranks <= 5).float().mean()))


def test_objects_of_other_images_leave_the_page_without_that_table(
    coco: Path, retrieval: Retrieval, capsys: pytest.CaptureFixture[str]
) -> None:
    """An own table over COCO's photos has ids of its own."""
    path = coco / "annotations" / "instances_train2014.json"
    value = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "square"}]}
    path.write_text(json.dumps(value), encoding="utf-8")
    assert len(analyse(retrieval).tables) == 1
    assert "no recall by number of objects" in capsys.readouterr().err
