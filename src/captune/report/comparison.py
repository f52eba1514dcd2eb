"""A comparison of variants over seeds: its numbers, its picture and its page."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from captune import __version__
from captune.evaluation.intervals import METRICS, RESAMPLES, Interval
from captune.evaluation.variants import Difference, Variant
from captune.files import write_json, write_text
from captune.report.html import templates
from captune.report.plots import BLUE, GREEN, GREY, ORANGE, RED, open_axes, save_figure

VERSION = 1
COLORS = (BLUE, ORANGE, GREEN, RED, "#7c3aed", "#0e7490", "#a16207", "#be185d")
NAMES = tuple(
    f"{'I→T' if direction == 'image_to_text' else 'T→I'} {key}" for direction, key in METRICS
)


@dataclass(frozen=True)
class Comparison:
    """Variants of one configuration, the first being the base. Shows itself in a notebook."""

    folder: Path
    config: str
    variants: tuple[Variant, ...]

    @cached_property
    def differences(self) -> list[Difference | None]:
        """Each variant's difference to the first; None for the first."""
        base, *others = self.variants
        return [None, *(Difference.between(variant, base) for variant in others)]

    @property
    def seeds(self) -> list[int]:
        """The seeds of each variant."""
        return [run.seed for run in self.variants[0].runs]

    @property
    def subject(self) -> str:
        """``flickr8k val: 1,000 images, 5,000 captions``."""
        metrics = self.variants[0].runs[0].metrics
        return (
            f"{metrics['data']} {metrics['split']}: {metrics['images']:,} images, "
            f"{metrics['captions']:,} captions"
        )

    @property
    def notes(self) -> list[str]:
        """What the reader must know about the data measured on, as the runs say it."""
        return list(
            dict.fromkeys(n for v in self.variants for r in v.runs for n in r.metrics["notes"])
        )

    @property
    def page(self) -> Path:
        """The page's file."""
        return self.folder / "comparison.html"

    @property
    def picture(self) -> Path:
        """The picture's file."""
        return self.folder / "comparison.png"

    def to_dict(self) -> dict[str, Any]:
        """A JSON object: everything but the single hits and the histories."""
        keys = [*(f"{direction}/{key}" for direction, key in METRICS), "rsum"]
        rows = []
        for variant, difference in zip(self.variants, self.differences, strict=True):
            row: dict[str, Any] = {
                "name": variant.name,
                "values": dict(variant.values),
                "runs": [
                    {"folder": run.folder.name, "seed": run.seed}
                    | dict(zip(keys, run.values, strict=True))
                    for run in variant.runs
                ],
                "mean": _json(keys, variant.means),
            }
            if difference is not None:
                row["difference"] = _json(keys, difference.images)
                row["difference_over_seeds"] = _json(["rsum"], [difference.seeds])
                row["verdict"] = difference.verdict
            rows.append(row)
        metrics = self.variants[0].runs[0].metrics
        return {
            "format_version": VERSION,
            "config": self.config,
            "data": metrics["data"],
            "split": metrics["split"],
            "split_digest": metrics["split_digest"],
            "seeds": self.seeds,
            "notes": self.notes,
            "variants": rows,
            "versions": dict(_facts()),
        }

    def to_text(self) -> str:
        """The table for a terminal."""
        return comparison_text(self)

    def figure(self) -> Figure:
        """rsum of every run with the means; the differences; validation over epochs."""
        return comparison_figure(self)

    def _repr_html_(self) -> str:
        return render(self, "comparison_table.html.j2")


def _json(keys: Sequence[str], intervals: Sequence[Interval]) -> dict[str, Any]:
    """Intervals by name; JSON knows no NaN, so a missing interval is null."""
    return {
        key: {name: (None if v != v else v) for name, v in interval.to_dict().items()}
        for key, interval in zip(keys, intervals, strict=True)
    }


def _facts() -> list[tuple[str, str]]:
    return [
        ("captune", __version__),
        ("torch", torch.__version__),
        ("Python", platform.python_version()),
        ("machine", f"{platform.machine()}, {'CUDA' if torch.cuda.is_available() else 'CPU'}"),
    ]


def write_comparison(comparison: Comparison) -> None:
    """Write ``comparison.json``, ``.png`` and ``.html`` into the comparison's folder."""
    write_json(comparison.folder / "comparison.json", comparison.to_dict())
    save_figure(comparison.figure(), comparison.picture)
    write_text(comparison.page, render(comparison, "comparison.html.j2"))


