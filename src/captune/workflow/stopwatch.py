"""Clocks for work that a device may still be doing when a call returns."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Stopwatch:
    """Adds up the seconds of named calls; the device is waited for before and after each.

    With ``waits=False`` it is not, so that steps follow one another as in training: what the
    seconds of a call then say is when it returned.
    """

    device: torch.device
    waits: bool = True
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def now(self) -> float:
        """The clock, when all that the device was given is done."""
        if self.waits:
            wait_for(self.device)
        return time.perf_counter()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed under ``name``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            result = function(*args, **kwargs)
            self.seconds[name] += self.now() - began
            return result

        return timed


class Watched:
    """An object of which some methods are timed."""

    def __init__(self, inner: Any, watch: Stopwatch, names: Mapping[str, str]) -> None:
        self._inner = inner
        self._watch = watch
        self._names = names

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self._watch.around(self._names[name], found) if name in self._names else found


class Rate:
    """Images a second after the first batch, in which workers start.

    The device is waited for at the first batch and at the end alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._images = 0
        self._began: float | None = None

    def add(self, images: int) -> None:
        """Note a batch whose work is given to the device."""
        if self._began is None:
            wait_for(self._device)
            self._began = time.perf_counter()
            return
        self._images += images

    def value(self) -> float:
        """Until now; not a number where there was one batch at most."""
        wait_for(self._device)
        if self._began is None or self._images == 0:
            return float("nan")
        return self._images / (time.perf_counter() - self._began)


def wait_for(device: torch.device) -> None:
    """Until all that ``device`` was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
