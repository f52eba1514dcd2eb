"""Towers with random weights or none, for benchmarks that no network or weights shall decide.

They are named to captune as factories: `image_encoder=standins:small text_encoder=standins:text`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from captune.encoders.image import TransformersImageEncoder
from captune.preprocess import Preprocess


class RandomText:
    """512 dimensions drawn by a generator that the first text of a batch seeds."""

    name, dimension, fingerprint = "random", 512, "random v1"

    def encode(self, texts: Sequence[str]) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(texts[0].encode()))
        return F.normalize(torch.randn(len(texts), 512, generator=generator), dim=-1)


def text() -> RandomText:
    """A text tower that costs nothing."""
    return RandomText()


def resnet50() -> TransformersImageEncoder:
    """ResNet-50 at 224 pixels."""
    return TransformersImageEncoder(
        ResNetModel(ResNetConfig()), name="resnet-50", preprocess=Preprocess()
    )


def small() -> TransformersImageEncoder:
    """A ResNet of three blocks at 32 pixels, which a CPU passes in no time."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 1, 1], layer_type="basic"
    )
    return TransformersImageEncoder(
        ResNetModel(config), name="small", preprocess=Preprocess(image_size=32)
    )