def render(comparison: Comparison, template: str) -> str:
    """The page, or the table alone as a notebook shows it."""
    return (
        templates()
        .get_template(template)
        .render(
            comparison=comparison,
            names=[*NAMES, "rsum"],
            rows=list(zip(comparison.variants, comparison.differences, strict=True)),
            resamples=RESAMPLES,
            facts=_facts(),
        )
    )


def comparison_text(comparison: Comparison) -> str:
    """R@1 both ways and rsum of each variant, and how it differs from the first."""
    width = max(10, *(len(variant.name) for variant in comparison.variants))
    seeds = len(comparison.seeds)
    over = f", mean ± 95 % interval over {seeds} seeds" if seeds > 1 else ", one seed"
    first = comparison.variants[0].name
    lines = [
        f"{comparison.subject} (percent{over})",
        f"{'':{width}}{'I→T R@1':>14}{'T→I R@1':>14}{'rsum':>16}  rsum less {first}'s (95 %)",
    ]
    for variant, found in zip(comparison.variants, comparison.differences, strict=True):
        shown = [_mean_text(variant.means[place]) for place in (0, 3, 6)]
        line = f"{variant.name:{width}}{shown[0]:>14}{shown[1]:>14}{shown[2]:>16}"
        if found is not None:
            rsum = found.images[-1]
            line += f"  {rsum.value:+.1f} [{rsum.low:+.1f}, {rsum.high:+.1f}] {found.verdict}"
        lines.append(line)
    lines += [f"note: {note}" for note in comparison.notes]
    return "\n".join(lines)


def _mean_text(mean: Interval) -> str:
    return f"{mean.value:.1f}" + (
        f" ± {mean.high - mean.value:.1f}" if mean.low == mean.low else ""
    )


# -- the picture --------------------------------------------------------------------------------
def comparison_figure(comparison: Comparison) -> Figure:
    """Three panels: rsum by variant, difference to the first, validation rsum over epochs."""
    height = 2.2 + 0.45 * len(comparison.variants)
    figure = Figure(figsize=(13, max(3.6, height)), layout="constrained")
    rsum, difference, epochs = figure.subplots(1, 3, width_ratios=[1, 1, 1.1])
    _draw_rsum(rsum, comparison)
    _draw_differences(difference, comparison)
    _draw_epochs(epochs, comparison)
    figure.suptitle(
        f"{comparison.subject} · seeds {', '.join(map(str, comparison.seeds))}",
        fontsize=10,
        parse_math=False,
    )
    return figure


def _color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def _draw_rsum(axes: Axes, comparison: Comparison) -> None:
    for place, variant in enumerate(comparison.variants):
        mean = variant.means[-1]
        values = [run.values[-1] for run in variant.runs]
        axes.plot(values, [place] * len(values), "o", color=_color(place), alpha=0.45, ms=6)
        axes.plot([mean.value], [place], "|", color=_color(place), ms=22, mew=2.5)
        if mean.low == mean.low:
            axes.plot([mean.low, mean.high], [place, place], "-", color=_color(place), lw=1.5)
    axes.set_title("rsum: each run, mean and 95 % interval over seeds", fontsize=9)
    _name_rows(axes, comparison)


def _draw_differences(axes: Axes, comparison: Comparison) -> None:
    axes.axvline(0, color=GREY, lw=1)
    for place, found in enumerate(comparison.differences):
        if found is None:
            axes.annotate("the base", (0, place), (6, 0), textcoords="offset points", va="center")
            continue
        rsum = found.images[-1]
        axes.plot([rsum.low, rsum.high], [place, place], "-", color=_color(place), lw=2.5)
        axes.plot([rsum.value], [place], "o", color=_color(place), ms=6)
    axes.set_title("rsum less the first row's: paired bootstrap over images", fontsize=9)
    _name_rows(axes, comparison)
    axes.set_yticklabels([])


def _draw_epochs(axes: Axes, comparison: Comparison) -> None:
    for place, variant in enumerate(comparison.variants):
        for number, run in enumerate(variant.runs):
            axes.plot(
                [row["epoch"] for row in run.history],
                [row["rsum"] for row in run.history],
                "o-",
                color=_color(place),
                alpha=0.7,
                lw=1.2,
                ms=3,
                label=variant.name if number == 0 else None,
            )
    axes.set_title("rsum on the validation split, over epochs", fontsize=9)
    axes.set_xlabel("epoch")
    last = max(len(run.history) for variant in comparison.variants for run in variant.runs)
    axes.set_xlim(0.8, last + 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(fontsize=8, frameon=False)
    open_axes(axes)


def _name_rows(axes: Axes, comparison: Comparison) -> None:
    names = [variant.name.replace("+", "\n+ ") for variant in comparison.variants]
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    open_axes(axes)
