"""An image tower's layers from input to output, for a learning rate that falls with depth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_CONTAINERS = (nn.ModuleList, nn.Sequential)


class _Piece(NamedTuple):
    """Parameters that stay together; a ``block`` is a layer by itself."""

    name: str
    block: bool
    parameters: list[nn.Parameter]


def encoder_layers(encoder: nn.Module) -> list[tuple[str, list[nn.Parameter]]]:
    """The trainable parameters of any image tower, in layers from input to output.

    A layer is one block of a chain (``nn.ModuleList`` or ``nn.Sequential`` of modules that have
    parts themselves), chains of stages included, or all that lies before, between or after blocks:
    the stem, a downsampling, the last norm. Of a tower without any chain, each child is a layer.
    What is inside a block is never taken apart.

    Order is that of registration, which a tower should make the order of its forward pass;
    architectures that register by kind (all patch embeddings, then all blocks) come out by kind.

    Args:
        encoder: any module.

    Returns:
        Names (dotted paths of a layer's first part) and parameters. Every parameter with
        ``requires_grad`` stands in exactly one layer, a shared one in the first that has it; no
        layer is empty.
    """
    chained = _holds_chain(encoder)
    layers: list[tuple[str, list[nn.Parameter]]] = []
    seen: set[int] = set()
    open_run = False  # whether the last layer takes in what is no block
    for piece in _chain_pieces(encoder, "") if chained else _child_pieces(encoder, ""):
        fresh = [p for p in piece.parameters if p.requires_grad and id(p) not in seen]
        seen.update(id(p) for p in fresh)
        if fresh and open_run and not piece.block:
            layers[-1][1].extend(fresh)
        elif fresh:
            layers.append((piece.name, fresh))
            open_run = not piece.block
    return layers


def split_layers(
    encoder: nn.Module, frozen: float
) -> tuple[list[list[nn.Parameter]], list[list[nn.Parameter]]]:
    """The parameters of the layers that stay as they are, the share ``frozen`` of all from the
    input, and of those that train. They are only told apart: nothing is frozen by it."""
    layers = [parameters for _, parameters in encoder_layers(encoder)]
    first = round(len(layers) * frozen)
    return layers[:first], layers[first:]


def freeze_batch_norm(module: nn.Module) -> None:
    """Put every BatchNorm in ``module`` into eval mode: its running statistics stay as they are.

    Its weight and bias are trained on. Call it after each ``module.train()``, which undoes it.
    """
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()


def _chain_pieces(module: nn.Module, path: str) -> Iterator[_Piece]:
    """Walk down to the blocks; ``module`` is a chain, holds one, or is a stage of one."""
    yield _Piece(path, False, list(module.parameters(recurse=False)))
    in_chain = isinstance(module, _CONTAINERS)
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        if _is_stage(child) if in_chain else _holds_chain(child):
            yield from _chain_pieces(child, where)
        else:
            yield _Piece(where, in_chain and _is_composite(child), list(child.parameters()))


def _child_pieces(module: nn.Module, path: str) -> Iterator[_Piece]:
    """The children, below wrappers that hold one child and nothing else."""
    own = list(module.parameters(recurse=False))
    children = [(n, c) for n, c in module.named_children() if any(True for _ in c.parameters())]
    if not own and len(children) == 1:
        name, child = children[0]
        yield from _child_pieces(child, f"{path}.{name}" if path else name)
        return
    yield _Piece(path, False, own)
    for name, child in children:
        yield _Piece(f"{path}.{name}" if path else name, True, list(child.parameters()))


def _is_composite(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _is_chain(module: nn.Module) -> bool:
    """A container of blocks; one of bare layers (convolution, norm, activation) is a block."""
    return isinstance(module, _CONTAINERS) and any(map(_is_composite, module.children()))


def _holds_chain(module: nn.Module) -> bool:
    return any(map(_is_chain, module.modules()))


def _is_stage(element: nn.Module) -> bool:
    """Whether an element of a chain is itself one, or merely wraps some: a stage of blocks.

    A list of parts is looped over, so it is a chain of blocks wherever it stands. A Sequential
    is that only where nothing stands beside it: beside a shortcut, it is a residual branch.
    """
    if isinstance(element, _CONTAINERS):
        return _is_chain(element)
    parts = [part for part in element.children() if not isinstance(part, nn.Identity)]
    if any(isinstance(part, nn.ModuleList) and _is_chain(part) for part in parts):
        return True
    return bool(parts) and all(
        isinstance(part, nn.Sequential) and len(part) and all(map(_is_composite, part))
        for part in parts
    )
