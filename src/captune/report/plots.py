"""Figures: samples, training curves, recall, answers to queries, zero-shot bars, heat maps.

Each returns a Figure.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

from captune.data.pixels import load_image
from captune.evaluation.explain import HeatMap
from captune.evaluation.retrieval import Hit
from captune.evaluation.zeroshot import Prediction
from captune.files import replacing
from captune.metrics import RECALL_AT

BLUE, ORANGE, GREEN, RED, GREY = "#2563a8", "#d97706", "#1a7f37", "#b42318", "#8a8f98"
THUMBNAIL = 192
DIRECTIONS = (("image_to_text", BLUE, "image→text"), ("text_to_image", ORANGE, "text→image"))


@dataclass(frozen=True)
class QueryAnswer:
    """A query and its best pictures; ``right`` says which truly match (None: unknown).

    ``note`` is a word on the query, such as how many pictures of the gallery match.
    """

    query: str
    hits: Sequence[Hit]
    right: Sequence[bool | None] | None = None
    note: str = ""


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def training_curves(history: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """Loss on train and validation, and Recall@1 and @5 on validation, over epochs."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    loss, recall = figure.subplots(1, 2)
    loss.plot(epochs, [r["train_loss"] for r in history], "o-", color=BLUE, label="train")
    loss.plot(epochs, [r["val_loss"] for r in history], "o-", color=ORANGE, label="validation")
    loss.set_title("loss (validation: other batches, so compare the shape)", fontsize=9)
    for direction, color, label in DIRECTIONS:
        for k, style in (("R@1", "o-"), ("R@5", "o--")):
            values = [row[direction][k] for row in history]
            recall.plot(epochs, values, style, color=color, label=f"{label} {k}")
    recall.set_title("Recall on validation, percent", fontsize=9)
    recall.set_ylim(bottom=0)
    for axes in (loss, recall):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _mark_stages(axes, history)
        # Long enough to tell dashes from a line.
        axes.legend(fontsize=8, frameon=False, handlelength=3.5)
        open_axes(axes)
    # A config may differ from its recipe in many values: the line would leave the picture.
    figure.suptitle(textwrap.fill(title, 110), fontsize=10, parse_math=False)
    return figure


def _mark_stages(axes: Axes, history: Sequence[dict[str, Any]]) -> None:
    """A line where stage 1, the head on kept features, ends and stage 2 begins."""
    head = [row["epoch"] for row in history if row.get("stage") == 1]
    if head and len(head) < len(history):
        axes.axvline(head[-1] + 0.5, color="0.7", lw=1, ls=":")
        place = axes.get_xaxis_transform()
        axes.text(head[-1] + 0.5, 0.02, " stage 2", transform=place, fontsize=7)


