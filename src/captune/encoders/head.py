"""What stands between a backbone's features and the text space: pooling and projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """``Linear -> [BatchNorm] -> GELU -> Linear``, ``(N, in_dim)`` to ``(N, out_dim)``.

    Args:
        in_dim: C, the backbone's features.
        out_dim: D, the text space's dimension.
        hidden_dim: width between.
        use_batch_norm: experimental: normalise the hidden layer over the batch.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *, hidden_dim: int = 1024, use_batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_dim, hidden_dim)
        self.norm = nn.BatchNorm1d(hidden_dim) if use_batch_norm else nn.Identity()
        self.activation = nn.GELU()
        self.output = nn.Linear(hidden_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.output(self.activation(self.norm(self.hidden(features))))  # type: ignore[no-any-return]


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
