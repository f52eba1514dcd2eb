"""The pairs of a step in parts, one for each of several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from captune.device import send
from captune.matching.block import Block, matched, mixed
from captune.matching.duplicates import Likeness
from captune.matching.pairs import Pairs


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
        likeness: as in :class:`Pairs`, of the whole step.
    """

    images: Tensor
    caption_images: Tensor
    own: int
    rows: slice
    columns: Tensor
    to_text: Block
    to_image: Block
    total: Callable[[Tensor], Tensor]
    likeness: Likeness | None = None


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
    """The part of :func:`~captune.matching.match_pairs`, and of :func:`~captune.matching.mix_pairs`
    where there is a ``mix``, whose queries are the images ``rows`` and the captions that were
    written for them.

    Args:
        step: ``images (B,)``, each there once, ``caption_images (C,)`` and ``own``, all of them; on
            the host, where choosing rows does not wait for a device.
        text: ``(C, D)``, as for :func:`match_pairs`; its device is the masks'.
        rows: consecutive images.
        total: adds up a tensor over all parts.
        mix: ``partner (B,)`` and ``weight (B,)`` of :func:`mix_pairs`, on the host.
    """
    images, caption_images, own = step
    writers = caption_images[:own]

    def there(rows: Tensor) -> Tensor:
        return send(rows, text.device)

    ids, owners = there(images), there(caption_images)

    def block(queried: Tensor, candidates: Tensor | slice) -> Block:
        """The images ``queried`` against some captions; near to them is what is near to theirs."""
        theirs = there(torch.isin(writers, images[queried]).nonzero()[:, 0])
        alike = Likeness(text[theirs], text[candidates], duplicate_threshold, duplicates)
        place = there(queried)
        return Block(*matched(ids[place], owners[theirs], owners[candidates], alike))

    every = torch.arange(len(images))
    mine = every[rows]
    columns = there(torch.isin(writers, images[rows]).nonzero()[:, 0])
    if mix is None:
        to_text, to_image = block(mine, slice(None)), block(every, columns)
    else:
        partner, weight = mix[0], there(mix[1])
        both = block(torch.cat((mine, partner[rows])), slice(None))
        one, other = (
            Block(both.positive[half], both.ignored[half])
            for half in (slice(len(mine)), slice(len(mine), None))
        )
        to_text = mixed(one, other, weight[rows])
        one, others = block(every, columns), there(partner)
        to_image = mixed(one, Block(one.positive[others], one.ignored[others]), weight)
    likeness = Likeness(text[:own], text, duplicate_threshold, duplicates)
    told = likeness if duplicate_threshold > 0 else None
    return PairsPart(ids, owners, own, rows, columns, to_text, to_image.turned, total, told)


def whole(pairs: Pairs) -> PairsPart:
    """``pairs`` as the only part."""
    to_text = Block(pairs.positive, pairs.ignored, pairs.share)
    own = slice(pairs.own)
    to_image = Block(*(None if mask is None else mask[:, own] for mask in to_text)).turned  # type: ignore[arg-type]
    columns = torch.arange(pairs.own, device=pairs.images.device)
    return PairsPart(
        *pairs[:3],
        slice(None),
        columns,
        to_text,
        to_image,
        lambda tensor: tensor,
        pairs.likeness,
    )
