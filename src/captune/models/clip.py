"""CLIPModel: a trainable image tower with its head, beside a frozen text tower."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captune.config import DEFAULT_CONFIG, Config, flag_suffix
from captune.data.pixels import Images, image_batches
from captune.device import autocast, choose_precision
from captune.encoders.architecture import Architecture
from captune.encoders.head import ProjectionHead
from captune.encoders.image import (
    ClipImageEncoder,
    ImageEncoder,
    image_encoder_from_description,
    load_image_encoder,
)
from captune.encoders.text import TextEncoder, load_text_encoder
from captune.errors import CaptuneError
from captune.models.frozen_text import FrozenText
from captune.models.stored import (
    Stated,
    read_stated,
    read_weights,
    weights_digest,
    write_stated,
    write_weights,
)
from captune.preprocess import Preprocess


class CLIPModel(nn.Module):
    """An image tower and a projection head that map images into the space of a text tower.

    The text tower is frozen and is not part of the module: it appears in no ``parameters()``, no
    ``state_dict()`` and no checkpoint. A text adapter, where there is one, is.

    Args:
        text_encoder: the frozen tower, or its name.
        image_encoder: the trainable tower, or its name; default ResNet-50 with ImageNet weights
            and CLIP's normalisation.
        temperature: the loss's; its inverse scales zero-shot logits and is saved along.
        parts: the fields of :class:`captune.encoders.architecture.Architecture`:
            ``use_batch_norm``, ``use_attention_pooling``, ``generalised_pooling``,
            ``hidden_dim``, ``dropout``, ``standardise_features``, ``text_adapter``.

    Raises:
        CaptuneError: a tower cannot be loaded, or a part does not fit it.
        TypeError: a part of another name.
    """

    def __init__(
        self,
        text_encoder: TextEncoder | str | None = None,
        *,
        image_encoder: ImageEncoder | str | None = None,
        temperature: float = 0.07,
        **parts: Any,
    ) -> None:
        super().__init__()
        architecture = Architecture(**parts)
        if text_encoder is None:
            text_encoder = DEFAULT_CONFIG.text_encoder_name
        if isinstance(text_encoder, str):
            text_encoder = load_text_encoder(text_encoder)
        if image_encoder is None:
            name = DEFAULT_CONFIG.image_encoder_name
            image_encoder = load_image_encoder(name, preprocess=Preprocess())
        elif isinstance(image_encoder, str):
            image_encoder = load_image_encoder(image_encoder)
        self._text = FrozenText.of(text_encoder)
        self._assemble(image_encoder, architecture)
        self.logit_scale.fill_(1 / temperature)

    def _assemble(self, image_encoder: ImageEncoder, architecture: Architecture) -> None:
        """Register the trainable parts."""
        out_dim = self._text.dimension
        channels = image_encoder.feature_dim
        self.image_encoder = cast(nn.Module, image_encoder)
        self.preprocess = image_encoder.preprocess
        self.architecture = architecture
        self.pooling = architecture.make_pooling(channels)
        if isinstance(image_encoder, ClipImageEncoder):
            self.head = image_encoder.projection[0]
            if architecture.use_batch_norm:
                raise CaptuneError(
                    "use_batch_norm belongs to the projection head; CLIP's own image tower has "
                    "CLIP's projection in its place: choose other --towers"
                )
        else:
            self.head = architecture.make_head(channels, out_dim)
        self.text_adapter = architecture.make_text_adapter(out_dim)
        if self._embedding_dim() != out_dim:
            raise CaptuneError(
                f"image tower {image_encoder.name} embeds into {self._embedding_dim()} dimensions, "
                f"text tower {self._text.name} into {out_dim}: choose towers that match"
            )
        scale = torch.tensor(1.0)
        self.register_buffer("logit_scale", scale)
        self.logit_scale: Tensor
        mean = torch.tensor(self.preprocess.mean).view(1, 3, 1, 1)
        std = torch.tensor(self.preprocess.std).view(1, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.mean: Tensor
        self.std: Tensor
        cast(Any, self).to(memory_format=torch.channels_last)

    def _embedding_dim(self) -> int:
        last = self.head.output if isinstance(self.head, ProjectionHead) else self.head
        return int(cast(nn.Linear, last).out_features)

    # -- forward ----------------------------------------------------------------------------
    def forward(self, pixels: Tensor) -> Tensor:
        """``(N, 3, S, S)`` uint8, or float in 0..1, RGB; to ``(N, D)`` fp32 of unit length."""
        return self.project_image(self.pooled_features(pixels))

    def pooled_features(self, pixels: Tensor) -> Tensor:
        """What the head is given, ``(N, C)``: normalised pixels through backbone and pooling."""
        x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features = self.image_encoder(x)
        return features.pooled if self.pooling is None else self.pooling(features.map)  # type: ignore[no-any-return]

    def backbone_fingerprint(self) -> str:
        """A hash of what :meth:`pooled_features` depends on: architecture, weights, pooling."""
        encoder = cast(ImageEncoder, self.image_encoder)
        stated = json.dumps(encoder.description(), sort_keys=True, default=str)
        parts = [stated, weights_digest(self.image_encoder), type(self.pooling).__name__]
        if self.pooling is not None:
            parts.append(weights_digest(self.pooling))
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()

    def project_image(self, pooled: Tensor) -> Tensor:
        """The backbone's pooled features ``(N, C)`` to embeddings ``(N, D)`` of unit length."""
        return F.normalize(self.head(pooled).float(), dim=-1)

    def project_text(self, text: Tensor) -> Tensor:
        """The text tower's embeddings ``(N, D)`` as images are compared with them: the text
        adapter's output where there is one, else the very same tensor."""
        return text if self.text_adapter is None else self.text_adapter(text)

    def set_feature_statistics(self, mean: Tensor, deviation: Tensor) -> None:
        """What the head takes off and divides by, ``(C,)`` each: of the training images' features.

        CLIP's own projection has nothing of the kind, and keeps as it is.
        """
        if isinstance(self.head, ProjectionHead):
            self.head.set_statistics(mean.to(self.device), deviation.to(self.device))

    # -- public encoders --------------------------------------------------------------------
    @property
    def backbone_name(self) -> str:
        """How the image tower is called."""
        return cast(ImageEncoder, self.image_encoder).name

    @property
    def feature_dim(self) -> int:
        """C, of the backbone's features."""
        return cast(ImageEncoder, self.image_encoder).feature_dim

    @property
    def dimension(self) -> int:
        """D, of the space that both towers share."""
        return self._text.dimension

    @property
    def device(self) -> torch.device:
        """Where the image tower is."""
        return self.logit_scale.device

    @property
    def suffix(self) -> str:
        """The flags' mark on every output."""
        parts = self.architecture
        return flag_suffix(parts.use_batch_norm, parts.use_attention_pooling)

    @property
    def text_fingerprint(self) -> str:
        """The frozen text tower's; known without loading it."""
        return self._text.fingerprint

    @property
    def text_encoder(self) -> TextEncoder:
        """The frozen text tower; that of a reopened run is loaded when first asked for.

        Raises:
            CaptuneError: it cannot be found, or has other weights than the run was trained with.
        """
        return self._text.encoder(self.device)

    @torch.no_grad()
    def encode_image(
        self,
        images: Images,
        *,
        batch_size: int = 64,
        precision: str = "auto",
    ) -> Tensor:
        """Embed images: paths, PIL images, or a tensor ``(N, 3, H, W)`` uint8 or float in 0..1.

        Returns:
            ``(N, D)`` fp32 of unit length, on the model's device. One image gives ``(1, D)``.

        Raises:
            UnreadableImageError: a path that is no readable image.
            CaptuneError: a tensor of another form.
        """
        was_training = self.training
        self.eval()
        precision = choose_precision(precision, self.device)
        try:
            with autocast(self.device, precision):
                parts = [
                    self(batch.to(self.device))
                    for batch in image_batches(images, self.preprocess.image_size, batch_size)
                ]
        finally:
            self.train(was_training)
        return torch.cat(parts) if parts else torch.empty(0, self._embedding_dim())

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Embed texts with the frozen tower, and the adapter where there is one.

        Returns:
            ``(N, D)`` fp32 of unit length, on the model's device. One string gives ``(1, D)``.
        """
        several = [texts] if isinstance(texts, str) else list(texts)
        parts = [
            self.text_encoder.encode(several[start : start + batch_size])
            for start in range(0, len(several), batch_size)
        ]
        joined = torch.cat(parts) if parts else torch.empty(0, self._embedding_dim())
        return self.project_text(joined.to(self.device))

    # -- on disk ----------------------------------------------------------------------------
    @property
    def weights_name(self) -> str:
        """``best_model{suffix}.safetensors``."""
        return f"best_model{self.suffix}.safetensors"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, architecture and preprocessing; the text tower is named, not copied."""
        path = Path(folder)
        encoder = cast(ImageEncoder, self.image_encoder).description()
        stated = Stated(self.architecture, encoder, self.preprocess, self._text.description)
        write_stated(path, stated)
        self.save_weights(path / self.weights_name)

    def save_weights(self, path: Path) -> None:
        """Write the weights alone, atomically; :meth:`load_weights` reads them."""
        write_weights(path, self)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        image_encoder: ImageEncoder | None = None,
        text_encoder: TextEncoder | None = None,
        weights: Path | None = None,
    ) -> CLIPModel:
        """The model that :meth:`save_pretrained` wrote; opens offline. In eval mode, on the CPU.

        Args:
            folder: a run, or any folder that ``save_pretrained`` wrote.
            image_encoder, text_encoder: needed where the model was made with own towers.
            weights: a file of other weights than the best, such as an epoch's.

        Raises:
            CaptuneError: not such a folder, of another version, or weights that do not fit.
        """
        path = Path(folder)
        stated = read_stated(path)
        tower = image_encoder or image_encoder_from_description(stated.encoder, stated.preprocess)
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._text = FrozenText(stated.text)
        model._assemble(tower, stated.architecture)
        if text_encoder is not None:
            model._text.hold(text_encoder)
        model.load_weights(weights or path / model.weights_name)
        return model.eval()

    def load_weights(self, path: Path) -> None:
        """The weights in a file that :meth:`save_pretrained` wrote.

        Raises:
            CaptuneError: no such file, or of another architecture.
        """
        read_weights(path, self)

    @classmethod
    def from_config(cls, config: Config, *, device: torch.device | str = "cpu") -> CLIPModel:
        """Both towers, pretrained, as ``config`` names them, with its flags; on ``device``.

        The head's first weights are decided by ``config.seed`` alone.
        """
        image = load_image_encoder(
            config.image_encoder_name,
            preprocess=Preprocess() if config.clip_normalisation else None,
            image_size=config.image_size,
        )
        text = load_text_encoder(config.text_encoder_name, device=device)
        # It is made on the host; the cards' generators stay where they are.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            model = cls(
                text,
                image_encoder=image,
                temperature=config.temperature,
                **Architecture.of(config).to_dict(),
            )
        return model.to(device)

    @classmethod
    def zero_shot(cls, name: str) -> CLIPModel:
        """A CLIP checkpoint as it is: both of its own towers, nothing trained.

        Args:
            name: hub name or folder of a CLIP of ``transformers``.

        Raises:
            CaptuneError: not reachable, or not CLIP.
        """
        image = load_image_encoder(name)
        if not isinstance(image, ClipImageEncoder):
            raise CaptuneError(f"{name} is no CLIP checkpoint with both towers, and no run")
        # CLIP's own scale is learnt, clipped at 100, and ends there (paper, section 2.5).
        return cls(load_text_encoder(name), image_encoder=image, temperature=0.01).eval()
