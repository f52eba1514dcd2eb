"""Where an epoch stands: what a resumed one goes on from, and its sums while it runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from captune.errors import CaptuneError


class Verdict(NamedTuple):
    """Whether steps of one form go on compiled (:mod:`captune.training.compiling`).

    ``form``: images, side and whatever else the graph of a step depends on.
    """

    form: list[int]
    compiled: bool


@dataclass
class EpochProgress:
    """Where an epoch stands, and its sums so far: all that a resumed epoch needs to go on.

    ``step`` counts batches handed out, so it is also the position in the epoch's order.
    ``chunk_size``: what a step came down to that did not fit the memory; 0: the config's.
    ``compiled_steps``: how many were done with the backbone compiled.
    ``compiling``: for which steps that was decided by trial, and how; None: for none yet.
    ``layout``: how many processes and loader workers share a stream; empty for a table, whose
    order knows of neither.
    """

    epoch: int
    step: int = 0
    images: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    seconds: float = 0.0
    chunk_size: int = 0
    layout: str = ""
    compiled_steps: int = 0
    compiling: Verdict | None = None

    def summary(self) -> dict[str, float]:
        """Mean loss, in-batch accuracy in percent (both ways) and images a second."""
        images = max(1, self.images)
        return {
            "train_loss": self.loss_sum / images,
            "train_accuracy": 100 * self.correct / images,
            "images_per_second": self.images / max(self.seconds, 1e-9),
        }


class EpochMeter:
    """Sums of an epoch, kept on the device until somebody reads them."""

    def __init__(self, progress: EpochProgress) -> None:
        self.progress = progress
        self.last_loss = float("nan")
        self._pending: list[tuple[Tensor, Tensor, int]] = []
        self._since = time.perf_counter()

    def add(self, loss: Tensor, accuracy: Tensor, images: int) -> None:
        """Note a step without waiting for the device."""
        self._pending.append((loss, accuracy, images))

    def settle(self) -> None:
        """Bring the progress up to date; here the device is waited for."""
        now = time.perf_counter()
        for loss, accuracy, images in self._pending:
            self.last_loss = float(loss)
            if self.last_loss != self.last_loss or abs(self.last_loss) == float("inf"):
                raise CaptuneError(
                    f"the loss is {self.last_loss} in epoch {self.progress.epoch + 1}, step "
                    f"{self.progress.step}: lower learning_rate, or try precision=fp32"
                )
            self.progress.loss_sum += self.last_loss * images
            self.progress.correct += float(accuracy) * images
            self.progress.images += images
        self._pending.clear()
        self.progress.seconds += now - self._since
        self._since = now

    def read(self, rate: float) -> dict[str, str]:
        """What the progress bar shows."""
        self.settle()
        summary = self.progress.summary()
        return {
            "loss": f"{summary['train_loss']:.3f}",
            "acc": f"{summary['train_accuracy']:.1f}%",
            "lr": f"{rate:.1e}",
            "img/s": f"{summary['images_per_second']:.0f}",
        }
