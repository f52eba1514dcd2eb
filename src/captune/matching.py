"""Which caption of a batch describes which of its images: ids and embeddings in, masks out."""

from __future__ import annotations

from collections.abc import Callable
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

    writers = caption_images[:own]
    likeness = _Likeness(text[:own], text, duplicate_threshold, duplicates)
    positive, ignored = _matched(images, writers, caption_images, likeness)
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
    mixed = _mixed(
        Block(pairs.positive, pairs.ignored),
        Block(pairs.positive[partner], pairs.ignored[partner]),
        weight,
    )
    return pairs._replace(positive=mixed.positive, ignored=mixed.ignored, share=mixed.share)


class Block(NamedTuple):
    """Some queries against some candidates, ``(R, K)`` each: as the fields of :class:`Pairs`."""

    positive: Tensor
    ignored: Tensor
    share: Tensor | None = None

    @property
    def shares(self) -> Tensor:
        """``(R, K)`` fp32: 1 for a positive where nothing is shared."""
        return self.positive.float() if self.share is None else self.share

    @property
    def turned(self) -> Block:
        """Candidates against queries."""
        return Block(*(None if mask is None else mask.T for mask in self))  # type: ignore[arg-type]


class PairsPart(NamedTuple):
    """What one of several processes averages of the pairs of a step: some of its queries.

    The parts of all processes hold each image and each own caption once, so their losses add up to
    that of all pairs; no part forms the B x C pairs of the whole.

    Attributes:
        images, caption_images, own: as in :class:`Pairs`, of the whole step.
        rows: the b images that are queries here, consecutive ones of B.
        columns: ``(c,) int64``, the own captions that are queries here.
        to_text: ``(b, C)``, these images against all captions.
        to_image: ``(c, B)``, these captions against all images.
        total: adds up a tensor over all parts, without a gradient.
    """

    images: Tensor
    caption_images: Tensor
    own: int
    rows: slice
    columns: Tensor
    to_text: Block
    to_image: Block
    total: Callable[[Tensor], Tensor]


def match_part(
    step: tuple[Tensor, Tensor, int],
    text: Tensor,
    *,
    rows: slice,
    total: Callable[[Tensor], Tensor],
    mix: tuple[Tensor, Tensor] | None = None,
    duplicate_threshold: float = 0.0,
    duplicates: str = "ignore",
) -> PairsPart:
    """The part of :func:`match_pairs`, and of :func:`mix_pairs` where there is a ``mix``, whose
    queries are the images ``rows`` and the captions that were written for them.

    Args:
        step: ``images (B,)``, each there once, ``caption_images (C,)`` and ``own``, all of them; on
            the host, where choosing rows does not wait for a device.
        text: ``(C, D)``, as for :func:`match_pairs`; its device is the masks'.
        rows: consecutive images.
        total: adds up a tensor over all parts.
        mix: ``partner (B,)`` and ``weight (B,)`` of :func:`mix_pairs`, on the host.
    """
    images, caption_images, own = step
    device, writers = text.device, caption_images[:own]
    ids, owners = images.to(device), caption_images.to(device)

    def block(queried: Tensor, candidates: Tensor | slice) -> Block:
        """The images ``queried`` against some captions; near to them is what is near to theirs."""
        theirs = torch.isin(writers, images[queried]).nonzero()[:, 0].to(device)
        alike = _Likeness(text[theirs], text[candidates], duplicate_threshold, duplicates)
        place = queried.to(device)
        return Block(*_matched(ids[place], owners[theirs], owners[candidates], alike))

    every = torch.arange(len(images))
    mine = every[rows]
    columns = torch.isin(writers, images[rows]).nonzero()[:, 0].to(device)
    if mix is None:
        to_text, to_image = block(mine, slice(None)), block(every, columns)
    else:
        partner, weight = mix[0], mix[1].to(device)
        both = block(torch.cat((mine, partner[rows])), slice(None))
        one, other = (
            Block(both.positive[half], both.ignored[half])
            for half in (slice(len(mine)), slice(len(mine), None))
        )
        to_text = _mixed(one, other, weight[rows])
        one, there = block(every, columns), partner.to(device)
        to_image = _mixed(one, Block(one.positive[there], one.ignored[there]), weight)
    return PairsPart(ids, owners, own, rows, columns, to_text, to_image.turned, total)


