"""What every image tower is to captune: the form it has, and what it gives back."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from captune.preprocess import Preprocess


class Features(NamedTuple):
    """What a backbone sees: ``pooled (N, C)`` and the map it comes from, ``map (N, C, h, w)``."""

    pooled: Tensor
    map: Tensor


@runtime_checkable
class ImageEncoder(Protocol):
    """What captune asks of an image tower; it is a :class:`torch.nn.Module` besides.

    Attributes:
        name: how it is called in reports.
        feature_dim: C.
        preprocess: what it expects of its pixels.
    """

    name: str
    feature_dim: int
    preprocess: Preprocess

    def __call__(self, pixels: Tensor) -> Features:
        """``pixels (N, 3, S, S)``, normalised as ``preprocess`` says."""
        ...

    def description(self) -> dict[str, Any]:
        """A JSON object from which :func:`image_encoder_from_description` builds it anew."""
        ...
