"""All pairs of a batch: which caption describes which image, and which do so of mixed ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captune.matching.block import Block, matched, mixed
from captune.matching.duplicates import Likeness

DUPLICATES = ("ignore", "positive")


class Pairs(NamedTuple):
    """What the B images and the C captions of a batch are to one another.

    The first ``own`` captions belong to images of the batch; they are the queries text→image. The
    rest are further candidates image→text, as a rule negatives.

    Attributes:
        images: ``(B,) int64``, id of each image.
        caption_images: ``(C,) int64``, id of the image each caption was written for.
        own: how many captions, from the first, belong to images of the batch.
        positive: ``(B, C) bool``, the caption describes the image; a caption may describe several.
        ignored: ``(B, C) bool``, neither positive nor negative; never where ``positive`` is.
        share: ``(B, C)`` fp32, how much of the image each positive describes: above 0 to 1, and 0
            for all others. None where a positive describes all of its image.
        likeness: what near-duplicates were told by; None where none were looked for.
    """

    images: Tensor
    caption_images: Tensor
    own: int
    positive: Tensor
    ignored: Tensor
    share: Tensor | None = None
    likeness: Likeness | None = None


def one_to_one(rows: int, device: torch.device | str | None = None) -> Pairs:
    """The pairs of ``rows`` images and as many captions, row ``i`` with row ``i`` alone."""
    ids = torch.arange(rows, device=device)
    own = torch.eye(rows, dtype=torch.bool, device=device)
    return Pairs(ids, ids, rows, own, torch.zeros_like(own))


def match_pairs(
    images: Tensor,
    caption_images: Tensor,
    text: Tensor,
    *,
    own: int,
    duplicate_threshold: float = 0.0,
    duplicates: str = "ignore",
) -> Pairs:
    r"""Tell positives, near-duplicates and negatives of a batch apart.

    A caption is positive for the image it was written for, wherever it stands: a caption of the
    bank that happens to belong to an image of the batch is no negative. Caption :math:`c` is a
    near-duplicate for image :math:`b`, which it was not written for, if

    .. math:: \max_{j < \text{own},\; \text{image of } j \,=\, b} \langle v_j, v_c \rangle
        \ge \text{threshold}

    At most the ``(own, C)`` text-text product is formed, and none where the threshold is 0.

    Args:
        images: ``(B,) int64``, ids of the images.
        caption_images: ``(C,) int64``, ids of the images the captions were written for.
        text: ``(C, D)``, unit length; best the frozen tower's, before any adapter.
        own: how many captions, from the first, belong to images of the batch; any number each.
        duplicate_threshold: cosine from which a caption counts as a near-duplicate; 0 = none does.
        duplicates: what near-duplicates are: ``"ignore"`` or ``"positive"``.

    Raises:
        ValueError: shapes that do not fit, or an argument out of range.
    """
    if images.ndim != 1 or caption_images.ndim != 1 or len(text) != len(caption_images):
        raise ValueError(
            "match_pairs wants images (B,), caption_images (C,) and text (C, D), found "
            f"{tuple(images.shape)}, {tuple(caption_images.shape)} and {tuple(text.shape)}"
        )
    if not 0 < own <= len(text):
        raise ValueError(f"own must be between 1 and the {len(text)} captions, found {own}")
    if not 0 <= duplicate_threshold <= 1:
        raise ValueError(f"duplicate_threshold must be 0 to 1, found {duplicate_threshold}")
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates must be one of {DUPLICATES}, found {duplicates!r}")

    writers = caption_images[:own]
    likeness = Likeness(text[:own], text, duplicate_threshold, duplicates)
    positive, ignored = matched(images, writers, caption_images, likeness)
    told = likeness if duplicate_threshold > 0 else None
    return Pairs(images, caption_images, own, positive, ignored, likeness=told)


def mix_pairs(pairs: Pairs, partner: Tensor, weight: Tensor) -> Pairs:
    r"""The pairs of images mixed by two: :math:`\lambda_i x_i + (1 - \lambda_i) x_{p(i)}`.

    Mixup (Zhang et al. 2018, equation 2) for pairs: a caption describes :math:`\lambda_i` of the
    mixed image if it is a positive of image :math:`i`, :math:`1 - \lambda_i` if it is one of the
    partner's, all of it if it is both. What either image ignores, the mixed one ignores, unless it
    describes the other.

    Args:
        pairs: of the images as they were.
        partner: ``(B,) int64``, :math:`p`, the row that each image is mixed with.
        weight: ``(B,)``, :math:`\lambda`, of each image itself, 0 to 1.

    Raises:
        ValueError: shapes that do not fit, or pairs that are mixed already.
    """
    if pairs.share is not None:
        raise ValueError("these pairs are mixed already")
    if partner.shape != pairs.images.shape or weight.shape != pairs.images.shape:
        raise ValueError(
            f"mix_pairs wants {len(pairs.images)} partners and weights, found "
            f"{tuple(partner.shape)} and {tuple(weight.shape)}"
        )
    both = mixed(
        Block(pairs.positive, pairs.ignored),
        Block(pairs.positive[partner], pairs.ignored[partner]),
        weight,
    )
    return pairs._replace(positive=both.positive, ignored=both.ignored, share=both.share)
