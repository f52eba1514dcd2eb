"""Trainable image towers: backbones of transformers, CLIP's own, and the way from a name to one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captune.encoders.contract import Features as Features
from captune.encoders.contract import ImageEncoder as ImageEncoder
from captune.encoders.hub import (
    call_factory,
    is_factory,
    locate,
    quietly,
    read_checkpoint_config,
)
from captune.encoders.lite import VARIANTS, EfficientNetLite
from captune.encoders.text import is_clip
from captune.errors import CaptuneError
from captune.preprocess import Preprocess


class TransformersImageEncoder(nn.Module):
    """Any image backbone of ``transformers``: a CNN's map, or a ViT's patch tokens as one.

    A CNN is pooled as the model does it (an average); of a ViT the class token is taken, or the
    mean of its tokens where it has none.

    Args:
        model: a backbone, weights loaded or not.
        name, revision: where it is from.
        preprocess: its input.
    """

    def __init__(
        self, model: nn.Module, *, name: str, revision: str = "", preprocess: Preprocess
    ) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.revision = revision
        self.preprocess = preprocess
        self.feature_dim = _probe(self, model, preprocess, name)

    def forward(self, pixels: Tensor) -> Features:
        output = self.model(pixel_values=pixels)
        hidden = output.last_hidden_state
        if hidden.dim() == 4:  # (N, C, h, w)
            pooled = getattr(output, "pooler_output", None)
            return Features(hidden.mean((2, 3)) if pooled is None else pooled.flatten(1), hidden)
        grid, prefix = _patch_grid(hidden, pixels, self.model.config)
        patches = hidden[:, prefix:].transpose(1, 2).unflatten(2, grid)  # (N, C, h, w)
        return Features(hidden[:, 0] if prefix else hidden.mean(1), patches)

    def description(self) -> dict[str, Any]:
        return {
            "kind": "transformers",
            "name": self.name,
            "revision": self.revision,
            "config": self.model.config.to_dict(),  # type: ignore[union-attr,operator]
        }


class ClipImageEncoder(nn.Module):
    """CLIP's own image tower; its projection serves as the head, so training starts at CLIP."""

    def __init__(
        self, model: nn.Module, *, name: str, revision: str = "", preprocess: Preprocess
    ) -> None:
        super().__init__()
        # The projection is taken off: CLIPModel holds it as its head.
        self.projection: list[nn.Module] = [model.visual_projection]  # type: ignore[list-item]
        model.visual_projection = nn.Identity()
        self.model = model
        self.name = name
        self.revision = revision
        self.preprocess = preprocess
        self.feature_dim = _probe(self, model, preprocess, name)

    def forward(self, pixels: Tensor) -> Features:
        output = self.model(pixel_values=pixels)
        hidden = output.last_hidden_state  # (N, 1 + h*w, C)
        grid, prefix = _patch_grid(hidden, pixels, self.model.config)
        patches = hidden[:, prefix:].transpose(1, 2).unflatten(2, grid)
        return Features(output.image_embeds, patches)  # the class token after its layer norm

    def description(self) -> dict[str, Any]:
        config = self.model.config.to_dict()  # type: ignore[union-attr,operator]
        return {
            "kind": "clip",
            "name": self.name,
            "revision": self.revision,
            "config": config,
        }


def load_image_encoder(
    name: str, *, preprocess: Preprocess | None = None, image_size: int = 0
) -> ImageEncoder:
    """The image tower called ``name``, with its pretrained weights.

    Args:
        name: ``efficientnet-lite0``, ``-lite1`` or ``-lite2``, a folder, a hub name or
            ``package.module:factory``.
        preprocess: in place of the checkpoint's own.
        image_size: in place of the preprocessing's, where above 0.

    Raises:
        CaptuneError: it cannot be found, reached or loaded.
    """
    if is_factory(name):
        encoder = call_factory(name)
        if not (isinstance(encoder, nn.Module) and isinstance(encoder, ImageEncoder)):
            raise CaptuneError(
                f"{name} made a {type(encoder).__name__}; an image encoder is a torch Module with "
                "name, feature_dim, preprocess and description()"
            )
        return encoder
    if name in VARIANTS:
        own = _resized(preprocess or VARIANTS[name].preprocess, image_size)
        return EfficientNetLite(name, pretrained=True, preprocess=own)
    folder, revision = locate(name, what="image encoder")
    config = read_checkpoint_config(folder)
    preprocess = _resized(preprocess or _checkpoint_preprocess(folder, config), image_size)
    clip = is_clip(folder)
    try:
        if clip:
            from transformers import CLIPVisionModelWithProjection

            with quietly():
                model = CLIPVisionModelWithProjection.from_pretrained(folder)
        else:
            from transformers import AutoModel

            with quietly():
                model = AutoModel.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CaptuneError(f"image encoder {name} cannot be loaded: {first}") from None
    kind = ClipImageEncoder if clip else TransformersImageEncoder
    return kind(model, name=name, revision=revision, preprocess=preprocess)


