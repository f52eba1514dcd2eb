"""The backbone compiled (torch.compile) for the steps of stage 2, where that makes them faster.

Compiling takes as long as thousands of steps may save, and on some machines it saves nothing. So it
is tried on the run's own steps: some as they are, some compiled, and the faster way goes on. Only
what happens inside of a training step is ever compiled: validation, features and whoever uses the
model between two steps find the backbone as it is, and no parameter has another name.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from shutil import which
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from captune.config import Config
from captune.console import say
from captune.errors import CaptuneError
from captune.models import CLIPModel
from captune.processes import processes
from captune.training.loader import Batch
from captune.training.memory import StepAgainError, is_out_of_memory
from captune.training.progress import Verdict

WARM_UP = 5  # steps of each way before those that count: buffers, kernels, the compiling itself
TIMED = 20  # steps of each way that count
WORTH = 300.0  # seconds of steps left, from which on a minute of compiling may pay
GAIN = 0.98  # of the time as it is: a compiled step must be below that, for timings tremble

# Growing crops, chunks of two lengths, and passes with and without a gradient want more of them
# than torch allows by itself (8), beyond which it goes on uncompiled without a word.
GRAPHS = 128
# A graph for each shape, for one for all shapes is slower; draws as the plain backbone makes them,
# which chunks rely on when they pass it twice.
COMPILE: dict[str, Any] = {"dynamic": False, "options": {"fallback_random": True}}

Result = TypeVar("Result")


class Clock(Protocol):
    """What times steps."""

    def around(self, step: Callable[[], Result]) -> Result:
        """Do a step, and time it."""
        ...

    def times(self) -> list[float]:
        """Seconds of each step since this was asked last."""
        ...


class CardClock:
    """Times steps on the CUDA device, which is waited for only where the times are asked for.

    What lies between two steps (photos that are late, a saved state) does not count.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def around(self, step: Callable[[], Result]) -> Result:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        result = step()
        ended.record()
        self._spans.append((began, ended))
        return result

    def times(self) -> list[float]:
        torch.cuda.synchronize()
        times = [began.elapsed_time(ended) / 1000 for began, ended in self._spans]
        self._spans.clear()
        return times


