"""One self-contained page: pictures are inside it, it opens offline and loads nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from captune.data.pixels import load_image
from captune.evaluation.analysis import Group
from captune.files import write_text
from captune.report.plots import THUMBNAIL, QueryAnswer


@dataclass(frozen=True)
class ResultRow:
    """A line of the table of results: a name and a metrics object, or why there is none."""

    name: str
    metrics: dict[str, Any] | None
    note: str = ""


@dataclass(frozen=True)
class Failure:
    """A caption whose own picture was not found first."""

    answer: QueryAnswer
    own_image: str
    rank: int


@dataclass(frozen=True)
class Hub:
    """An image that ``captions`` queries have among their first ten."""

    image: str
    captions: int


@dataclass(frozen=True)
class Twins:
    """Two images whose embeddings are nearly the same."""

    one: str
    other: str
    cosine: float


@dataclass(frozen=True)
class Analysis:
    """Where retrieval is right and where it goes wrong.

    Attributes:
        easiest, hardest: captions as queries, with the pictures that answer them.
        tables: a title and the recall of each group.
        hubs: the images found most often; ``usual`` is how often an image is on average.
        shared: captions of several images with how many, the first of ``shared_count``.
        twins: the first of ``twin_count`` pairs.
    """

    easiest: Sequence[QueryAnswer]
    hardest: Sequence[Failure]
    tables: Sequence[tuple[str, Sequence[Group]]]
    hubs: Sequence[Hub]
    usual: float
    shared: Sequence[tuple[str, int]]
    shared_count: int
    twins: Sequence[Twins]
    twin_count: int


@dataclass(frozen=True)
class Report:
    """What the page tells, in its order."""

    title: str
    summary: str
    before: Sequence[QueryAnswer]
    after: Sequence[QueryAnswer]
    queries_note: str
    results: Sequence[ResultRow]
    results_note: str
    analysis: Analysis | None = None
    figures: Sequence[tuple[str, Path]] = ()
    commands: Sequence[tuple[str, str]] = ()
    facts: Sequence[tuple[str, str]] = ()
    attribution: str = ""
    notes: Sequence[str] = field(default_factory=list)


def templates() -> Environment:
    """The page templates; a name that a template misspells raises, and text is escaped."""
    environment = Environment(
        loader=PackageLoader("captune", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png"] = _png
    environment.filters["thumbnail"] = _thumbnail
    return environment


def write_report(path: Path, report: Report) -> None:
    """Render ``report`` and write it to ``path``, atomically."""
    page = (
        templates()
        .get_template("report.html.j2")
        .render(report=report, pairs=list(zip(report.before, report.after, strict=True)))
    )
    write_text(path, page)


def _thumbnail(path: str) -> str:
    """An image file as a small JPEG in a data URI."""
    image = load_image(path, least_side=THUMBNAIL // 2)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _png(path: Path) -> str:
    """A PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
