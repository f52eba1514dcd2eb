"""A step that does not fit the memory is done again in smaller chunks, from where it began."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from captune.config import Config
from captune.console import say
from captune.device import give_back_freed_memory
from captune.errors import CaptuneError
from captune.losses import Criterion
from captune.models import CLIPModel
from captune.processes import processes
from captune.training.draws import Draws
from captune.training.loader import Batch

# What allocators say: torch's on the CPU (Windows, Linux), a driver's own. oneDNN names no reason
# why it has no room for a convolution.
OUT_OF_MEMORY = re.compile(
    r"not enough memory|can't allocate memory|out of memory|could not create a (primitive|memory)",
    re.IGNORECASE,
)

Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left for a tensor."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


class StepAgainError(Exception):
    """A step failed in a way that is switched off by now: done again from where it began, it will
    not fail so."""


class StepMemory:
    """Runs the steps of an epoch with as large chunks as fit.

    A step that runs out of memory is undone (its gradients, the draws of torch's generators, what a
    BatchNorm and the loss remember) and done again with half the chunk: the gradients are those of
    the whole batch, as :mod:`captune.training.chunks` says. The weights and the optimiser's state
    are as they were, for neither changes before the gradients are whole. A step that raises
    :class:`StepAgainError` is undone and done again in the same way, with the chunk it had.

    Args:
        model, criterion, optimizer: of the step.
        config: what the steps are given, until one of them does not fit.

    ``config`` has the ``chunk_size`` that the last step was done with.
    """

    def __init__(
        self,
        model: CLIPModel,
        criterion: Criterion,
        optimizer: Optimizer,
        config: Config,
    ) -> None:
        self.config = config
        self._model = model
        self._criterion = criterion
        self._optimizer = optimizer
        self._stepping = False
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self._hook = inner.register_step_pre_hook(self._begin_step)

    def _begin_step(self, *_: object) -> None:
        self._stepping = True

    def close(self) -> None:
        """Watch the optimiser no longer."""
        self._hook.remove()

    def run(self, batch: Batch, step: Callable[[Config], Result]) -> Result:
        """What ``step`` gives for ``config``, which has smaller chunks from here on where needed.

        Raises:
            CaptuneError: it does not fit with chunks of one image either; it ran out inside the
                optimiser's step; or there are several processes, which must change together.
        """
        while True:
            self._stepping = False
            said: str | None = None
            draws, remembered = Draws.now(self._model.device), self._remembered()
            try:
                return step(self.config)
            except StepAgainError as failed:
                if self._stepping and failed.__cause__ is not None:  # weights may have changed
                    raise failed.__cause__ from None
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = (str(error) or type(error).__name__).splitlines()[0]
            # Out here: while the error is alive, its traceback holds the step's tensors.
            if said is not None:
                self.config = self._smaller(batch, said)
            self._optimizer.zero_grad(set_to_none=True)
            self._model.zero_grad(set_to_none=True)
            for module, name, buffer, before in remembered:
                setattr(module, name, buffer.copy_(before))  # it may be another one by now
            draws.again()
            gc.collect()
            give_back_freed_memory()

    def _remembered(self) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
        """The buffers that a forward pass changes, where they are, with copies of them."""
        parts: list[nn.Module] = [
            module
            for module in self._model.modules()
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
        ]
        if isinstance(self._criterion, nn.Module):
            parts += self._criterion.modules()
        return [
            (part, name, buffer, buffer.clone())
            for part in parts
            for name, buffer in part.named_buffers(recurse=False)
        ]

    def _smaller(self, batch: Batch, said: str) -> Config:
        """The config with half the chunk, and a line that says so; ``said``: by the allocator."""
        images, features = len(batch.images), batch.inputs.dim() == 2
        had = min(self.config.chunk_size or images, images)
        if features:
            raise CaptuneError(_head_advice(images))
        what = f"a step of {images} images, {had} at a time, does not fit the memory"
        half = (had + 1) // 2
        if self._stepping:
            raise CaptuneError(
                f"{what}: it ran out while the weights were changed, so it cannot be done again; "
                f"go on from the last saved state with --resume and chunk_size={half}"
            )
        here = processes()  # of several on a CPU accelerate knows only the own one
        if here.count > 1:
            raise CaptuneError(
                f"{what} of process {here.rank} of {here.count}: go on with --resume and "
                f"chunk_size={half}, the same for all of them"
            )
        if had == 1:
            raise CaptuneError(
                f"{what} ({said}): give a smaller image_size or batch_size, or other towers"
            )
        live = "" if self.config.freeze_batch_norm else "; BatchNorm's statistics are now a chunk's"
        say(f"{what}: going on with chunk_size={half}, which saves this search next time{live}")
        return self.config.replace(chunk_size=half)


@contextmanager
def head_memory(images: int) -> Iterator[None]:
    """What a step on kept features needs beside the step itself.

    Raises:
        CaptuneError: it does not fit the memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise CaptuneError(_head_advice(images)) from None


def _head_advice(images: int) -> str:
    return (
        f"a step of {images} images' features does not fit the memory: give a smaller "
        "head_batch_size or fewer bank_negatives"
    )


def validate_within(config: Config, validate: Callable[[Config], Result]) -> Result:
    """What ``validate`` gives for ``config``, again with smaller chunks where it does not fit the
    memory: it leaves nothing to undo.

    Raises:
        CaptuneError: it does not fit one image at a time either, or there are several processes.
    """
    while True:
        try:
            return validate(config)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        had = config.chunk_size or config.batch_size
        what = f"a validation of {had} images at a time does not fit the memory"
        if had == 1 or processes().count > 1:
            raise CaptuneError(
                f"{what}: go on with --resume and a smaller chunk_size or batch_size"
            )
        config = config.replace(chunk_size=(had + 1) // 2)
        gc.collect()
        give_back_freed_memory()
        say(f"{what}: it is done again with {config.chunk_size}")
