"""What stands around a backbone's features: pooling, projection, and the text side's adapter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# A channel steadier than this share of the average channel is scaled like one that is not.
LEAST_RELATIVE_STD = 0.01


class ProjectionHead(nn.Module):
    """``[standardise] -> [Dropout] -> Linear -> [BatchNorm] -> GELU -> [Dropout] -> Linear``.

    ``(N, in_dim)`` to ``(N, out_dim)``.

    Args:
        in_dim: C, the backbone's features.
        out_dim: D, the text space's dimension.
        hidden_dim: width between.
        use_batch_norm: experimental: normalise the hidden layer over the batch.
        dropout: share of the hidden layer that is dropped while training.
        feature_dropout: share of the features that is dropped while training.
        standardise: subtract ``feature_mean (C,)`` and divide by ``feature_std (C,)``. Both are
            saved with the weights; they change nothing before :meth:`set_statistics`.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 1024,
        use_batch_norm: bool = False,
        dropout: float = 0.0,
        feature_dropout: float = 0.0,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        self.standardise = standardise
        if standardise:
            self.register_buffer("feature_mean", torch.zeros(in_dim))
            self.register_buffer("feature_std", torch.ones(in_dim))
        self.feature_dropout = nn.Dropout(feature_dropout) if feature_dropout else nn.Identity()
        self.hidden = nn.Linear(in_dim, hidden_dim)
        self.norm = nn.BatchNorm1d(hidden_dim) if use_batch_norm else nn.Identity()
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.output = nn.Linear(hidden_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        if self.standardise:
            features = (features - self.feature_mean) / self.feature_std
        hidden = self.activation(self.norm(self.hidden(self.feature_dropout(features))))
        return self.output(self.dropout(hidden))  # type: ignore[no-any-return]

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """What the input is standardised with, usually the training set's.

        A channel that hardly moves (``std`` below a hundredth of the channels' average) is divided
        by that hundredth: fine-tuning may wake it, and it must not drown the others then.

        Args:
            mean, std: ``(C,)``, finite, ``std`` at least 0.

        Raises:
            ValueError: the head does not standardise, or the statistics are of another form.
        """
        if not self.standardise:
            raise ValueError("this head was made with standardise=False")
        if mean.shape != self.feature_mean.shape or std.shape != self.feature_std.shape:
            raise ValueError(
                f"statistics of shape {tuple(mean.shape)} and {tuple(std.shape)} for "
                f"{len(self.feature_mean)} features"
            )
        if not (mean.isfinite().all() and std.isfinite().all() and (std >= 0).all()):
            raise ValueError("statistics must be finite, and no std below 0")
        least = LEAST_RELATIVE_STD * float(std.mean())
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std.clamp(min=least) if least else torch.ones_like(std))


class TextAdapter(nn.Module):
    """A linear map of text embeddings onto the sphere again; at first it changes nothing.

    Always in fp32: under autocast, ``bf16`` would round the embeddings that it should hand on.

    Args:
        dimension: D.

    ``(N, D)`` of unit length in, ``(N, D)`` fp32 of unit length out.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dimension, dimension)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, text: Tensor) -> Tensor:
        with torch.autocast(text.device.type, enabled=False):
            return F.normalize(self.linear(text.float()), dim=-1)


class AttentionPooling(nn.Module):
    """Each head averages its share of the channels with weights of its own over the positions.

    Attention-based pooling (Ilse, Tomczak and Welling 2018, equation 8 without the hidden layer),
    with several heads as in Vaswani et al. 2017. A 1x1 convolution scores the positions; its
    weights start at zero, so that training starts from plain average pooling.

    Args:
        channels: C, divisible by ``heads``.
        heads: independent sets of weights.

    ``(N, C, h, w)`` in, ``(N, C)`` out.
    """

    def __init__(self, channels: int, *, heads: int = 8) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels do not divide into {heads} heads")
        self.heads = heads
        self.score = nn.Conv2d(channels, heads, kernel_size=1, bias=False)
        nn.init.zeros_(self.score.weight)

    def weights(self, feature_map: Tensor) -> Tensor:
        """``(N, heads, h * w)``, each row summing to one."""
        return torch.softmax(self.score(feature_map).float().flatten(2), dim=-1)

    def forward(self, feature_map: Tensor) -> Tensor:
        n, c, h, w = feature_map.shape
        values = feature_map.reshape(n, self.heads, c // self.heads, h * w)
        weights = self.weights(feature_map).to(values.dtype)  # (N, heads, hw)
        return torch.einsum("nhcp,nhp->nhc", values, weights).flatten(1)


class GeneralisedMeanPooling(nn.Module):
    """``mean(x ** p) ** (1 / p)`` over the positions, with ``p`` learnt (GeM).

    Radenović, Tolias and Chum 2018, *Fine-tuning CNN Image Retrieval with No Human Annotation*,
    equation 3, one ``p`` for all channels. ``p`` lies in 1..10: 1 is the average, which it starts
    from, and the larger it is, the nearer the result comes to the maximum.

    Values below ``least`` count as ``least``. The maps of EfficientNet-Lite and ResNet end in a
    ReLU and lose nothing by it; a map with negative values (a ViT's) loses them, so that even
    ``p = 1`` is not its average.

    Args:
        initial: the first ``p``.
        least: stands for zero, whose logarithm has no gradient.

    ``(N, C, h, w)`` in, ``(N, C)`` out; computed in fp32, returned in the map's type.

    Raises:
        ValueError: ``initial`` outside 1..10.
    """

    BOUNDS = (1.0, 10.0)

    def __init__(self, *, initial: float = 1.0, least: float = 1e-6) -> None:
        super().__init__()
        if not self.BOUNDS[0] <= initial <= self.BOUNDS[1]:
            raise ValueError(f"p = {initial} is not in 1..10")
        self.least = least
        self.p = nn.Parameter(torch.tensor(float(initial)))

    def forward(self, feature_map: Tensor) -> Tensor:
        p: Tensor = _Bounded.apply(self.p.float(), *self.BOUNDS)  # type: ignore[no-untyped-call]
        logs = feature_map.float().clamp(min=self.least).log().flatten(2)  # (N, C, hw)
        # In logarithms, as least ** 10 would be 0 in fp32, and its root's gradient infinite.
        means = (torch.logsumexp(p * logs, dim=-1) - math.log(logs.shape[-1])) / p
        return means.exp().to(feature_map.dtype)


class _Bounded(torch.autograd.Function):
    """A clamp that can be left again: beyond a bound, only gradients that lead back pass.

    ``torch.clamp`` has none there, and ``p``, which starts at its bound, would stay for ever after
    one step beyond it.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.bounds = (low, high)
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (value,), (low, high), (gradient,) = ctx.saved_tensors, ctx.bounds, gradients
        # An optimiser steps against the gradient: below, a negative one leads back.
        outward = ((value < low) & (gradient > 0)) | ((value > high) & (gradient < 0))
        return gradient.masked_fill(outward, 0.0), None, None
