"""A moving average of the weights: steadier than the last step's, and what a run keeps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from captune.models import CLIPModel


class MovingAverage:
    """A shadow of a model whose weights are the exponential moving average of the model's.

    Polyak and Juditsky 1992; the decay is warmed up as ``min(decay, (1 + n) / (10 + n))`` after
    ``n`` steps, so that the random first weights are soon forgotten.

    Args:
        model: on its device; the frozen text tower is shared, not copied.
        decay: of the average; 0.999 remembers about a thousand steps.
    """

    def __init__(self, model: CLIPModel, *, decay: float) -> None:
        self.decay = decay
        self._followed: set[int] | None = None
        self.model = copy.deepcopy(model, {id(model._text): model._text})
        self.model.requires_grad_(False)

    def follow(self, optimizer: Optimizer) -> None:
        """Pass over all that ``optimizer`` does not train, from here on: its average is what it is.

        Stage 1 has a whole backbone that no step touches, though its weights ask for gradients.
        """
        self._followed = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def _is_followed(self, parameter: Tensor) -> bool:
        if not parameter.requires_grad:
            return False
        return self._followed is None or id(parameter) in self._followed

    @torch.no_grad()
    def update(self, model: CLIPModel, step: int) -> None:
        """Take in ``model`` after its step number ``step`` (from 0)."""
        average: Any = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))  # type: ignore[no-untyped-call]
        both = zip(self.model.parameters(), model.parameters(), strict=True)
        trained = [pair for pair in both if self._is_followed(pair[1])]
        if trained:
            average(*map(list, zip(*trained, strict=True)), step)
        for part, module in zip(self.model.modules(), model.modules(), strict=True):
            if module.training:
                buffers = zip(part.buffers(False), module.buffers(False), strict=True)
                for kept, found in buffers:
                    kept.copy_(found)  # statistics of BatchNorm are averages already
