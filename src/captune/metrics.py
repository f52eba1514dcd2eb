"""Retrieval metrics from ranks, computed block by block: the full matrix never exists.

Definitions. Image→text: the rank of an image is that of its best-placed caption (any of its
captions counts). Text→image: the rank of a caption is that of its image. A rank is one plus the
number of *other* items that score at least as much, so ties count against the query. Recall@K is
the percentage of queries with rank <= K over the whole gallery.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)

SimilarityRows = Callable[[int, int], Tensor]
"""Images ``[start, stop)`` against all captions: ``(stop - start, M)``."""


def similarity_rows(image: Tensor, text: Tensor) -> SimilarityRows:
    """Cosine similarity of ``image (N, D)`` and ``text (M, D)``, unit length, rows on demand."""
    columns = text.T  # (D, M)
    return lambda start, stop: image[start:stop] @ columns


def rows_per_block(captions: int, budget_bytes: int = 1 << 27) -> int:
    """How many rows of ``captions`` fp32 similarities fit the budget (default 128 MiB)."""
    return max(1, budget_bytes // (4 * max(1, captions)))


def retrieval_ranks(
    rows: SimilarityRows, image_of_caption: Tensor, images: int, *, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Ranks of all images and captions, ties counted against the query.

    Two passes over the same blocks: the first collects each caption's score with its own image,
    the second counts who scores at least as much. Own scores come from the very products that
    they are compared with; computed apart they would differ in the last bit and shift ranks.

    Args:
        rows: similarity of images ``[start, stop)`` with all captions, ``(stop - start, M)``.
        image_of_caption: ``(M,)`` int64, the image of each caption.
        images: N; every image needs at least one caption.
        block: images a block; default by memory.

    Returns:
        ``(N,)`` and ``(M,)`` int64 ranks, the best being 1.

    Raises:
        ValueError: a similarity is NaN, or an image has no caption.
    """
    captions = len(image_of_caption)
    owner = image_of_caption.cpu()
    if bool((torch.bincount(owner, minlength=images) == 0).any()):
        raise ValueError("every image needs at least one caption to be ranked")
    block = block or rows_per_block(captions)
    column = torch.arange(captions)
    own = torch.empty(captions)
    for start in range(0, images, block):
        similarity = rows(start, min(start + block, images)).float().cpu()
        if bool(similarity.isnan().any()):
            raise ValueError("a similarity is NaN: the embeddings hold NaN or infinite values")
        mine = (owner >= start) & (owner < start + len(similarity))
        own[mine] = similarity[owner[mine] - start, column[mine]]

    best_own = torch.full((images,), -torch.inf).scatter_reduce(0, owner, own, "amax")
    image_rank = torch.ones(images, dtype=torch.int64)
    caption_rank = torch.ones(captions, dtype=torch.int64)
    for start in range(0, images, block):
        similarity = rows(start, min(start + block, images)).float().cpu()
        stop = start + len(similarity)
        mine = (owner >= start) & (owner < stop)
        # An image's own captions are not rivals of its best one, nor a caption's own image of it.
        similarity[owner[mine] - start, column[mine]] = -torch.inf
        image_rank[start:stop] += (similarity >= best_own[start:stop, None]).sum(dim=1)
        caption_rank += (similarity >= own).sum(dim=0)
    return image_rank, caption_rank


def summarise_ranks(ranks: Tensor) -> dict[str, float]:
    """Recall@1, @5, @10 in percent and the median rank of ``ranks`` ``(Q,)``.

    The median of an even number of queries is the mean of the middle two.
    """
    recalls = {f"R@{k}": 100.0 * float((ranks <= k).double().mean()) for k in RECALL_AT}
    return {**recalls, "median_rank": float(ranks.double().quantile(0.5))}


def retrieval_metrics(image: Tensor, text: Tensor, image_of_caption: Tensor) -> dict[str, Any]:
    """Both directions at once, from embeddings.

    Args:
        image: ``(N, D)`` unit length.
        text: ``(M, D)`` unit length, one row for each caption.
        image_of_caption: ``(M,)`` int64.

    Returns:
        ``image_to_text`` and ``text_to_image`` (R@K in percent over the gallery of M captions and
        N images, ``median_rank``) and ``rsum``, the sum of the six recalls.
    """
    return metrics_of_ranks(
        *retrieval_ranks(similarity_rows(image, text), image_of_caption, len(image))
    )


def metrics_of_ranks(image_rank: Tensor, caption_rank: Tensor) -> dict[str, Any]:
    """What :func:`retrieval_metrics` returns, from the ranks ``(N,)`` and ``(M,)``."""
    both = {
        "image_to_text": summarise_ranks(image_rank),
        "text_to_image": summarise_ranks(caption_rank),
    }
    rsum = sum(direction[f"R@{k}"] for direction in both.values() for k in RECALL_AT)
    return {**both, "rsum": rsum}
