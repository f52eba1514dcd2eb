"""A step gives a card its work and does not wait for it: told by tensors that have no values.

On the meta device nothing is computed, but each operation is seen; whatever would make the host
wait for a card (a value that it reads, a choice of rows by their values, a copy that blocks) is
noted.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from captune.config import Config
from captune.data.augment import colour_factors, jitter_colours
from captune.models import CLIPModel
from captune.training.criteria import make_criterion
from captune.training.loader import Batch
from captune.training.mixing import draw_mix
from captune.training.steps import train_step

META = torch.device("meta")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


class Waits(TorchDispatchMode):
    """The operations that would wait for a card."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        on_card = any(t.device == META for t in tensors)
        chosen = args[1] if "index" in name and len(args) > 1 else ()
        rows = chosen if isinstance(chosen, list | tuple) else ()
        by_value = any(getattr(r, "dtype", None) == torch.bool and r.device == META for r in rows)
        comes = "_to_copy" in name and torch.device(kwargs.get("device") or "cpu") == META
        blocks = comes and not on_card and not kwargs.get("non_blocking")
        if (on_card and any(word in name for word in READS)) or by_value or blocks:
            self.found.append(name)
        return func(*args, **kwargs)


def step(config: Config) -> list[str]:
    """What a step of ``config`` on a card would wait for."""
    torch.manual_seed(0)
    model = CLIPModel.from_config(config).to(META)
    images, own, captions = 6, 12, 40
    owners = torch.arange(captions) % 20
    owners[:own] = torch.arange(own) % images
    batch = Batch(
        torch.zeros(images, 3, 32, 32, dtype=torch.uint8),
        torch.randn(captions, 16),
        torch.arange(images),
        owners,
        own,
    )
    criterion = make_criterion(config, 16)
    if isinstance(criterion, torch.nn.Module):
        criterion.to(META)
    accelerator: Any = SimpleNamespace(
        device=META,
        autocast=contextlib.nullcontext,
        backward=lambda loss: loss.backward(),
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mix = draw_mix(images, config.mixup, seed=0, epoch=0, step=0)
    with Waits() as waits:
        if config.colour_jitter:
            factors = colour_factors(batch.images.numpy(), 0, 0, config.colour_jitter)
            pixels = batch.inputs.to(META, non_blocking=True)
            batch = batch._replace(inputs=jitter_colours(pixels, factors))
        train_step(model, batch, criterion, optimizer, accelerator, config, mix)
    assert all(parameter.grad is None for parameter in model.parameters())  # it came to its end
    return waits.found


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "plain"},
        {},
        {"mix_photos": True, "colour_jitter": 0.4},
        {"text_adapter": True, "soft_targets": 0.2, "hard_negatives": 0.5},
        {"loss": "siglip", "mixup": 0.0},
    ],
    ids=lambda changes: " ".join(changes) or "best",
)
def test_nothing_of_a_step_is_waited_for(
    changes: dict[str, Any],
    tiny_resnet: Path,
    tiny_sentence: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It knows no meta device, and decides nothing but the dtype.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    config = Config.from_mapping(
        {
            "image_encoder": str(tiny_resnet),
            "text_encoder": str(tiny_sentence),
            "hidden_dim": 32,
            **changes,
        }
    )
    assert step(config) == []


def test_what_would_be_waited_for_is_seen() -> None:
    there, mask = torch.zeros(3, device=META), torch.ones(3, dtype=torch.bool, device=META)
    with Waits() as waits:
        torch.zeros(3).to(META)
        with contextlib.suppress(Exception):
            there[mask]
        with contextlib.suppress(Exception):
            float(there.sum())
    assert len(waits.found) >= 3
