"""A step gives a card its work and does not wait for it: told by tensors that have no values.

On the meta device nothing is computed, but each operation is seen; whatever would make the host
wait for a card (a value that it reads, a choice of rows by their values, a copy that blocks) is
noted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captune.config import Config
from captune.data.augment import colour_factors, jitter_colours
from captune.models import CLIPModel
from captune.training.criteria import make_criterion
from captune.training.loader import Batch
from captune.training.mixing import draw_mix
from captune.training.steps import train_step

META = torch.device("meta")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")


class Made(TorchFunctionMode):
    """Notes tensors that are made of Python's values on the card: a copy that blocks, and that no
    dispatch mode sees."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        there = torch.device(kwargs.get("device") or "cpu") == META
        if func in (torch.tensor, torch.as_tensor) and there:
            self.found.append(func.__name__)
        if func is torch.Tensor.new_tensor and args[0].device == META:
            self.found.append("new_tensor")
        return func(*args, **kwargs)


class Waits(TorchDispatchMode):
    """The operations that would wait for a card."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._made = Made(self.found)

    def __enter__(self) -> Waits:
        self._made.__enter__()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.").partition(".")[0]
        given = [a for a in tree_leaves(args) if isinstance(a, torch.Tensor)]
        on_card = any(t.device == META for t in given)
        from_host = any(t.device != META and t.dim() for t in given)
        rows = tree_leaves(args[1]) if name.startswith(("index", "_index")) else []
        by_value = any(getattr(r, "dtype", None) == torch.bool and r.device == META for r in rows)
        comes = name == "_to_copy" and torch.device(kwargs.get("device") or "cpu") == META
        blocks = comes and not on_card and not kwargs.get("non_blocking")
        copied = on_card and from_host and name.startswith(("copy", "index", "_index"))
        if (on_card and name in READS) or by_value or blocks or copied:
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


CARD = torch.zeros(3, device=META)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda: torch.zeros(3).to(META), "_to_copy"),
        (lambda: torch.tensor([1.0, 2.0], device=META), "tensor"),
        (lambda: torch.as_tensor([1.0, 2.0], device=META), "as_tensor"),
        (lambda: CARD.new_tensor([1.0]), "new_tensor"),
        (lambda: CARD.clone().copy_(torch.zeros(3)), "copy_"),
        (lambda: CARD[torch.tensor([0, 1])], "index"),
        (lambda: CARD[CARD > 0], "index"),
        (lambda: CARD.nonzero(), "nonzero"),
        (lambda: float(CARD.sum()), "_local_scalar_dense"),
    ],
)
def test_what_would_be_waited_for_is_seen(act: Callable[[], object], name: str) -> None:
    with Waits() as waits, contextlib.suppress(Exception):  # some cannot be done without values
        act()
    assert name in waits.found


def test_what_is_sent_or_made_there_is_not_waited_for() -> None:
    with Waits() as waits:
        torch.zeros(3).to(META, non_blocking=True) + CARD.new_zeros(3) + torch.ones(3, device=META)
    assert waits.found == []