def retrieval_sheet(answers: Sequence[QueryAnswer], title: str = "") -> Figure:
    """A row of pictures for each query, best first, with their cosine similarities."""
    columns = max(1, max((len(answer.hits) for answer in answers), default=1))
    rows = max(1, len(answers))
    figure = Figure(figsize=(1.75 * columns, 2.25 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    for band, answer in zip(figure.subfigures(rows, 1, squeeze=False)[:, 0], answers, strict=False):
        _row_of_hits(band, answer, f"“{_short(answer.query, 24 * columns)}”", columns)
    return figure


def before_and_after(before: QueryAnswer, after: QueryAnswer) -> Figure:
    """One query's best pictures in two rows: as it was before training, and after."""
    columns = max(1, len(before.hits), len(after.hits))
    figure = Figure(figsize=(1.75 * columns, 4.7), layout="constrained")
    note = f" ({after.note})" if after.note else ""
    title = f"“{_short(after.query, 24 * columns)}”{note}"
    figure.suptitle(title, fontsize=12, parse_math=False)
    bands = figure.subfigures(2, 1, squeeze=False)[:, 0]
    _row_of_hits(bands[0], before, "before training", columns)
    _row_of_hits(bands[1], after, "after training", columns)
    return figure


def _row_of_hits(band: FigureBase, answer: QueryAnswer, heading: str, columns: int) -> None:
    """Pictures side by side below a heading, best first, with score and mark."""
    band.suptitle(heading, fontsize=10, x=0.01, ha="left", parse_math=False)
    for place, axes in enumerate(band.subplots(1, columns, squeeze=False)[0]):
        axes.axis("off")
        if place < len(answer.hits):
            _picture(axes, answer.hits[place].image)
            right = answer.right[place] if answer.right else None
            mark, color = {None: ("", "black"), True: ("✓ ", GREEN), False: ("✗ ", RED)}[right]
            score = f"{mark}{answer.hits[place].score:.2f}"
            axes.set_title(score, fontsize=8, color=color, pad=2)


def zero_shot_bars(
    predictions: Sequence[Prediction], truths: Sequence[str | None] = (), title: str = ""
) -> Figure:
    """Each image beside the probabilities of its five likeliest labels; the true one is green."""
    rows = max(1, len(predictions))
    figure = Figure(figsize=(7.5, 1.9 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    grid = figure.subplots(rows, 2, squeeze=False, width_ratios=[1, 2.6])
    for place, (row, prediction) in enumerate(zip(grid, predictions, strict=False)):
        row[0].axis("off")
        _picture(row[0], prediction.image)
        likeliest = sorted(prediction.probabilities.items(), key=lambda pair: -pair[1])[:5]
        labels = [_short(label, 28) for label, _ in likeliest]
        values = [100 * value for _, value in likeliest]
        truth = truths[place] if truths else None
        colors = [GREEN if label == truth else GREY if truth else BLUE for label, _ in likeliest]
        bars = row[1].barh(range(len(labels)), values, color=colors)
        row[1].bar_label(bars, fmt="%.0f %%", fontsize=8, padding=3)
        row[1].set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
        row[1].invert_yaxis()
        row[1].set_xlim(0, 112)
        row[1].set_xticks([])
        open_axes(row[1])
    return figure


def sample_sheet(samples: Sequence[tuple[str, str]], title: str = "", columns: int = 4) -> Figure:
    """Pictures, given by path, each with its caption below."""
    rows = max(1, -(-len(samples) // columns))
    figure = Figure(figsize=(2.5 * columns, 3.0 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if place < len(samples):
            path, caption = samples[place]
            _picture(axes, path)
            words = textwrap.fill(caption, 30, max_lines=3, placeholder=" …")
            axes.set_title(words, fontsize=9, y=-0.04, va="top", parse_math=False)
    return figure


def recall_bars(
    metrics: Mapping[str, Any], chance: Mapping[str, Any] | None = None, title: str = ""
) -> Figure:
    """Recall@1, @5 and @10 in percent, both directions; a dash marks what chance gives.

    Args:
        metrics, chance: ``image_to_text`` and ``text_to_image`` with ``R@1``, ``R@5``, ``R@10``.
        title: of the figure.
    """
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    axes = figure.subplots()
    keys = [f"R@{k}" for k in RECALL_AT]
    width = 0.38
    for shift, (direction, color, label) in zip((-0.5, 0.5), DIRECTIONS, strict=True):
        places = [place + shift * width for place in range(len(keys))]
        values = [metrics[direction][key] for key in keys]
        bars = axes.bar(places, values, 0.92 * width, color=color, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=9, padding=2)
        if chance is not None:
            floor = [chance[direction][key] for key in keys]
            name = "chance" if shift > 0 else None
            axes.plot(places, floor, "_", color="black", markersize=24, label=name)
    axes.set_xticks(range(len(keys)), keys)
    axes.set_ylabel("percent found")
    # Room for the numbers above the bars, and for the legend above those.
    top = max(metrics[direction][key] for direction, _, _ in DIRECTIONS for key in keys)
    axes.set_ylim(0, 1.25 * max(top, 1))
    axes.legend(fontsize=9, frameon=False, loc="upper left", ncols=3)
    open_axes(axes)
    return figure


def heat_maps(rows: Sequence[Sequence[HeatMap]], title: str = "") -> Figure:
    """A row for each picture: as the model sees it, then each query with its heat and score.

    A row has one scale: a query that finds less support than its neighbours is paler.
    """
    columns = 1 + max((len(row) for row in rows), default=0)
    figure = Figure(figsize=(2.3 * columns, 2.6 * max(1, len(rows)) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    grid = figure.subplots(max(1, len(rows)), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for line, row in zip(grid, rows, strict=False):
        strongest = max((heat.strength for heat in row), default=0) or 1
        for axes, heat in zip(line[1:], row, strict=False):
            line[0].imshow(heat.picture)
            axes.imshow(heat.picture)
            # What is cold stays the picture: opacity follows the heat.
            values = heat.values * heat.strength / strongest
            axes.imshow(values, cmap="inferno", vmin=0, vmax=1, alpha=0.75 * values)
            words = textwrap.shorten(heat.query, 26, placeholder=" …")
            axes.set_title(f"“{words}” {heat.score:.2f}", fontsize=9, pad=3, parse_math=False)
    return figure


def _picture(axes: Axes, path: str) -> None:
    image = load_image(path, least_side=THUMBNAIL // 2)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    axes.imshow(image)


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def open_axes(axes: Axes) -> None:
    """Take the frame's top and right side away."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
