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


def read_templates(path: Path) -> list[str]:
    """Prompt templates, one a line, ``{}`` for the label; empty lines and those that begin with
    ``#`` are left out.

    Raises:
        CaptuneError: no such file, no UTF-8, no template in it, or one without ``{}``.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise CaptuneError(f"no prompt templates at {path}") from None
    except ValueError as error:
        raise CaptuneError(f"prompt templates {path} are not UTF-8 text: {error}") from None
    found = [line for line in lines if line and not line.startswith("#")]
    bare = [line for line in found if "{}" not in line]
    if bare or not found:
        what = f"{bare[0]!r} has no {{}} for the label" if bare else "there is no template in it"
        raise CaptuneError(f"prompt templates {path}: {what}")
    return found