def whole(pairs: Pairs) -> PairsPart:
    """``pairs`` as the only part."""
    to_text = Block(pairs.positive, pairs.ignored, pairs.share)
    own = slice(pairs.own)
    to_image = Block(*(None if mask is None else mask[:, own] for mask in to_text)).turned  # type: ignore[arg-type]
    columns = torch.arange(pairs.own, device=pairs.images.device)
    return PairsPart(*pairs[:3], slice(None), columns, to_text, to_image, lambda tensor: tensor)


def _mixed(one: Block, other: Block, weight: Tensor) -> Block:
    """Rows of images mixed by two: ``weight (R,)`` of ``one``, the rest of ``other``."""
    weight = weight[:, None]  # (R, 1)
    share = one.positive.float().mul_(weight)  # (R, K)
    share += other.positive.float().mul_(1 - weight)
    positive = share > 0
    return Block(positive, (one.ignored | other.ignored) & ~positive, share)


class _Likeness(NamedTuple):
    """What near-duplicates are told by: embeddings of captions that were written for images in
    question, ``(W, D)``, and of all candidates, ``(K, D)``."""

    written: Tensor
    candidates: Tensor
    threshold: float
    duplicates: str


def _matched(
    images: Tensor, writers: Tensor, owners: Tensor, alike: _Likeness
) -> tuple[Tensor, Tensor]:
    """``(R, K)`` positive and ignored: ``images (R,)`` against candidates of ``owners (K,)``."""
    positive = images[:, None] == owners  # (R, K)
    ignored = torch.zeros_like(positive)
    if alike.threshold > 0:
        near = _near_duplicates(images, writers, alike)
        if alike.duplicates == "positive":
            positive = positive | near
        else:
            ignored = near & ~positive
    return positive, ignored


def _near_duplicates(images: Tensor, writers: Tensor, alike: _Likeness) -> Tensor:
    """``(R, K) bool``; ``writers (W,)`` says for which image each of the W captions was written."""
    written, candidates = alike.written.detach().float(), alike.candidates.detach().float()
    with torch.autocast(written.device.type, enabled=False):
        columns = _candidates(written, candidates, alike.threshold)  # (k,), those that can be near
        cosine = written @ candidates[columns].T  # (W, k)
    place, there = _first_place(writers, images)
    near = (cosine >= alike.threshold - ROUNDING) & there[:, None]
    # Votes are added up at the first row of each image: a sum over W rows of k columns costs less
    # than a product with who wrote for whom. Sums of ones are exact in any order.
    votes = near.new_zeros((len(images), near.shape[1]), dtype=torch.float32)
    votes.index_add_(0, place, near.float())
    found = near.new_zeros((len(images), len(candidates)))
    found[:, columns] = votes[_first_place(images, images)[0]] > 0  # an image may stand there twice
    return found


def _candidates(written: Tensor, candidates: Tensor, threshold: float) -> slice | Tensor:
    """The rows of ``candidates (K, D)`` that may be near one of ``written (W, D)``: all but those
    that a product in bf16 rules out, which a CPU made for bf16 does in a third of the time.

    The rounding of two unit vectors and of their product moves a cosine by at most 3/256
    (Cauchy-Schwarz). A GPU is faster than the wait that a selection of rows would need.
    """
    worth = written.device.type == "cpu" and len(written) * len(candidates) >= WORTH_A_SIEVE
    if not (worth and has_native_bf16(written.device)):
        return slice(None)
    nearest = (candidates.bfloat16() @ written.bfloat16().T).amax(1).float()  # (K,)
    return (nearest >= threshold - COARSE).nonzero()[:, 0]


def _first_place(wanted: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """For each of ``wanted`` the first row of ``images`` with that id, and whether there is one."""
    ordered, rows = images.sort(stable=True)
    place = torch.searchsorted(ordered, wanted).clamp(max=len(images) - 1)
    return rows[place], ordered[place] == wanted
