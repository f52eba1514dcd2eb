"""Words to the user go to stderr through the logger ``captune``; stdout is for results."""

from __future__ import annotations

import logging
import os
import sys

# Of several processes of a job only the first one speaks: its words are true of all.
SPEAKS = int(os.environ.get("WORLD_SIZE") or 1) == 1 or os.environ.get("RANK") == "0"
if not SPEAKS:
    os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is imported, which reads it then
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class _StderrHandler(logging.Handler):
    """Writes whole lines to the stderr of the moment (notebooks and tests replace it)."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr
        print(self.format(record), file=stream, flush=True)


logger = logging.getLogger("captune")
if not logger.handlers:
    logger.addHandler(_StderrHandler())
    logger.setLevel(logging.INFO if SPEAKS else logging.ERROR)
    logger.propagate = False


def say(message: str) -> None:
    """One line for the user, on stderr."""
    logger.info(message)


def some(names: list[str], limit: int = 3) -> str:
    """``a.jpg, b.jpg, c.jpg and 4 more``."""
    shown = ", ".join(names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
