"""The temperature of a loss, fixed or learnt."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from captune.config import LEARNT_TEMPERATURES


class Tempered(nn.Module):
    """Logits from cosines by a temperature, fixed or learnt (as the parameter log(1/T)).

    Raises:
        ValueError: a temperature of 0 or below, or a learnt one outside of its limits.
    """

    log_scale: nn.Parameter | None

    def __init__(self, temperature: float, learn_temperature: bool) -> None:
        super().__init__()
        low, high = LEARNT_TEMPERATURES
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        if learn_temperature and not low <= temperature <= high:
            raise ValueError(
                f"a learnt temperature must start between {low} and {high}, found {temperature}"
            )
        self._fixed = temperature
        start = nn.Parameter(torch.tensor(-math.log(temperature))) if learn_temperature else None
        self.register_parameter("log_scale", start)

    @property
    def logit_scale(self) -> Tensor:
        """1/T, a scalar; with a gradient where T is learnt.

        The parameter itself is clipped, as CLIP's is (Radford et al. 2021, section 2.5): a clamp
        on its way to the loss would have no gradient outside, and the way back would be shut.
        """
        if self.log_scale is None:
            return torch.tensor(1 / self._fixed)
        low, high = LEARNT_TEMPERATURES
        with torch.no_grad():
            self.log_scale.clamp_(-math.log(high), -math.log(low))
        return self.log_scale.exp()

    @property
    def temperature(self) -> float:
        """T as it stands; where it is learnt, the device is waited for."""
        return self._fixed if self.log_scale is None else 1 / float(self.logit_scale.detach())

    def logits(self, cosine: Tensor) -> Tensor:
        """``cosine / T``."""
        return cosine / self._fixed if self.log_scale is None else cosine * self.logit_scale
