"""Depthwise convolution whose bf16 gradients, on a CPU, are computed in the faster arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DepthwiseConv2d(nn.Module):
    """``nn.Conv2d`` with one filter for each channel and no bias, whose bf16 gradients are fast.

    On CPUs the library's bf16 gradients of a depthwise convolution are several times slower than
    its fp32 ones where the stride is above 1 (with respect to the input) or the kernel wider than
    3 (with respect to the weight). The first are computed in fp32 here, from the same bf16 values;
    the second in stripes of the kernel, which are narrow enough.

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
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            dtype = torch.float32 if ctx.stride > 1 else x.dtype
            parts = [part.to(dtype) for part in (gradient, x, weight)]
            for_x = _gradients(parts, ctx.stride, ctx.padding, of_x=True).to(x.dtype)
        if ctx.needs_input_grad[1]:
            stripes = _weight_stripes(gradient, x, weight.to(x.dtype), ctx.stride, ctx.padding)
            for_weight = torch.cat(stripes, -1).float()
        return for_x, for_weight, None, None


def _weight_stripes(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int
) -> list[Tensor]:
    """The weight's gradient from left to right, three columns ``(C, 1, k, 3)`` at a time or fewer.

    A column of the kernel has the gradient that a kernel of one column would have on the input
    from that column on. Zeros are put around the input first: the library is slow, too, where a
    kernel is taller than what it is moved over.
    """
    if weight.shape[-1] <= 3:
        return [_gradients([gradient, x, weight], stride, padding, of_x=False)]
    padded = F.pad(x, (padding,) * 4)
    stripes = []
    for left in range(0, weight.shape[-1], 3):
        stripe = weight[..., left : left + 3]
        right = left + (gradient.shape[-1] - 1) * stride + stripe.shape[-1]
        parts = [gradient, padded[..., left:right], stripe]
        stripes.append(_gradients(parts, stride, 0, of_x=False))
    return stripes


def _gradients(parts: list[Tensor], stride: int, padding: int, *, of_x: bool) -> Tensor:
    """The library's gradient with respect to the input, or else to the weight; ``parts`` are the
    output's gradient, the input and the weight."""
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        *parts,
        None,
        [stride] * 2,
        [padding] * 2,
        [1, 1],
        False,
        [0, 0],
        len(parts[2]),
        [of_x, not of_x, False],
    )
    return found[0 if of_x else 1]
