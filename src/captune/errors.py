"""The one error that a user can mend, and the words that point at the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CaptuneError(Exception):
    """Wrong input. The message says what was found, where, and what to do about it.

    The command line prints it as one line and exits with code 2.
    """


class MissingExtraError(CaptuneError):
    """An optional package is needed and not installed."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed: "
            f'pip install "captune[{extra}]"'
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'batch_size'?``, or the list of names when none is near."""
    known = sorted(known)
    ratios = {word: difflib.SequenceMatcher(None, word, name).ratio() for word in known}
    match = max(known, key=lambda word: ratios[word], default="")  # of equals the first
    near = bool(match) and ratios[match] >= 0.5
    return f"; did you mean {match!r}?" if near else f"; known: {', '.join(known)}"
