"""Zero-shot classification: labels become sentences, and the nearest sentence names the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from captune.errors import CaptuneError
from captune.models import CLIPModel

# A few plain sentences; each label's embedding is the mean over them.
TEMPLATES = ("a photo of {}.", "a picture of {}.", "{}", "there is {} here.")


@dataclass(frozen=True)
class Prediction:
    """The likeliest label of an image, and the probability (0 to 1) of every label."""

    image: str
    label: str
    probabilities: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def label_embeddings(
    model: CLIPModel, labels: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """``(L, D)`` unit length: the mean over prompt templates (Radford et al. 2021, section 3.1.4).

    Raises:
        CaptuneError: fewer than two distinct labels, or a template without ``{}``.
    """
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise CaptuneError(
            f"at least two different labels are needed to tell apart, found {list(labels)}"
        )
    for template in templates:
        if "{}" not in template:
            raise CaptuneError(f"prompt template {template!r} has no {{}} for the label")
    prompts = [template.replace("{}", label) for label in labels for template in templates]
    embedded = model.encode_text(prompts).view(len(labels), len(templates), -1)
    return F.normalize(embedded.mean(dim=1), dim=-1)


@torch.no_grad()
def classify(
    model: CLIPModel,
    images: Sequence[str | Path],
    labels: Sequence[str],
    *,
    templates: Sequence[str] = TEMPLATES,
) -> list[Prediction]:
    """Label each image; probabilities are a softmax at the model's own logit scale.

    Raises:
        CaptuneError: too few labels.
        UnreadableImageError: a path that is no readable image.
    """
    classes = label_embeddings(model, labels, templates)  # (L, D)
    vectors = model.encode_image([Path(image) for image in images])  # (n, D)
    probabilities = torch.softmax(model.logit_scale * vectors @ classes.T, dim=-1).cpu()
    return [
        Prediction(
            str(image), labels[int(row.argmax())], dict(zip(labels, row.tolist(), strict=True))
        )
        for image, row in zip(images, probabilities, strict=True)
    ]
