"""Mixup: each image of a step blended with another one of it (Zhang et al. 2018).

What is blended is as a rule what the head is given, pooled features (manifold mixup, Verma et al.
2019): in stage 1 nothing else is at hand, and in stage 2 the backbone sees whole photos. Photos
themselves can be blended instead.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from captune.config import Config
from captune.device import send
from captune.models import CLIPModel
from captune.training.loader import Batch

MIX_STREAM = 4  # sets its generator apart from those of captions, crops and colours


class Mix(NamedTuple):
    """Image ``i`` becomes ``weight[i]`` of itself and the rest of image ``partner[i]``.

    ``partner`` is ``(B,) int64``; ``weight (B,)`` fp32 lies in 0.5..1: each stays mostly itself.
    ``photos``: the pixels are blended, where there are any, in place of the features.
    """

    partner: Tensor
    weight: Tensor
    photos: bool = False

    def to(self, device: torch.device) -> Mix:
        """The same on ``device``, which is not waited for."""
        return self._replace(partner=send(self.partner, device), weight=send(self.weight, device))

    def blend(self, inputs: Tensor, rows: slice = slice(None)) -> Tensor:
        """``(B, ...)`` floats, or uint8 pixels, which become floats in 0..1; ``rows`` of the result
        alone, whose partners may be any."""
        here = self.to(inputs.device)
        weight = here.weight[rows].view(-1, *[1] * (inputs.dim() - 1))
        partners = inputs[here.partner[rows]]
        return _floats(inputs[rows]) * weight + _floats(partners) * (1 - weight)

    def embed(self, model: CLIPModel, batch: Batch) -> Tensor:
        """The mixed images' embeddings ``(B, D)``, unit length."""
        inputs = send(batch.inputs, model.device)
        if inputs.dim() == 2:
            return model.project_image(self.blend(inputs))
        if self.photos:
            return model(self.blend(inputs))  # type: ignore[no-any-return]
        return model.project_image(self.blend(model.pooled_features(inputs)))


def _floats(inputs: Tensor) -> Tensor:
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs


def draw_mix(images: int, alpha: float, *, seed: int, epoch: int, step: int) -> Mix | None:
    """The mix of a step, each weight from Beta(``alpha``, ``alpha``); None where that is 0."""
    if alpha == 0:
        return None
    rng = np.random.default_rng([seed, epoch, step, MIX_STREAM])
    weight = torch.from_numpy(rng.beta(alpha, alpha, images)).float()
    return Mix(torch.from_numpy(rng.permutation(images)), torch.maximum(weight, 1 - weight))


def step_mix(batch: Batch, config: Config, epoch: int, step: int) -> Mix | None:
    """What the step's images are mixed with: kept features as much as ``head_mixup`` says."""
    alpha = config.head_mixup if batch.inputs.dim() == 2 else config.mixup
    mix = draw_mix(len(batch.images), alpha, seed=config.seed, epoch=epoch, step=step)
    return mix and mix._replace(photos=config.mix_photos)
