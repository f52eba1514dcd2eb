"""The frozen text tower of a model, which may be loaded later, or never."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from captune.encoders.text import (
    TextEncoder,
    freeze,
    load_named_text_encoder,
    text_description,
)
from captune.errors import CaptuneError


class FrozenText:
    """A text tower, and what a run states of it, which is known without loading it.

    No module: a tower that happens to be one is not registered as a part of the model.

    Args:
        description: as :func:`captune.encoders.text.text_description` gives it.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.description = dict(description)
        self._encoder: TextEncoder | None = None

    @classmethod
    def of(cls, encoder: TextEncoder) -> FrozenText:
        """Of a tower at hand, which is frozen where it is a module."""
        text = cls(text_description(encoder))
        text._encoder = freeze(encoder)
        return text

    @property
    def name(self) -> str:
        """How the tower is called."""
        return str(self.description["name"])

    @property
    def dimension(self) -> int:
        """D, of its embeddings."""
        return int(self.description["dimension"])

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same text would be embedded otherwise."""
        return str(self.description["fingerprint"])

    def encoder(self, device: torch.device) -> TextEncoder:
        """The tower itself; that of a reopened run is loaded, on ``device``, when first asked for.

        Raises:
            CaptuneError: it cannot be found, or has other weights than the run was trained with.
        """
        if self._encoder is not None:
            return self._encoder
        if self.description.get("kind") != "named":
            raise CaptuneError(
                f"the run's text encoder {self.name!r} is its author's own code: hand it in with "
                "--text-encoder package.module:factory, or from_pretrained(text_encoder=...)"
            )
        return self.hold(load_named_text_encoder(self.name, device=device))

    def hold(self, encoder: TextEncoder) -> TextEncoder:
        """Take ``encoder`` as the tower that is described, frozen.

        Raises:
            CaptuneError: it is another one.
        """
        if encoder.fingerprint != self.fingerprint:
            raise CaptuneError(
                f"text encoder {encoder.name} is not the one the run was trained with "
                f"({self.name}): weights, tokenizer, prompt or truncation differ"
            )
        self._encoder = freeze(encoder)
        return self._encoder
