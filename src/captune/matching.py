"""Which caption of a batch describes which of its images: ids and embeddings in, masks out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captune.device import has_native_bf16

DUPLICATES = ("ignore", "positive")
ROUNDING = 1e-6  # the cosine of two equal rows in fp32 may fall this short of 1
COARSE = 4 / 256  # a cosine of unit rows in bf16 is off by less
WORTH_A_SIEVE = 1 << 18  # cosines


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
    """

    images: Tensor
    caption_images: Tensor
    own: int
    positive: Tensor
    ignored: Tensor
    share: Tensor | None = None


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

    positive = images[:, None] == caption_images  # (B, C)
    ignored = torch.zeros_like(positive)
    if duplicate_threshold > 0:
        alike = _near_duplicates(images, positive[:, :own], text, duplicate_threshold)
        if duplicates == "positive":
            positive = positive | alike
        else:
            ignored = alike & ~positive
    return Pairs(images, caption_images, own, positive, ignored)


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
    weight = weight[:, None]  # (B, 1)
    share = pairs.positive.float().mul_(weight)  # (B, C)
    share += pairs.positive[partner].float().mul_(1 - weight)
    positive = share > 0
    ignored = (pairs.ignored | pairs.ignored[partner]) & ~positive
    return pairs._replace(positive=positive, ignored=ignored, share=share)


def _near_duplicates(images: Tensor, wrote: Tensor, text: Tensor, threshold: float) -> Tensor:
    """``(B, C) bool``; ``wrote (B, own)`` says which caption was written for which image."""
    text = text.detach().float()
    own = wrote.shape[1]
    with torch.autocast(text.device.type, enabled=False):
        columns = _candidates(text, own, threshold)  # (c,), those of `text` that can be near
        cosine = text[:own] @ text[columns].T  # (own, c)
    near = (cosine >= threshold - ROUNDING) & wrote.any(0)[:, None]
    # Votes are added up at the first row of each image: a sum over `own` rows of C columns costs
    # less than a product with `wrote`. Sums of ones are exact in any order.
    votes = near.new_zeros((len(images), near.shape[1]), dtype=torch.float32)
    votes.index_add_(0, wrote.int().argmax(0), near.float())
    first = (images[:, None] == images).int().argmax(1)  # an image may stand in the batch twice
    alike = near.new_zeros((len(images), len(text)))
    alike[:, columns] = votes[first] > 0
    return alike


def _candidates(text: Tensor, own: int, threshold: float) -> slice | Tensor:
    """The rows of ``text (C, D)`` that may be near one of the first ``own``: all but those that a
    product in bf16 rules out, which on a CPU that computes in bf16 takes a third of the time.

    The rounding of two unit vectors and of their product moves a cosine by at most 3/256
    (Cauchy-Schwarz). A GPU is faster than the wait that a selection of rows would need.
    """
    worth = text.device.type == "cpu" and own * len(text) >= WORTH_A_SIEVE
    if not (worth and has_native_bf16(text.device)):
        return slice(None)
    coarse = text.bfloat16()
    nearest = (coarse @ coarse[:own].T).amax(1).float()  # (C,)
    return (nearest >= threshold - COARSE).nonzero()[:, 0]
