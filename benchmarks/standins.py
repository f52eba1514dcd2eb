"""Stand-ins for benchmarks that no network, weights or number of photos shall decide.

Towers with random weights or none are named to captune as factories: `image_encoder=standins:small
text_encoder=standins:text`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from captune import open_source
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


def copies(data: str | Path, folder: Path, images: int) -> Path:
    """``images`` training photos with captions, as a COCO folder: those of ``data``, taken again
    from the first on, by symbolic links, until there are enough."""
    table = open_source(data).table("train")
    photos = folder / "train2014"
    photos.mkdir(parents=True)
    listed, captions = [], []
    for number in range(images):
        photo = table.path(number % len(table))
        name = f"{number:012d}{photo.suffix}"
        (photos / name).symlink_to(photo.resolve())
        listed.append({"id": number, "file_name": name})
        for row in table.captions_of(number % len(table)):
            caption = {"id": len(captions), "image_id": number, "caption": table.caption(int(row))}
            captions.append(caption)
    path = folder / "annotations" / "captions_train2014.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"images": listed, "annotations": captions}), encoding="utf-8")
    return folder
