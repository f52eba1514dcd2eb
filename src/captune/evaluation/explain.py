"""Why a picture answers a text: heat maps of a query over an image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captune.data.pixels import ImageLike, image_batches
from captune.encoders.head import AttentionPooling
from captune.errors import CaptuneError, nearest
from captune.models import CLIPModel

METHODS = ("auto", "occlusion", "gradient", "attention")
# Occlusion covers a window of two cells' side around each cell of this grid in turn.
CELLS = 8
BATCH = 16


@dataclass(frozen=True)
class HeatMap:
    """Where in an image a query finds support.

    Attributes:
        query: the text.
        values: ``(S, S)`` float32 in 0..1, the strongest place being 1; all 0 where no place
            speaks for the query.
        strength: what 1 stands for, comparable between queries of one picture and method; for
            ``occlusion`` the fall of the similarity.
        picture: ``(S, S, 3)`` uint8 RGB, the square that the model sees.
        score: cosine similarity of image and query, -1 to 1.
        method: ``occlusion``, ``gradient`` or ``attention``.
    """

    query: str
    values: npt.NDArray[np.float32]
    strength: float
    picture: npt.NDArray[np.uint8]
    score: float
    method: str


def explain_image(
    model: CLIPModel, image: ImageLike | Tensor, query: str, *, method: str = "auto"
) -> HeatMap:
    """The places of ``image`` that make it similar to ``query``.

    ``occlusion`` covers a window (a quarter of the side, in the picture's mean colour) at each of
    8x8 places in turn, and shows by how much the similarity falls (Zeiler and Fergus 2014, section
    4.2): it measures what the others estimate, fits any tower, and costs 65 forward passes.

    ``gradient`` is Grad-CAM (Selvaraju et al. 2017, section 3): each channel of the backbone's
    last map counts by the mean of its gradient, and what speaks against the query is cut off. The
    image embedding's length is held constant: of a cosine nothing would remain where image and
    query agree already, for there no direction leads closer.

    ``attention`` shows where the attention pooling looks; each head counts by what it adds to the
    similarity (nothing, where it speaks against the query), so that the query chooses among the
    heads, but not among the places of one head.

    ``auto`` is ``occlusion``: on the demo's scenes, whose boxes are known, its peak lies on the
    thing asked for nearly twice as often as that of ``gradient``.

    Args:
        model: is left as it is: mode, weights and gradients.
        image: a path, a picture, or ``(3, H, W)`` uint8 or float in 0..1.
        query: what to look for.
        method: ``auto``, ``occlusion``, ``gradient`` or ``attention``.

    Raises:
        CaptuneError: an empty query, an unknown method, ``attention`` without attention pooling,
            a tensor of another form, or ``gradient`` with a backbone whose last map has no places.
        UnreadableImageError: a path that is no readable image.
    """
    if method not in METHODS:
        raise CaptuneError(f"unknown method {method!r} to explain with{nearest(method, METHODS)}")
    if not query.strip():
        raise CaptuneError("an empty query explains nothing: say what to look for")
    if method == "attention" and not model.architecture.use_attention_pooling:
        raise CaptuneError(
            "method 'attention' needs a model with use_attention_pooling; the others explain any"
        )
    method = "occlusion" if method == "auto" else method
    square = next(image_batches(image, model.preprocess.image_size, 1))[:1]  # (1, 3, S, S)
    pixels = square.to(model.device).float() / (255 if square.dtype == torch.uint8 else 1)
    text = model.encode_text(query)[0]  # (D,)
    with _still(model):
        with torch.no_grad():
            score = model(pixels)[0] @ text
        heat = _heat(model, pixels, text, score, method)
    values, strength = _stretched(heat, model.preprocess.image_size)
    return HeatMap(
        query,
        values,
        strength,
        (pixels[0].permute(1, 2, 0) * 255).round().byte().cpu().numpy(),
        float(score),
        method,
    )


def _heat(model: CLIPModel, pixels: Tensor, text: Tensor, score: Tensor, method: str) -> Tensor:
    """``(h, w)``, not negative."""
    if method == "occlusion":
        return _occlusion(model, pixels, text, score)
    with torch.enable_grad():
        seen = _Seen.of(model, pixels, text)
        return _attention(model, seen) if method == "attention" else _grad_cam(seen)


@torch.no_grad()
def _occlusion(model: CLIPModel, pixels: Tensor, text: Tensor, score: Tensor) -> Tensor:
    """``(CELLS, CELLS)``: the fall of the similarity with each window covered, 0 where it rises."""
    side = pixels.shape[-1]
    fill = pixels.mean((2, 3))[0, :, None, None]  # (3, 1, 1)
    # Window i reaches from one cell's half before cell i to one cell's half after it.
    edges = [
        (max(0, round((i - 0.5) * side / CELLS)), round((i + 1.5) * side / CELLS))
        for i in range(CELLS)
    ]
    windows = [(rows, columns) for rows in edges for columns in edges]
    falls = []
    for start in range(0, len(windows), BATCH):
        chosen = windows[start : start + BATCH]
        covered = pixels.repeat(len(chosen), 1, 1, 1)  # (n, 3, S, S)
        for picture, ((top, bottom), (left, right)) in zip(covered, chosen, strict=True):
            picture[:, top:bottom, left:right] = fill
        falls.append(score - model(covered) @ text)
    return torch.cat(falls).view(CELLS, CELLS).clamp(min=0)


@dataclass(frozen=True)
class _Seen:
    """A forward pass with its graph.

    ``map (1, C, h, w)`` the backbone's last map; ``pooled (1, C)``; ``score``, the image embedding
    before it is brought to unit length times the query's, a scalar; ``tokens``, the outputs
    ``(1, T, C)`` of the layer norms, in order, for class-token transformers.
    """

    map: Tensor
    pooled: Tensor
    score: Tensor
    tokens: list[Tensor]

    @classmethod
    def of(cls, model: CLIPModel, pixels: Tensor, text: Tensor) -> _Seen:
        tokens: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 3:
                tokens.append(output)

        norms = [m for m in model.image_encoder.modules() if isinstance(m, nn.LayerNorm)]
        hooks = [norm.register_forward_hook(keep) for norm in norms]
        try:
            # A gradient of the pixels is asked for, so that there is a graph where all is frozen.
            x = ((pixels - model.mean) / model.std).requires_grad_()
            features = model.image_encoder(x)
        finally:
            for hook in hooks:
                hook.remove()
        pooled = features.pooled if model.pooling is None else model.pooling(features.map)
        return cls(features.map, pooled, model.head(pooled).float()[0] @ text, tokens)


def _grad_cam(seen: _Seen) -> Tensor:
    """``(h, w)``: the channels of the last map that reaches the similarity, by mean gradient."""
    feature_map, gradient = _last_map(seen)  # (1, C, h, w) both
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * feature_map).sum(1)[0].clamp(min=0).detach()


def _last_map(seen: _Seen) -> tuple[Tensor, Tensor]:
    """The last map that the similarity depends on, and its gradient there.

    A class token is read after the last block, whose patch tokens then reach nothing. There, the
    input of the last attention is the last place where patches count: the last layer norm with a
    gradient at its patches.
    """
    (gradient,) = torch.autograd.grad(seen.score, seen.map, retain_graph=True, allow_unused=True)
    if gradient is not None and bool(gradient.any()):
        return seen.map, gradient
    h, w = seen.map.shape[2:]
    for tokens in reversed(seen.tokens):
        prefix = tokens.shape[1] - h * w
        if not 0 <= prefix < h * w:
            continue
        (found,) = torch.autograd.grad(seen.score, tokens, retain_graph=True, allow_unused=True)
        if found is not None and bool(found[:, prefix:].any()):
            as_map = [t[:, prefix:].transpose(1, 2).reshape(1, -1, h, w) for t in (tokens, found)]
            return as_map[0], as_map[1]
    raise CaptuneError(
        f"the similarity depends on no map of {h}x{w} places of this image tower: it cannot be "
        "explained by place"
    )


def _attention(model: CLIPModel, seen: _Seen) -> Tensor:
    """``(h, w)``: mean of the heads' weights, each head by its contribution to the similarity."""
    assert isinstance(model.pooling, AttentionPooling)
    h, w = seen.map.shape[2:]
    weights = model.pooling.weights(seen.map)[0].detach()  # (heads, h * w)
    (gradient,) = torch.autograd.grad(seen.score, seen.pooled, retain_graph=True)
    added = (gradient * seen.pooled).view(model.pooling.heads, -1).sum(1)  # (heads,)
    return (added.clamp(min=0).detach() @ weights).view(h, w)


def _stretched(heat: Tensor, size: int) -> tuple[npt.NDArray[np.float32], float]:
    """``(h, w)``, not negative, to ``(size, size)`` with its maximum at 1, and that maximum."""
    wide = F.interpolate(
        heat.float()[None, None], size=(size, size), mode="bilinear", align_corners=False
    )[0, 0]
    top = float(wide.max())
    stretched = wide / top if top > 0 else torch.zeros_like(wide)
    return np.asarray(stretched.cpu().numpy(), dtype=np.float32), top


@contextlib.contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each part's own mode again."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
