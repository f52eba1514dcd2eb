"""How long a run goes on, its learning rate (linear warm-up, then a cosine to zero), its crops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from captune.config import Config


def warmup_within(warmup_steps: int, total_steps: int) -> int:
    """``warmup_steps``, but never more than a tenth of all steps."""
    return min(warmup_steps, total_steps // 10)


def rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """The share of the peak rate at ``step`` (0-based): Loshchilov and Hutter 2017, one cycle."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def warmup_cosine(optimizer: Optimizer, *, warmup_steps: int, total_steps: int) -> LambdaLR:
    """A scheduler to step once after every optimiser step."""
    warmup = warmup_within(warmup_steps, total_steps)
    return LambdaLR(optimizer, lambda step: rate_factor(step, warmup, total_steps))


def finished(config: Config, history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether nothing is left to train: all epochs are done, or stage 2 has stopped improving."""
    whole = history[config.head_epochs :]
    if config.freeze_backbone or not config.patience or not whole:
        return len(history) >= planned_epochs(config)
    best = max(range(len(whole)), key=lambda row: float(whole[row]["rsum"]))
    return len(history) >= planned_epochs(config) or len(whole) - 1 - best >= config.patience


def planned_epochs(config: Config) -> int:
    """Epochs of both stages together."""
    return config.head_epochs + (0 if config.freeze_backbone else config.num_epochs)


def training_side(epoch: int, epochs: int, full: int) -> int:
    """The side of the crops in ``epoch`` (from 0) of ``epochs``, in progressive resizing.

    Tan and Le 2021 (EfficientNetV2): small pictures first, which cost less and regularise. From
    half of ``full`` the side grows linearly to it, has it in the middle of the epochs and keeps it.

    Returns:
        ``full``, or on the way there a multiple of 16 that is at least 32.
    """
    growing = epochs // 2
    if epoch >= growing:
        return full
    return min(full, multiple_of_16(full / 2 * (1 + max(0, epoch) / growing)))


def multiple_of_16(side: float) -> int:
    """The nearest one, and at least 32."""
    return max(32, 16 * int(side / 16 + 0.5))  # round() would take 2.5 to 2