def image_encoder_from_description(
    description: dict[str, Any], preprocess: Preprocess
) -> ImageEncoder:
    """The architecture of a run's image tower, weights not loaded; needs no network.

    Raises:
        CaptuneError: a kind that is not ours: the user must hand in the object.
    """
    kind = description.get("kind")
    if kind in VARIANTS:
        return EfficientNetLite(kind, pretrained=False, preprocess=preprocess)
    name, revision = str(description.get("name")), str(description.get("revision", ""))
    if kind not in ("clip", "transformers"):
        raise CaptuneError(
            f"the run's image encoder {name!r} is its author's own code: hand it in with "
            "--image-encoder package.module:factory, or from_pretrained(..., image_encoder=...)"
        )
    from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

    values = dict(description["config"])
    values.pop("auto_map", None)  # would point at a repository's code
    config: Any = AutoConfig.for_model(values.pop("model_type"), **values)
    if kind == "clip":
        model = CLIPVisionModelWithProjection(config)
        return ClipImageEncoder(model, name=name, revision=revision, preprocess=preprocess)
    model = AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    return TransformersImageEncoder(model, name=name, revision=revision, preprocess=preprocess)


def _resized(preprocess: Preprocess, image_size: int) -> Preprocess:
    size = image_size or preprocess.image_size
    return Preprocess(size, preprocess.mean, preprocess.std)


def _checkpoint_preprocess(folder: Path, config: dict[str, Any]) -> Preprocess:
    """From ``preprocessor_config.json`` and the architecture; CLIP's values where it is silent."""
    path = folder / "preprocessor_config.json"
    stated: dict[str, Any] = {}
    if path.is_file():
        from captune.files import read_json

        stated = read_json(path, what="preprocessor config")
    default = Preprocess()
    vision = config.get("vision_config") or config
    size = vision.get("image_size")
    if not isinstance(size, int):
        wanted = stated.get("crop_size", stated.get("size", default.image_size))
        if isinstance(wanted, dict):
            wanted = wanted.get("height", wanted.get("shortest_edge", default.image_size))
        size = int(wanted)
    return Preprocess(
        size,
        tuple(stated.get("image_mean", default.mean)),
        tuple(stated.get("image_std", default.std)),
    )


def _patch_grid(hidden: Tensor, pixels: Tensor, config: Any) -> tuple[tuple[int, int], int]:
    """Rows and columns of patch tokens, and how many tokens come before them."""
    tokens = hidden.shape[1]
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and pixels.shape[-1] // patch * (pixels.shape[-2] // patch) <= tokens:
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        if tokens - grid[0] * grid[1] < grid[0] * grid[1]:
            return grid, tokens - grid[0] * grid[1]
    side = int(tokens**0.5)  # hierarchical ViTs: a square of merged patches, no class token
    return (side, side), tokens - side * side


@torch.no_grad()
def _probe(encoder: nn.Module, model: nn.Module, preprocess: Preprocess, name: str) -> int:
    """C, from one black image; a ViT's unused pooling layer is taken off on the way."""
    was_training = encoder.training
    encoder.eval()
    size = preprocess.image_size
    try:
        output = model(pixel_values=torch.zeros(1, 3, size, size))
        hidden = output.last_hidden_state
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CaptuneError(
            f"image encoder {name} does not take {size}x{size} images: {first}"
        ) from None
    encoder.train(was_training)
    if hidden.dim() == 4:
        return int(hidden.shape[1])
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]
    return int(hidden.shape[2])
