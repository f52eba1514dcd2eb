"""Recall of a model on a table, and the pictures that best answer a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captune.bank import CaptionBank
from captune.data.table import CaptionTable, Rows
from captune.errors import CaptuneError
from captune.evaluation.embeddings import ImageEmbeddings
from captune.evaluation.intervals import (
    CONFIDENCE,
    METRICS,
    RESAMPLES,
    Interval,
    QueryHits,
    bootstrap,
)
from captune.evaluation.protocols import FULL, Protocol, Ranked
from captune.metrics import metrics_of_ranks
from captune.models import CLIPModel
from captune.ranks import Ranks


class Retrieved(NamedTuple):
    """What retrieval was measured to be: a JSON object, the ``hits`` image by image for a
    comparison, and the ``ranks`` that both are of, in the order of the protocol."""

    metrics: dict[str, Any]
    hits: QueryHits
    ranks: Ranks


def evaluate_retrieval(
    model: CLIPModel,
    table: CaptionTable,
    embeddings: ImageEmbeddings,
    bank: CaptionBank,
    protocol: Protocol = FULL,
) -> Retrieved:
    """Retrieval of the images that were read, by a protocol, with all that a citation needs.

    Returns:
        ``metrics`` hold ``data``, ``split``, ``images``, ``captions`` (those that the protocol
        counts), ``split_digest``, ``unreadable_images``, ``protocol``, what
        :func:`captune.metrics.metrics_of_ranks` gives, and ``intervals``: of each recall and of
        rsum ``[low, high]``.

    Raises:
        CaptuneError: the protocol is not defined for the table.
    """
    protocol.check(table, embeddings.unreadable)
    captions, owner = table.captions_among(embeddings.rows)
    text = caption_embeddings(model, bank, captions)
    owners = torch.from_numpy(owner)
    ranked = Ranked.by(protocol, embeddings.vectors, text, owners, model.device)
    hits = QueryHits.from_ranks(ranked.ranks.image, ranked.ranks.caption, ranked.owner)
    metrics = {
        "data": table.name,
        "split": table.split,
        "images": len(ranked.ranks.image),
        "captions": len(ranked.owner),
        "split_digest": table.digest,
        "unreadable_images": embeddings.unreadable,
        "protocol": protocol.stamp(),
        **metrics_of_ranks(ranked.ranks, ranked.owner),
        "intervals": intervals_of(bootstrap(hits)),
    }
    return Retrieved(metrics, hits, ranked.ranks)


def intervals_of(found: Sequence[Interval]) -> dict[str, Any]:
    """The seven intervals of a bootstrap as a JSON object, in the shape of the metrics."""
    nested: dict[str, Any] = {"confidence": CONFIDENCE, "over": "images", "resamples": RESAMPLES}
    for (direction, key), interval in zip(METRICS, found[:-1], strict=True):
        nested.setdefault(direction, {})[key] = [interval.low, interval.high]
    return {**nested, "rsum": [found[-1].low, found[-1].high]}


@torch.no_grad()
def caption_embeddings(model: CLIPModel, bank: CaptionBank, captions: Rows) -> Tensor:
    """Caption rows ``(M,)`` to ``(M, D)`` fp32 on the CPU, as images are compared with them."""
    return model.project_text(bank.lookup(captions).to(model.device)).cpu()


@dataclass(frozen=True)
class Hit:
    """An image found for a query: cosine similarity, and the first of its own captions."""

    image: str
    score: float
    caption: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def search_images(
    model: CLIPModel,
    table: CaptionTable,
    embeddings: ImageEmbeddings,
    queries: Sequence[str],
    *,
    k: int = 5,
) -> list[list[Hit]]:
    """The ``k`` images that are nearest to each query, best first.

    Raises:
        CaptuneError: ``k`` below 1, or an empty query.
    """
    if k < 1:
        raise CaptuneError(f"at least one picture must be asked for, found k={k}")
    if any(not query.strip() for query in queries):
        raise CaptuneError("an empty query matches nothing: say what to look for")
    text = model.encode_text(list(queries)).cpu()  # (Q, D)
    scores = text @ embeddings.vectors.T  # (Q, n)
    best = scores.topk(min(k, scores.shape[1]), dim=1)
    found = []
    for values, columns in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        rows = [int(embeddings.rows[column]) for column in columns]
        found.append(
            [
                Hit(str(table.path(row)), value, table.caption(int(table.captions_of(row)[0])))
                for row, value in zip(rows, values, strict=True)
            ]
        )
    return found
