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
    """Adds up the seconds of named calls; the device is waited for before and after each."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def now(self) -> float:
        """The clock, when all that the device was given is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
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
    """Images a second after the first batch, in which workers start."""

    def __init__(self) -> None:
        self.value = float("nan")
        self._images = 0
        self._began: float | None = None

    def add(self, images: int) -> None:
        """Note a batch that is there now."""
        now = time.perf_counter()
        if self._began is None:
            self._began = now
            return
        self._images += images
        self.value = self._images / (now - self._began)
