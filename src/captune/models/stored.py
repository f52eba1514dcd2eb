"""A model on disk: what it is, as JSON, and its weights, as safetensors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from captune.encoders.architecture import Architecture
from captune.errors import CaptuneError
from captune.files import read_versioned, replacing, write_json
from captune.preprocess import Preprocess

VERSION = 1


class Stated(NamedTuple):
    """What a folder says of its model.

    Attributes:
        architecture: the parts between the towers.
        encoder: the image tower's own description.
        preprocess: what the image tower expects of its pixels.
        text: the frozen text tower's description; it is named, not copied.
    """

    architecture: Architecture
    encoder: dict[str, Any]
    preprocess: Preprocess
    text: dict[str, Any]


def write_stated(folder: Path, stated: Stated) -> None:
    """Write ``image_encoder.json``, ``preprocess.json`` and ``text_encoder.json``."""
    image = {**stated.architecture.to_dict(), "encoder": stated.encoder}
    write_json(folder / "image_encoder.json", {"format_version": VERSION, **image})
    write_json(folder / "preprocess.json", stated.preprocess.to_dict())
    write_json(folder / "text_encoder.json", {"format_version": VERSION, **stated.text})


def read_stated(folder: Path) -> Stated:
    """What :func:`write_stated` wrote.

    Raises:
        CaptuneError: not such a folder, or of another version.
    """
    image, text, preprocess = (
        read_versioned(folder / f"{name}.json", what="run", version=VERSION)
        for name in ("image_encoder", "text_encoder", "preprocess")
    )
    return Stated(Architecture.of(image), image["encoder"], Preprocess.from_dict(preprocess), text)


def write_weights(path: Path, module: nn.Module) -> None:
    """Write the state of ``module``, atomically."""
    state = {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", "captune": str(VERSION)})


def read_weights(path: Path, module: nn.Module) -> None:
    """Load into ``module`` what :func:`write_weights` wrote; all of it, and nothing else.

    Raises:
        CaptuneError: no such file, or of another architecture.
    """
    if not path.is_file():
        raise CaptuneError(f"no weights at {path}: the run has not finished its first epoch")
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        module.load_state_dict(state)
    except Exception as error:  # safetensors raises its own type, torch a RuntimeError
        lines = str(error).splitlines()
        detail = " ".join(line.strip() for line in lines)[:300]
        raise CaptuneError(f"{path} does not fit the run's architecture: {detail}") from None


def weights_digest(module: nn.Module) -> str:
    """A hash of all parameters and buffers of ``module``."""
    state = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        state.update(key.encode() + flat.numpy().tobytes())
    return state.hexdigest()
