"""A metrics object as the table of a paper: Markdown or LaTeX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from captune.metrics import RECALL_AT

DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}
RECALLS = [f"R@{k}" for k in RECALL_AT]
COLUMNS = [*RECALLS, "median_rank", "mean_rank", "MRR", "mAP@R"]


def as_markdown(metrics: Mapping[str, Any]) -> str:
    """A table of both directions with 95 % intervals, and a line that says what was measured."""
    rows = [["", *(_words(key) for key in COLUMNS)], ["---"] * (len(COLUMNS) + 1)]
    rows += [[name, *cells] for name, cells in _cells(metrics, "[{:.1f}, {:.1f}]")]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", caption_of(metrics)])


def as_latex(metrics: Mapping[str, Any]) -> str:
    """The same as a LaTeX table with its caption; it needs the package booktabs."""
    head = " & ".join(["", *(_words(key) for key in COLUMNS)])
    body = [
        " & ".join([name, *cells]) + r" \\"
        for name, cells in _cells(metrics, r"{{\scriptsize[{:.1f}, {:.1f}]}}")
    ]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{l{'r' * len(COLUMNS)}}}",
            r"\toprule",
            head + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{_escaped(caption_of(metrics))}}}",
            r"\end{table}",
        ]
    )


def caption_of(metrics: Mapping[str, Any]) -> str:
    """In one sentence or two, what a reader must know to compare."""
    low, high = metrics["intervals"]["rsum"]
    protocol = metrics["protocol"]
    said = [
        f"{metrics['model']} on {metrics['data']} {metrics['split']}, protocol {protocol['name']} "
        f"({protocol['words']}): {metrics['images']:,} images, {metrics['captions']:,} captions. "
        f"rsum {metrics['rsum']:.1f} [{low:.1f}, {high:.1f}]. Percent but for ranks; 95 % "
        f"intervals bootstrapped over images; {protocol['ties']}."
    ]
    return " ".join([*said, *(f"{note[0].upper()}{note[1:]}." for note in metrics["notes"])])


def _cells(metrics: Mapping[str, Any], interval: str) -> list[tuple[str, list[str]]]:
    rows = []
    for direction, name in DIRECTIONS.items():
        intervals = metrics["intervals"][direction]
        cells = []
        for key in COLUMNS:
            value = metrics[direction][key]
            text = f"{value:g}" if key == "median_rank" else f"{value:.1f}"
            bounds = intervals.get(key)
            cells.append(f"{text} {interval.format(*bounds)}" if bounds else text)
        rows.append((name, cells))
    return rows


def _words(key: str) -> str:
    return key.replace("_", " ")


def _escaped(text: str) -> str:
    """LaTeX's own characters as they are meant."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)
