"""Ctrl-C, and a polite kill: the step at hand is finished and saved first."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from captune.console import say
from captune.processes import launched
from captune.training.run import Run


class StopRequest:
    """Ctrl-C asks for a stop after the step at hand; a second one stops at once.

    Of several processes each is told by the launcher, and once more by a terminal: there only the
    launcher ends what does not stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if launched() > 1:  # a launcher passes on what the terminal has sent already
                return
            raise KeyboardInterrupt
        self.requested = True
        once_more = "" if launched() > 1 else " (once more: at once)"
        say(f"stopping after this step{once_more}")


class TrainingStopped(Exception):
    """Ctrl-C or a polite kill: the state is saved and the run can be used and resumed."""

    def __init__(self, run: Run) -> None:
        super().__init__(f"stopped; {run.folder} can be used, and resumed with --resume")
        self.run = run
