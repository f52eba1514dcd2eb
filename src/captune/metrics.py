"""Retrieval metrics from ranks (:mod:`captune.ranks`), in percent.

Definitions. Image→text: the rank of an image is that of its best-placed caption (any of its
captions counts). Text→image: the rank of a caption is that of its image. A rank is one plus the
number of *other* items that score at least as much, so ties count against the query. Recall@K is
the percentage of queries with rank <= K over the whole gallery.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captune.processes import ALONE, Processes
from captune.ranks import Ranks, retrieval_ranks

RECALL_AT = (1, 5, 10)


def summarise_ranks(ranks: Tensor) -> dict[str, float]:
    """Of ``ranks (Q,)``: Recall@1, @5, @10 and the mean reciprocal rank (``MRR``), in percent, and
    ``median_rank`` and ``mean_rank``.

    The median of an even number of queries is the mean of the middle two.
    """
    exact = ranks.double()
    recalls = {f"R@{k}": 100.0 * float((ranks <= k).double().mean()) for k in RECALL_AT}
    return {
        **recalls,
        "median_rank": float(exact.quantile(0.5)),
        "mean_rank": float(exact.mean()),
        "MRR": 100.0 * float(exact.reciprocal().mean()),
    }


def average_precision_at_r(of_own: Tensor, image_of_caption: Tensor) -> Tensor:
    r"""AP@R of each image (Musgrave et al. 2020, section 3.2), 0 to 1.

    An image has :math:`R` captions of its own; with :math:`P(k)` the share of them among the first
    :math:`k` of all captions,

    .. math:: AP@R = \frac{1}{R} \sum_{k=1}^{R} P(k) \, [\text{the } k\text{-th is its own}]

    Args:
        of_own: ``(M,)`` places of captions among all captions for their own image, from
            :class:`captune.ranks.Ranks`.
        image_of_caption: ``(M,)`` int64.

    Returns:
        ``(N,)`` double.
    """
    owner = image_of_caption.cpu()
    order = of_own.argsort(stable=True)
    order = order[owner[order].argsort(stable=True)]  # by image, best place first
    counts = torch.bincount(owner)
    first = counts.cumsum(0) - counts
    found = 1 + torch.arange(len(owner)) - first[owner[order]]  # own ones up to and with this one
    place = of_own[order]
    precision = torch.where(place <= counts[owner[order]], found.double() / place.double(), 0.0)
    total = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, owner[order], precision)
    return total / counts


def retrieval_metrics(
    image: Tensor,
    text: Tensor,
    image_of_caption: Tensor,
    *,
    every_caption: bool = False,
    device: torch.device | None = None,
    here: Processes = ALONE,
) -> dict[str, Any]:
    """Both directions at once, from embeddings.

    Args:
        image: ``(N, D)`` unit length.
        text: ``(M, D)`` unit length, one row for each caption.
        image_of_caption: ``(M,)`` int64.
        every_caption: add ``mAP@R`` (percent), for which all captions of an image are ranked.
        device, here: where ranks are counted, and by whom (:func:`captune.ranks.retrieval_ranks`).

    Returns:
        ``image_to_text`` and ``text_to_image`` (what :func:`summarise_ranks` gives, over the
        gallery of M captions and N images) and ``rsum``, the sum of the six recalls.

    Raises:
        ValueError: see :func:`captune.ranks.retrieval_ranks`.
    """
    ranks = retrieval_ranks(
        image, text, image_of_caption, every_caption=every_caption, device=device, here=here
    )
    return metrics_of_ranks(ranks, image_of_caption)


def metrics_of_ranks(ranks: Ranks, image_of_caption: Tensor) -> dict[str, Any]:
    """What :func:`retrieval_metrics` returns, from ranks."""
    both = {
        "image_to_text": summarise_ranks(ranks.image),
        "text_to_image": summarise_ranks(ranks.caption),
    }
    if ranks.of_own is not None:
        precision = average_precision_at_r(ranks.of_own, image_of_caption)
        both["image_to_text"]["mAP@R"] = 100.0 * float(precision.mean())
        # A caption has one image: R is 1, and AP@1 is whether it is found first.
        both["text_to_image"]["mAP@R"] = both["text_to_image"]["R@1"]
    rsum = sum(direction[f"R@{k}"] for direction in both.values() for k in RECALL_AT)
    return {**both, "rsum": rsum}