class BackboneCompiler:
    """Does training steps with the backbone compiled, or as it is.

    Steps of fewer images than others (photos that could not be read) are done as it is, so that no
    graph is made for them. A change of what a graph depends on (the side of the crops, the chunk
    size, which weights train) begins a new trial.

    Args:
        backbone: what is compiled.
        clock: decides by trial; None: compiled from the first step on, whatever it brings.

    ``compiled``: whether the last step was.
    ``verdict``: of the last trial that ended. A resumed run sets it to the one it had: another
    trial might go the other way, which rounds otherwise.
    """

    def __init__(self, backbone: nn.Module, clock: Clock | None = None) -> None:
        self.compiled = False
        self.verdict: Verdict | None = None
        self._backbone: Any = backbone
        self._clock = clock
        self._call: Any = None  # what nn.Module calls in place of its own forward pass, once made
        self._left = self._trained = 0
        self._form: tuple[int, ...] = (0,)  # images, and what else the graph depends on
        self._trial: Iterator[bool] = iter(())
        self._after = clock is None  # whether steps are compiled once the trial is over
        self._failed = False
        self._why = ""  # it failed, until that is said

    def begin(self, left: int) -> None:
        """An epoch begins; ``left`` steps like its own are still to come, its own among them."""
        self._left = left
        self._trained = sum(p.requires_grad for p in self._backbone.parameters())

    def run(self, batch: Batch, step: Callable[[Config], Result], config: Config) -> Result:
        """What ``step`` gives for ``config``.

        Raises:
            StepAgainError: compiling failed; called again, this does the step without it.
            CaptuneError: it failed where it was asked for.
        """
        self._left -= 1
        tried = self._next(batch, config)
        self.compiled = self._is_usual(batch) and (self._after if tried is None else tried)
        call = partial(step, config)
        if tried is not None and self._clock is not None:
            call = partial(self._clock.around, call)
        if not self.compiled:
            result = call()
            if self._why:  # and the step as it is did not
                say(f"the backbone cannot be compiled and is left as it was: {self._why}")
                self._why = ""
            return result
        try:
            with self._in_place():
                return call()
        except Exception as error:
            self._give_up(error)
            raise StepAgainError from error

    def _is_usual(self, batch: Batch) -> bool:
        return len(batch.inputs) == self._form[0]

    def _next(self, batch: Batch, config: Config) -> bool | None:
        """Whether the trial wants the next step compiled; None: it is no step of a trial."""
        images, *side = batch.inputs.shape
        form = (images, *side, config.chunk_size, self._trained)
        if form[1:] != self._form[1:] or images > self._form[0]:
            self._form = form
            if self._clock is not None and not self._failed:
                known = self.verdict if self.verdict and self.verdict.form == list(form) else None
                self._after = known is not None and known.compiled
                self._trial = iter(()) if known else self._try(self._clock)
        return next(self._trial, None) if self._is_usual(batch) else None

    def _try(self, clock: Clock) -> Iterator[bool]:
        """Whether each step of a trial is compiled; at its end, what comes after it is decided."""
        yield from [False] * WARM_UP
        clock.times()  # neither these nor those of a trial that was broken off
        yield from [False] * TIMED
        plain = statistics.median(clock.times())
        if plain * self._left < WORTH:
            self._decide(False)
            return
        yield from [True] * WARM_UP
        took = sum(clock.times()) - WARM_UP * plain
        yield from [True] * TIMED
        fast = statistics.median(clock.times())
        self._decide(fast < GAIN * plain)
        verdict = "kept" if self._after else "not faster, left as it was"
        say(
            f"compiled backbone: {1000 * plain:.1f} to {1000 * fast:.1f} ms a step, {verdict}; "
            f"compiling took {took:.0f} s"
        )

    def _decide(self, compiled: bool) -> None:
        self._after, self.verdict = compiled, Verdict(list(self._form), compiled)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The backbone compiled; afterwards it is as it was."""
        before = self._backbone._compiled_call_impl
        if self._call is None:
            self._backbone.compile(**COMPILE)
            self._call = self._backbone._compiled_call_impl
        self._backbone._compiled_call_impl = self._call
        try:
            with _many_graphs():
                yield
        finally:
            self._backbone._compiled_call_impl = before

    def _give_up(self, error: Exception) -> None:
        """Leave the backbone as it is from here on.

        Whatever a compiled step of a trial's choice raises, a plain one is done in its place: an
        error that has nothing to do with compiling is raised again by that one, and told as it is.

        Raises:
            CaptuneError: compiling was asked for, and failed.
            Exception: ``error``, which is none of compiling.
        """
        from torch._dynamo.exc import TorchDynamoException  # slow to import

        compiling = self._call is None or isinstance(error, TorchDynamoException)
        if isinstance(error, CaptuneError) or (is_out_of_memory(error) and not compiling):
            raise error
        why = (" ".join(str(error).split()) or type(error).__name__)[:200]
        if self._clock is None:
            if compiling:
                raise CaptuneError(
                    f"the backbone cannot be compiled: take compile_backbone=auto or off ({why})"
                ) from None
            raise error
        self._failed, self._trial, self._why = True, iter(()), why
        self._decide(False)


def backbone_compiler(
    model: CLIPModel, config: Config, device: torch.device
) -> BackboneCompiler | None:
    """What does the steps of stage 2 as ``config.compile_backbone`` says; None: none is compiled.

    ``auto`` compiles nothing outside of CUDA (on a CPU, compiled steps were slower), nor where
    several processes share a step: one whose compiling fails could not do it again alone.
    """
    if config.compile_backbone == "on":
        return BackboneCompiler(model.image_encoder)
    if config.compile_backbone == "off" or device.type != "cuda" or processes().count > 1:
        return None
    missing = _missing()
    if missing:
        say(f"the backbone is not compiled: {missing}")
        return None
    return BackboneCompiler(model.image_encoder, CardClock())


def _many_graphs() -> AbstractContextManager[Any]:
    from torch._dynamo import config  # slow to import

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    return config.patch({name: GRAPHS})  # type: ignore[no-any-return]


def _missing() -> str:
    """What torch.compile lacks here for a CUDA device; empty: nothing that is known."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    # Triton's launchers are C; on Windows it brings a compiler of its own.
    compilers = (os.environ.get("CC") or "gcc", "clang", "cc")
    if os.name == "posix" and not any(map(which, compilers)):
        return "there is no C compiler (gcc or clang)"
    return ""
