"""The picture and the page of a zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from captune.evaluation.retrieval import Hit
from captune.files import write_text
from captune.report.html import templates
from captune.report.plots import save_figure

NUMBERED = 16  # up to so many classes the cells of the matrix carry numbers
LEGIBLE = 100  # of more classes the matrix shows those that are confused most
SHOWN = 40


@dataclass(frozen=True)
class Confusion:
    """Images of one class that were called another, and some of them."""

    true: str
    called: str
    images: int
    hits: Sequence[Hit]


@dataclass(frozen=True)
class ClassPage:
    """What the page tells: ``metrics`` as :func:`captune.workflow.zeroshot.zero_shot` gives it."""

    path: Path
    picture: Path
    subject: str
    metrics: dict[str, Any]
    confusions: Sequence[Confusion]


@dataclass(frozen=True)
class Line:
    """A row of the table of accuracies."""

    name: str
    top1: float
    top5: float
    intervals: dict[str, Any] | None
    note: str = ""


def accuracy_lines(metrics: dict[str, Any]) -> list[Line]:
    """Zero-shot and its baselines, as the page and the command line show them."""
    baselines = metrics["baselines"]
    rows = [
        ("zero-shot", metrics["zero_shot"], ""),
        ("chance", baselines["chance"], ""),
        (
            f"majority ({baselines['majority']['class']})",
            baselines["majority"],
            f"commonest in {baselines['majority']['learnt_from']}",
        ),
    ]
    probe = baselines.get("linear_probe", {})
    if "top1" in probe:
        words = f"{probe['backbone']}, frozen; learnt from {probe['learnt_from']}"
        rows.append(("linear probe", probe, f"{words}: {probe['images']:,} images"))
    return [
        Line(name, row["top1"], row["top5"], row.get("intervals"), note) for name, row, note in rows
    ]


def confusion_figure(metrics: dict[str, Any]) -> Figure:
    """True classes in rows, called ones in columns, in percent of a row's images; of many classes
    those with the most errors."""
    counts = np.zeros((len(metrics["per_class"]),) * 2)
    for true, called, images in metrics["confusion"]:
        counts[true, called] = images
    names = [row["class"] for row in metrics["per_class"]]
    columns = _columns(counts)
    rows = [place for place in columns if counts[place].sum()]
    shares = 100 * counts[np.ix_(rows, columns)] / counts[rows].sum(axis=1, keepdims=True)
    side = 3.5 + 0.24 * len(columns)
    height = 1.5 + side * len(rows) / len(columns)
    figure = Figure(figsize=(side + 1, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    size = 9 if len(columns) <= NUMBERED else 7
    words: dict[str, Any] = {"fontsize": size, "parse_math": False}
    axes.set_xticks(range(len(columns)), [names[c] for c in columns], rotation=90, **words)
    axes.set_yticks(range(len(rows)), [names[r] for r in rows], **words)
    axes.set_xlabel("called")
    axes.set_ylabel("true class")
    if len(columns) <= NUMBERED:
        for (row, column), share in np.ndenumerate(shares):
            color = "white" if share > 55 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", size=8, color=color)
    figure.colorbar(image, ax=axes, shrink=0.6, label="percent of the class's images")
    title = f"{metrics['data']} {metrics['split']}: {metrics['images']:,} images"
    if len(columns) < len(names):
        title += f", the {len(columns)} classes of {len(names)} with the most errors"
    axes.set_title(title, fontsize=10, parse_math=False)
    return figure


def _columns(counts: npt.NDArray[np.float64]) -> list[int]:
    """The classes that the matrix shows, in their own order."""
    if len(counts) <= LEGIBLE:
        return list(range(len(counts)))
    wrong = counts - np.diag(np.diag(counts))
    errors = wrong.sum(axis=0) + wrong.sum(axis=1)
    return sorted(np.argsort(-errors, kind="stable")[:SHOWN].tolist())


def write_class_page(page: ClassPage) -> None:
    """Write the confusion matrix and the page, atomically."""
    save_figure(confusion_figure(page.metrics), page.picture)
    ordered = sorted(
        (row for row in page.metrics["per_class"] if row["images"]),
        key=lambda row: (row["recall"], row["class"]),
    )
    text = (
        templates()
        .get_template("classes.html.j2")
        .render(
            page=page, metrics=page.metrics, lines=accuracy_lines(page.metrics), classes=ordered
        )
    )
    write_text(page.path, text)
