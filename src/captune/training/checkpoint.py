"""The resume state: everything that the next step depends on, in one safetensors file.

Tensors (weights, optimiser moments, random states) are the file's body, numbers its JSON header;
nothing is pickled, and one rename replaces the old state by the new.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from captune.errors import CaptuneError
from captune.files import replacing
from captune.training.progress import EpochProgress, Verdict

VERSION = 4
# 2 knew nothing of what was decided on compiling; until 3 the average was written whole.
READABLE = (2, 3, 4)


@dataclass
class TrainingParts:
    """The live objects whose state makes up a run between two steps."""

    model: nn.Module
    criterion: Any
    optimizer: Optimizer
    scheduler: LRScheduler
    accelerator: Accelerator
    average: nn.Module | None = None


def save_state(path: Path, parts: TrainingParts, progress: EpochProgress) -> None:
    """Write the state to ``path``, atomically."""
    optimizer = parts.optimizer.state_dict()
    tensors = {f"model.{key}": value for key, value in parts.model.state_dict().items()}
    if isinstance(parts.criterion, nn.Module):
        tensors |= {f"criterion.{k}": v for k, v in parts.criterion.state_dict().items()}
    if parts.average is not None:
        tensors |= _beside(parts.average, parts.model)
    for index, slots in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(v) for name, v in slots.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for card, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random.cuda.{card}"] = state
    scaler = parts.accelerator.scaler
    header = {
        "format_version": VERSION,
        "progress": asdict(progress),
        "groups": optimizer["param_groups"],
        "schedule": _schedule_state(parts.scheduler),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    # Copied once, for some may share memory, which the format knows nothing of.
    dense: dict[str, Any] = {"memory_format": torch.contiguous_format, "copy": True}
    body = {key: value.detach().to("cpu", **dense) for key, value in tensors.items()}
    with replacing(path) as temporary:
        save_file(body, temporary, metadata={"state": json.dumps(header)})


def _beside(average: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The average where it differs from the model: weights that do not train are written once.

    A zero may come back with the model's sign.
    """
    weights = model.state_dict()
    found = average.state_dict().items()
    return {f"average.{k}": v for k, v in found if not torch.equal(v, weights[k])}


def load_state(path: Path, parts: TrainingParts) -> EpochProgress:
    """Put ``parts`` back to where :func:`save_state` found them.

    Raises:
        CaptuneError: no state there, unreadable, of another version, or of another architecture.
    """
    header, tensors = _read(path)
    try:
        parts.model.load_state_dict(_below("model.", tensors))
        if isinstance(parts.criterion, nn.Module):
            parts.criterion.load_state_dict(_below("criterion.", tensors))
        if parts.average is not None:
            own = _below("average.", tensors)
            parts.average.load_state_dict({**_below("model.", tensors), **own})
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise CaptuneError(f"{path} is of another architecture: {detail}") from None
    _load_optimizer(parts.optimizer, _below("optimizer.", tensors), header["groups"])
    parts.scheduler.load_state_dict(header["schedule"])
    if header["scaler"] is not None and parts.accelerator.scaler is not None:
        parts.accelerator.scaler.load_state_dict(header["scaler"])
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available():
        cards = _below("random.cuda.", tensors)
        for card in sorted(cards, key=int)[: torch.cuda.device_count()]:
            torch.cuda.set_rng_state(cards[card], int(card))
    return _progress(header)


def _load_optimizer(
    optimizer: Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Moments as the file has them, in the memory layout of their parameters.

    A fused optimiser walks parameter and moments by address: one of them channels first and the
    other channels last would be paired wrongly, without a word.
    """
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        slots.setdefault(int(index), {})[name] = value
    for place, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        for name, value in slots.get(place, {}).items():
            if value.shape == parameter.shape:
                slots[place][name] = torch.empty_like(parameter).copy_(value)
    here = [group["fused"] for group in optimizer.param_groups]  # as this device can
    groups = [{**group, "fused": fused} for group, fused in zip(groups, here, strict=True)]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})


def read_progress(path: Path) -> EpochProgress:
    """Where the run stood: what is trained in that epoch must be known before it is loaded.

    Raises:
        CaptuneError: as :func:`load_state`.
    """
    header, _ = _read(path, tensors=False)
    return _progress(header)


def _progress(header: dict[str, Any]) -> EpochProgress:
    """Of the header; JSON knows no tuples with names."""
    progress = EpochProgress(**header["progress"])
    if progress.compiling is not None:
        progress.compiling = Verdict(*progress.compiling)
    return progress


def _read(path: Path, *, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header of a state, and its tensors."""
    if not path.is_file():
        raise CaptuneError(f"nothing to resume at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["state"])
            names = file.keys() if tensors else ()
            found = {key: file.get_tensor(key) for key in names}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CaptuneError(f"{path} cannot be read as a resume state: {error}") from None
    if header.get("format_version") not in READABLE:
        stated = header.get("format_version")
        raise CaptuneError(f"{path} has format_version {stated!r}, this captune reads {VERSION}")
    return header, found


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _schedule_state(scheduler: LRScheduler) -> dict[str, Any]:
    """Its numbers; the lambdas follow from the config."""
    plain = (int, float, list, bool, type(None))
    state = {k: v for k, v in scheduler.state_dict().items() if isinstance(v, plain)}
    return {**state, "lr_lambdas": [None] * len(scheduler.base_lrs)}
