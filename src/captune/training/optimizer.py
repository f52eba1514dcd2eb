"""The optimiser of a stage: AdamW, fused where that is safe."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from captune.config import Config
from captune.losses import Criterion
from captune.models import CLIPModel
from captune.training.stages import Stage


def make_optimizer(
    stage: Stage, model: CLIPModel, criterion: Criterion, accelerator: Accelerator, config: Config
) -> Any:
    """AdamW over the stage's parameter groups, prepared by ``accelerator``."""
    # One pass over the parameters in place of a dozen. Not where gradients are scaled: a fused
    # step that meets an infinite one leaves it out unseen, and the schedule would go on.
    fused = accelerator.device.type in ("cpu", "cuda") and accelerator.scaler is None
    optimizer = torch.optim.AdamW(
        stage.groups(model, criterion),
        lr=stage.learning_rate,
        weight_decay=config.weight_decay,
        fused=fused,
    )
    return accelerator.prepare_optimizer(optimizer, device_placement=False)
