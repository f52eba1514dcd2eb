"""A batch that several processes share: what each tells the others of its images.

Each process reads and embeds its own images. What is small enough is brought together: which images
and captions the step has, and the images' pooled features, with their gradient. From there on every
process has the whole step, with the same draws, so that head, dropout, BatchNorm of the head, mixup
and the captions of the bank are those of one process. The loss alone is divided, for its pairs are
what grows with the square of the batch; each process averages the queries of its own images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.nn.modules.batchnorm import _BatchNorm

from captune.data.pixels import UnreadableImageError
from captune.processes import Processes, processes
from captune.training.draws import Draws

BUCKET = 2**25  # numbers that are added up over the processes at once

# torch 2.13 renamed it.
_all_gather = getattr(
    functional, "all_gather_single_autograd", functional.all_gather_tensor_autograd
)


class Exchanged(NamedTuple):
    """A step as all processes know it: its ``images`` and ``drawn`` captions ``(B,)``, how many of
    them each process holds, what none of them could read; and this process's own ``inputs``."""

    inputs: Tensor
    images: Tensor
    drawn: Tensor
    sizes: tuple[int, ...]
    broken: list[UnreadableImageError]


def exchange(
    here: Processes,
    inputs: Tensor,
    images: Tensor,
    drawn: Tensor,
    broken: Sequence[UnreadableImageError],
) -> Exchanged:
    """Bring together what each process has read: ``inputs``, ``images`` and ``drawn`` of b rows."""
    first = torch.tensor([[len(broken), inputs.shape[-1]]])
    parts = here.rows_of_each(torch.cat((first, torch.stack((images, drawn), 1))))
    rows = torch.cat([part[1:] for part in parts])
    if any(int(part[0, 0]) for part in parts):
        words = here.all_words([word for error in broken for word in (error.path, error.reason)])
        pairs = zip(words[::2], words[1::2], strict=True)
        broken = [UnreadableImageError(path, reason) for path, reason in pairs]
    if len(inputs) == 0 and inputs.dim() == 4:  # as large as the others', with which it is gathered
        side = max(int(part[0, 1]) for part in parts)
        inputs = inputs.new_empty(0, 3, side, side)
    sizes = tuple(len(part) - 1 for part in parts)
    images, drawn = rows.T.contiguous()
    return Exchanged(inputs, images, drawn, sizes, list(broken))


def own_rows(sizes: Sequence[int]) -> slice:
    """Where this process's images stand among all of a step."""
    ends = [0, *accumulate(sizes)]
    rank = processes().rank
    return slice(ends[rank], ends[rank + 1])


def gather(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """``(b, ...)`` of each process, ``sizes`` of them, to ``(B, ...)`` in all, with a gradient.

    A gradient that comes back is added up over the processes: each has some of it.
    """
    longest = max(sizes)
    if len(rows) < longest:
        rows = torch.cat((rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])))
    assert dist.group.WORLD is not None
    found = _all_gather(rows.contiguous(), 0, dist.group.WORLD)
    kept = [slice(place * longest, place * longest + size) for place, size in enumerate(sizes)]
    return torch.cat([found[part] for part in kept])


def total(tensor: Tensor) -> Tensor:
    """``tensor`` added up over all processes, without a gradient."""
    summed = tensor.detach().clone().contiguous()
    dist.all_reduce(summed)
    return summed


def zeros_where_others_have(parameters: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Give parameters a gradient of zero where only other processes have one."""
    if 0 not in sizes:
        return
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    flags = torch.stack(processes().rows_of_each(there)).any(0)
    for parameter in (p for p, flag in zip(parameters, flags, strict=True) if flag):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def average_statistics(backbone: nn.Module) -> None:
    """The mean over processes of what BatchNorms keep of their batches, where they still do."""
    norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [b for n in norms for b in (n.running_mean, n.running_var) if b is not None]
    add_up(kept)
    for buffer in kept:
        buffer /= processes().count


class Sum:
    """Tensors that are added up over the processes, in place: begun here, whole after :meth:`take`.

    They are sent as one; until then there is a copy of them.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._work = dist.all_reduce(self._flat, async_op=True)

    @property
    def done(self) -> bool:
        """Whether taking it is no wait."""
        return bool(self._work.is_completed())

    def take(self) -> None:
        """Wait for the sums, and put them in the tensors' place."""
        self._work.wait()
        parts = torch.split(self._flat, [tensor.numel() for tensor in self._tensors])
        for tensor, part in zip(self._tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def add_up(tensors: Sequence[Tensor]) -> None:
    """Add up each tensor over the processes, in place, many at once."""
    bucket: list[Tensor] = []
    for place, tensor in enumerate(tensors):
        bucket.append(tensor)
        if place + 1 == len(tensors) or sum(t.numel() for t in bucket) >= BUCKET:
            Sum(bucket).take()
            bucket = []


def copy_from_main(modules: Sequence[nn.Module], device: torch.device) -> None:
    """Bring weights, buffers and torch's generators of all processes to the main one's."""
    here = processes()
    if here.count == 1:
        return
    with torch.no_grad():
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                same = tensor.contiguous()
                dist.broadcast(same, 0)
                tensor.copy_(same)
    draws = Draws.now(device)
    for state in draws.states:
        state.copy_(here.rows_of_each(state)[0])
    draws.again()


@contextlib.contextmanager
def own_draws(device: torch.device, images: Tensor) -> Iterator[None]:
    """Inside, each process draws for its own of the step's ``images``; afterwards all stand where
    they stood, so that what follows draws the same in all."""
    before = Draws.now(device)
    # Where nothing else draws on the host, its generator stands there at every step: without the
    # images all steps would draw the same.
    words = [int(torch.randint(2**62, ())), processes().rank, *images.tolist()]
    torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))
    try:
        yield
    finally:
        before.again()
