"""Words to the user go to stderr through the logger ``captune``; stdout is for results."""

from __future__ import annotations

import logging
import sys


class _StderrHandler(logging.Handler):
    """Writes whole lines to the stderr of the moment (notebooks and tests replace it)."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr
        print(self.format(record), file=stream, flush=True)


logger = logging.getLogger("captune")
if not logger.handlers:
    logger.addHandler(_StderrHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False


def say(message: str) -> None:
    """One line for the user, on stderr."""
    logger.info(message)


def some(names: list[str], limit: int = 3) -> str:
    """``a.jpg, b.jpg, c.jpg and 4 more``."""
    shown = ", ".join(names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
