"""Depthwise convolution: the same results and gradients as torch's own, in either arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captune.encoders.depthwise import DepthwiseConv2d

KINDS = [  # kernel, stride, zeros left, right, top, bottom
    (3, 1, (1, 1, 1, 1)),
    (3, 2, (0, 1, 0, 1)),
    (5, 1, (2, 2, 2, 2)),
    (5, 2, (1, 2, 1, 2)),
    (3, 2, (0, 0, 0, 0)),
    (4, 1, (1, 1, 1, 1)),
    (5, 3, (0, 0, 0, 0)),
    (7, 1, (3, 3, 3, 3)),
]


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    steady = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((output.float() * steady).sum(), inputs)


def slow(x: Tensor, weight: Tensor, stride: int, padding: tuple[int, ...]) -> Tensor:
    """Channel by channel, position by position, in double precision."""
    x = F.pad(x.double(), padding)
    k = weight.shape[-1]
    rows = []
    for top in range(0, x.shape[2] - k + 1, stride):
        lefts = range(0, x.shape[3] - k + 1, stride)
        windows = [x[:, :, top : top + k, left : left + k] for left in lefts]
        rows.append(torch.stack([(w * weight[:, 0].double()).sum((2, 3)) for w in windows], -1))
    return torch.stack(rows, 2)


@pytest.mark.parametrize(("kernel", "stride", "padding"), KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_outputs_and_gradients_are_those_of_a_slow_loop(
    kernel: int, stride: int, padding: tuple[int, int, int, int], precision: str
) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 1, kernel, kernel))
    x = torch.randn(2, 6, 9, 11).to(torch.bfloat16).float().requires_grad_()
    layer = DepthwiseConv2d(weight, stride=stride, padding=padding)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        found = layer(x)
    assert found.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    expected = slow(x, weight, stride, padding)
    # bf16 keeps 8 bits of each number, and inputs are bf16 already: what is lost is the weight's.
    low = precision == "bf16"
    near = {"rtol": 0.02, "atol": 0.1} if low else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.double(), expected, **near)
    near["atol"] *= 5  # gradients of the weight are sums over all positions
    pairs = zip(gradients(found, x, weight), gradients(expected, x, weight), strict=True)
    for ours, reference in pairs:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, reference.float(), **near)


def test_what_needs_no_gradient_gets_none_and_a_copy_has_its_own_weight() -> None:
    layer = DepthwiseConv2d(nn.Parameter(torch.randn(4, 1, 3, 3)), stride=1, padding=(1, 1, 1, 1))
    x = torch.randn(1, 4, 5, 5)
    other = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert layer.weight.grad is not None and other.weight.grad is None and x.grad is None
    layer.weight.requires_grad_(False)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert x.grad is not None
