"""What the page of a run tells of its errors: easy and hard queries, groups, hubs, twins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from captune.bank import CaptionBank
from captune.console import say
from captune.data.objects import instance_files, read_objects
from captune.data.table import CaptionTable, Rows
from captune.errors import CaptuneError
from captune.evaluation.analysis import (
    caption_margins,
    groups_by_length,
    groups_by_objects,
    near_twins,
    shared_captions,
)
from captune.evaluation.embeddings import ImageEmbeddings
from captune.evaluation.hubness import NEIGHBOURS, k_occurrence, similarity_rows
from captune.evaluation.retrieval import Hit, caption_embeddings, search_images
from captune.models import CLIPModel
from captune.ranks import Ranks
from captune.report.html import Analysis, Failure, Hub, Twins
from captune.report.plots import QueryAnswer
from captune.workflow.opening import Opened

FAILURES = 5
EASIEST = 3
HUBS = 5
SHARED = 5


@dataclass(frozen=True)
class Retrieval:
    """A model's ranking of the images of ``table`` that were read, and of their captions.

    ``captions (M,)``: caption rows; ``owner (M,)``: the place of each one's image in
    ``embeddings``; ``text (M, D)``.
    """

    model: CLIPModel
    table: CaptionTable
    embeddings: ImageEmbeddings
    captions: Rows
    owner: Rows
    text: Tensor
    ranks: Ranks

    @classmethod
    def of(
        cls, opened: Opened, table: CaptionTable, embeddings: ImageEmbeddings, ranks: Ranks
    ) -> Retrieval:
        """``ranks`` are of all these images and captions, as measuring has found them; it has built
        the bank, too, that caption embeddings come from."""
        precision = opened.run.config.precision if opened.run else "auto"
        bank = CaptionBank.build(table.texts(), opened.model.text_encoder, precision=precision)
        captions, owner = table.captions_among(embeddings.rows)
        text = caption_embeddings(opened.model, bank, captions)
        return cls(opened.model, table, embeddings, captions, owner, text, ranks)

    def caption(self, place: int) -> str:
        """The text of a caption, by its place."""
        return self.table.caption(int(self.captions[place]))

    def path(self, image: int) -> str:
        """The file of an image, by its place."""
        return str(self.table.path(int(self.embeddings.rows[image])))

    def answer(self, place: int) -> QueryAnswer:
        """The pictures that best answer a caption; the one that was meant is marked."""
        query, own = self.caption(place), self.path(int(self.owner[place]))
        found = search_images(self.model, self.table, self.embeddings, [query])[0]
        return QueryAnswer(query, found, _own_marks(found, own))


def analyse(retrieval: Retrieval) -> Analysis:
    """All that the page tells."""
    images, table = retrieval.embeddings.vectors, retrieval.table
    texts = [retrieval.caption(place) for place in range(len(retrieval.captions))]
    tables = [
        ("Captions by their length (text to image)", groups_by_length(retrieval.ranks, texts))
    ]
    counts = _object_counts(table)
    if counts is not None:
        title = "Images by their number of objects (image to text)"
        of_read = counts[retrieval.embeddings.rows]
        tables.append((title, groups_by_objects(retrieval.ranks, of_read)))
    shared = shared_captions(texts, retrieval.owner)
    count, twins = near_twins(images)
    return Analysis(
        easiest=easiest(retrieval),
        hardest=hardest(retrieval),
        tables=tables,
        hubs=hubs(retrieval),
        usual=min(NEIGHBOURS, len(images)) * len(texts) / len(images),
        shared=shared[:SHARED],
        shared_count=len(shared),
        twins=[Twins(retrieval.path(a), retrieval.path(b), cosine) for a, b, cosine in twins],
        twin_count=count,
    )


def _object_counts(table: CaptionTable) -> Rows | None:
    """``(N,)`` objects in each image; None where nothing says it, or not of these images: an own
    table may name COCO's photos by ids of its own, and a page shall not fail for that."""
    if not instance_files(table):
        return None
    try:
        return np.asarray(read_objects(table).counts.sum(axis=1), dtype=np.int64)
    except CaptuneError as error:
        say(f"no recall by number of objects: {error}")
        return None


def easiest(retrieval: Retrieval) -> list[QueryAnswer]:
    """The captions whose own picture stands furthest above all others, one a picture at most."""
    images, owner = retrieval.embeddings.vectors, torch.from_numpy(retrieval.owner)
    if len(images) < 2:
        return []  # one alone stands above nothing
    margins = caption_margins(images, retrieval.text, owner)
    order = margins.argsort(descending=True, stable=True)
    found = order[margins[order] > 0]
    return [retrieval.answer(place) for place in _one_a_picture(retrieval, found, EASIEST)]


def hardest(retrieval: Retrieval) -> list[Failure]:
    """The captions whose own picture came last, one a picture at most, worst first."""
    ranks = retrieval.ranks.caption
    order = ranks.argsort(descending=True, stable=True)
    return [
        Failure(
            retrieval.answer(place),
            retrieval.path(int(retrieval.owner[place])),
            int(ranks[place]),
        )
        for place in _one_a_picture(retrieval, order[ranks[order] > 1], FAILURES)
    ]


def hubs(retrieval: Retrieval) -> list[Hub]:
    """The images that the most captions have among their first ten, most first."""
    images, text = retrieval.embeddings.vectors, retrieval.text
    counts = k_occurrence(similarity_rows(images, text), len(images), len(text))["text_to_image"]
    return [
        Hub(retrieval.path(place), int(counts[place]))
        for place in counts.argsort(descending=True, stable=True)[:HUBS].tolist()
    ]


def _one_a_picture(retrieval: Retrieval, places: Tensor, most: int) -> list[int]:
    """The first of ``places`` that are of different pictures."""
    seen: dict[int, int] = {}
    for place in places.tolist():
        seen.setdefault(int(retrieval.owner[place]), place)
        if len(seen) == most:
            break
    return list(seen.values())


def _own_marks(hits: Sequence[Hit], own_image: str) -> list[bool | None]:
    """The picture that was meant is right; of the others nothing is known."""
    return [True if hit.image == own_image else None for hit in hits]
