"""Depthwise convolution whose bf16 gradients, on a CPU, are computed in the faster arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DepthwiseConv2d(nn.Module):
    """``nn.Conv2d`` with one filter for each channel and no bias, whose bf16 gradients are fast.

    On CPUs the library's bf16 gradients of a depthwise convolution are several times slower than
    its fp32 ones where the stride is above 1 (with respect to the input) or the kernel larger than
    3 (with respect to the weight). Those are computed in fp32 here, from the same bf16 values.

    Args:
        weight: ``(C, 1, k, k)``; becomes this module's parameter.
        stride: of both sides.
        padding: zeros put on (left, right, top, bottom).

    ``(N, C, h, w)`` in, ``(N, C, h', w')`` out.
    """

    def __init__(
        self, weight: nn.Parameter, *, stride: int, padding: tuple[int, int, int, int]
    ) -> None:
        super().__init__()
        self.weight = weight
        self.stride = stride
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        even = self.padding[0] if len(set(self.padding)) == 1 else 0
        if not even and any(self.padding):
            x = F.pad(x, self.padding)
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            low = torch.get_autocast_dtype("cpu")
            if low == torch.bfloat16:
                found: Tensor = _LowDepthwise.apply(x.to(low), self.weight, self.stride, even)  # type: ignore[no-untyped-call]
                return found
        return F.conv2d(x, self.weight, None, self.stride, even, groups=len(self.weight))


class _LowDepthwise(torch.autograd.Function):
    """``x (N, C, h, w)`` bf16 and ``weight (C, 1, k, k)`` fp32; the result is bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight.to(x.dtype), None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        weight = weight.to(x.dtype)

        def along(place: int, dtype: torch.dtype) -> Tensor:
            """The gradient with respect to the input (0) or the weight (1)."""
            found: Tensor = torch.ops.aten.convolution_backward(
                *(part.to(dtype) for part in (gradient, x, weight)),
                None,
                [ctx.stride] * 2,
                [ctx.padding] * 2,
                [1, 1],
                False,
                [0, 0],
                len(weight),
                [place == 0, place == 1, False],
            )[place]
            return found

        wanted = ctx.needs_input_grad
        for_x = along(0, torch.float32 if ctx.stride > 1 else x.dtype) if wanted[0] else None
        for_weight = along(1, torch.float32 if weight.shape[-1] > 3 else x.dtype)
        return (
            for_x.to(x.dtype) if for_x is not None else None,
            for_weight.float() if wanted[1] else None,
            None,
            None,
        )
