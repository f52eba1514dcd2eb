"""What a loss is called with, and what all losses over pairs do with it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from captune.matching import Pairs, PairsPart, one_to_one, whole


class Criterion(Protocol):
    """A loss over matched pairs: row ``i`` of ``image`` belongs to row ``i`` of ``text``.

    An :class:`torch.nn.Module` qualifies; its parameters, if any, are trained with the model.

    A loss that knows :class:`~captune.matching.Pairs` says so by an attribute ``takes_pairs =
    True``. It is then called as a :class:`PairedCriterion`; one without is given one caption for
    each image, as here.
    """

    def __call__(self, image: Tensor, text: Tensor) -> Tensor:
        """``image`` and ``text`` are ``(B, D)`` unit length, fp32; the result is a scalar."""
        ...


class PairedCriterion(Protocol):
    """A loss over B images and C captions; without pairs it is a :class:`Criterion`."""

    takes_pairs: bool

    def __call__(self, image: Tensor, text: Tensor, pairs: Pairs | None = None) -> Tensor:
        """``image (B, D)`` and ``text (C, D)`` are unit length; the result is a scalar."""
        ...


class PartialCriterion(Protocol):
    """A :class:`PairedCriterion` that can average some of the queries only.

    It says so by ``takes_parts = True``. Of several processes each then computes its own part of
    the loss; of any other loss each computes all of it.
    """

    takes_parts: bool

    def __call__(self, image: Tensor, text: Tensor, pairs: Pairs | PairsPart | None) -> Tensor:
        """All images ``(B, D)`` and texts ``(C, D)`` of the step; the results of all parts add up
        to the loss."""
        ...


def part_of(image: Tensor, text: Tensor, pairs: Pairs | PairsPart | None) -> PairsPart:
    """What of the pairs a loss averages here: a part as it is, or all of them.

    Raises:
        ValueError: ``pairs`` of another shape, or none where rows do not match.
    """
    return pairs if isinstance(pairs, PairsPart) else whole(_checked(image, text, pairs))


def _checked(image: Tensor, text: Tensor, pairs: Pairs | None) -> Pairs:
    """``pairs``, else the diagonal's; their shape must fit, or they would broadcast unnoticed."""
    shape = (len(image), len(text))
    if pairs is None:
        if len(set(shape)) > 1:
            raise ValueError(f"without pairs rows must match: {shape[0]} images, {shape[1]} texts")
        return one_to_one(len(image), image.device)
    masks = [mask for mask in (pairs.positive, pairs.ignored, pairs.share) if mask is not None]
    found = [tuple(mask.shape) for mask in masks]
    if set(found) != {shape}:
        raise ValueError(f"the pairs of {shape[0]} images and {shape[1]} texts are {found}")
    return pairs
