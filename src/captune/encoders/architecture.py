"""Architecture: which parts stand between the two towers; stated in a run, built from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from captune.encoders.head import (
    AttentionPooling,
    GeneralisedMeanPooling,
    ProjectionHead,
    TextAdapter,
)
from captune.errors import CaptuneError


@dataclass(frozen=True)
class Architecture:
    """The parts that captune adds to a backbone; the keys mean what they mean in a config.

    Raises:
        CaptuneError: two poolings at once.
    """

    use_batch_norm: bool = False
    use_attention_pooling: bool = False
    generalised_pooling: bool = False
    hidden_dim: int = 1024
    dropout: float = 0.0
    feature_dropout: float = 0.0
    standardise_features: bool = False
    text_adapter: bool = False

    def __post_init__(self) -> None:
        if self.use_attention_pooling and self.generalised_pooling:
            raise CaptuneError(
                "use_attention_pooling and generalised_pooling are two ways to pool: choose one"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Architecture:
        """From a config, or from ``image_encoder.json``; keys it lacks have their defaults."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)

    def make_pooling(self, channels: int) -> nn.Module | None:
        """What pools the backbone's map ``(N, C, h, w)`` to ``(N, C)``; None: as it does itself."""
        if self.use_attention_pooling:
            return AttentionPooling(channels)
        return GeneralisedMeanPooling() if self.generalised_pooling else None

    def make_head(self, channels: int, dimension: int) -> ProjectionHead:
        """The projection head, ``(N, C)`` to ``(N, D)``."""
        return ProjectionHead(
            channels,
            dimension,
            hidden_dim=self.hidden_dim,
            use_batch_norm=self.use_batch_norm,
            dropout=self.dropout,
            feature_dropout=self.feature_dropout,
            standardise=self.standardise_features,
        )

    def make_text_adapter(self, dimension: int) -> TextAdapter | None:
        """The linear layer after the frozen text tower, where one is asked for."""
        return TextAdapter(dimension) if self.text_adapter else None
