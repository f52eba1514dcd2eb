"""Showing things in a notebook, and in words outside one."""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

from matplotlib.figure import Figure

from captune.console import logger
from captune.data.pixels import UnreadableImageError
from captune.errors import CaptuneError
from captune.training.stop import TrainingStopped

DPI = 160  # of the picture, for sharp screens
SHOWN_DPI = 88  # at which it is shown
CELL = "text-align:left;padding:3px 18px 3px 0;vertical-align:top"

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


class NotebookError(CaptuneError):
    """What a user can mend, shown below a cell as its one line and without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks an exception for this
        return [f"captune: {self}"]


def plainly(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Have ``function`` raise :class:`NotebookError` for what the user can mend."""

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        with _one_line():
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except TrainingStopped as stopped:
        raise NotebookError(
            f"stopped, and all is kept in {stopped.run.folder}: run this cell again to go on"
        ) from None
    except UnreadableImageError as error:
        raise NotebookError(f"cannot read the image {error}") from None
    except CaptuneError as error:
        raise NotebookError(str(error)) from None


def inside_ipython() -> bool:
    """Whether there is an IPython to show pictures and tables in; IPython is not imported."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def show_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[object]], note: str = ""
) -> None:
    """A titled table with a line below it."""
    words = [[str(cell) for cell in row] for row in rows]
    show_html(_as_html(title, header, words, note), _as_text(title, header, words, note))


def show_html(page: str, text: str) -> None:
    """``page`` below the cell, or ``text`` where no HTML can be shown."""
    if not inside_ipython():
        print(text)
        return
    from IPython.display import display

    display({"text/html": page, "text/plain": text}, raw=True)  # type: ignore[no-untyped-call]


def show_figure(figure: Figure) -> None:
    """A figure below the cell; outside IPython its title is printed."""
    if not inside_ipython():
        print(f"[figure] {figure.get_suptitle()}")
        return
    from IPython.display import display

    data, metadata = _png(figure)
    display(data, raw=True, metadata=metadata)  # type: ignore[no-untyped-call]


class LiveFigure:
    """A place below the cell whose figure can be exchanged; outside IPython nothing is shown.

    Args:
        waiting: what stands there until the first figure comes.
    """

    def __init__(self, waiting: str) -> None:
        self._handle: Any = None
        if inside_ipython():
            from IPython.display import display

            bundle = {"text/plain": waiting}
            self._handle = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]

    def update(self, figure: Figure) -> None:
        """Show ``figure`` in place of what stands there."""
        if self._handle is not None:
            data, metadata = _png(figure)
            self._handle.update(data, raw=True, metadata=metadata)


@contextlib.contextmanager
def brief() -> Iterator[None]:
    """Many trainings speak: only their latest words stand below the cell, and errors as one line.

    Raises:
        NotebookError: in place of what the user can mend.
    """
    with _one_line():
        if not inside_ipython():
            yield
            return
        from IPython.display import display

        place: Any = display({"text/plain": ""}, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        before = logger.handlers[:]
        logger.handlers[:] = [_Latest(place)]
        try:
            yield
        finally:
            logger.handlers[:] = before
            place.update({"text/plain": ""}, raw=True)


class _Latest(logging.Handler):
    """Shows each line in the place of the one before it."""

    def __init__(self, place: Any) -> None:
        super().__init__()
        self._place = place

    def emit(self, record: logging.LogRecord) -> None:
        self._place.update({"text/plain": self.format(record)}, raw=True)


def _png(figure: Figure) -> tuple[dict[str, str], dict[str, Any]]:
    """The MIME bundle of a figure and its metadata: more pixels than it is wide on the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    width, height = (round(float(side) * SHOWN_DPI) for side in figure.get_size_inches())
    picture = base64.b64encode(buffer.getvalue()).decode("ascii")
    bundle = {"image/png": picture, "text/plain": f"[figure] {figure.get_suptitle()}"}
    return bundle, {"image/png": {"width": width, "height": height}}


def _as_text(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([title, *lines, *([note] if note else [])])


def _as_html(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    """Without colours of its own, so that it can be read in light and dark themes."""

    def line(cells: Sequence[str], tag: str) -> str:
        inner = "".join(f'<{tag} style="{CELL}">{html.escape(cell)}</{tag}>' for cell in cells)
        return f"<tr>{inner}</tr>"

    body = "".join(line(row, "td") for row in rows)
    below = f'<div style="margin-top:4px">{html.escape(note)}</div>' if note else ""
    return (
        f'<div style="margin:6px 0 10px"><b>{html.escape(title)}</b>'
        f'<table style="margin:4px 0;border-collapse:collapse">'
        f"<thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>{below}</div>"
    )
