"""What a blend of two models says: its table for a terminal, and its picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from captune.evaluation.intervals import METRICS
from captune.report.plots import DIRECTIONS, GREEN, open_axes


@dataclass(frozen=True)
class Blend:
    """Two models, the models between them, and the best of all; ``told`` is ``blend.json``."""

    folder: Path
    told: Mapping[str, Any]

    @property
    def picture(self) -> Path:
        """The picture's file."""
        return self.folder / "blend.png"

    def to_text(self) -> str:
        """The table for a terminal."""
        return blend_text(self.told)

    def figure(self) -> Figure:
        """rsum with its interval, and Recall@1 both ways, over alpha."""
        return blend_figure(self.told)


def _subject(told: Mapping[str, Any]) -> str:
    return (
        f"{told['data']} {told['split']}: {told['images']:,} images, {told['captions']:,} captions"
    )


def blend_text(told: Mapping[str, Any]) -> str:
    """The six recalls and rsum of each alpha, and what the best gains over both ends."""
    first, second = (model["model"] for model in told["models"])
    best = told["best"]
    lines = [
        f"{_subject(told)} (percent)",
        f"alpha 0 is {first}, alpha 1 is {second}",
        f"{'':8}{'image→text':>21}{'text→image':>21}",
        f"{'alpha':>8}{''.join(f'{key:>7}' for _, key in METRICS)}{'rsum':>8}  95 %",
    ]
    for row in told["rows"]:
        mark = "*" if row["alpha"] == best["alpha"] else ""
        recalls = "".join(f"{row[direction][key]:7.1f}" for direction, key in METRICS)
        low, high = row["intervals"]["rsum"]
        share = f"{mark}{row['alpha']:.3g}"
        lines.append(f"{share:>8}{recalls}{row['rsum']:8.1f}  [{low:.1f}, {high:.1f}]")
    lines.append(f"\n* best: rsum {best['rsum']:.1f}; by a paired bootstrap over images, 95 %")
    for name, key in ((first, "less_first"), (second, "less_second")):
        found = best[key]["rsum"]
        sure = "" if found["low"] > 0 or found["high"] < 0 else " within noise"
        lines.append(
            f"  {found['value']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}]{sure}, "
            f"against {name}"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in told["notes"])])


def blend_figure(told: Mapping[str, Any]) -> Figure:
    """Two panels over alpha: rsum with its 95 % interval, and Recall@1 both ways."""
    rows, best = told["rows"], told["best"]
    alphas = [row["alpha"] for row in rows]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    rsum, recall = figure.subplots(1, 2)
    values = [row["rsum"] for row in rows]
    low, high = zip(*(row["intervals"]["rsum"] for row in rows), strict=True)
    rsum.fill_between(alphas, low, high, color=GREEN, alpha=0.15, lw=0, label="95 % interval")
    rsum.plot(alphas, values, "o-", color=GREEN, label="rsum")
    rsum.set_title("rsum, percent", fontsize=9)
    for direction, color, label in DIRECTIONS:
        found = [row[direction]["R@1"] for row in rows]
        recall.plot(alphas, found, "o-", color=color, label=f"{label} R@1")
    recall.set_title("Recall@1, percent", fontsize=9)
    for axes in (rsum, recall):
        _mark_best(axes, best["alpha"])
        axes.set_xlabel("alpha: the share of the second model")
        axes.legend(fontsize=8, frameon=False)
        open_axes(axes)
    first, second = (model["model"] for model in told["models"])
    figure.suptitle(f"{_subject(told)}\n0: {first}    1: {second}", fontsize=10, parse_math=False)
    return figure


def _mark_best(axes: Axes, alpha: float) -> None:
    """A line at the alpha that was chosen."""
    axes.axvline(alpha, color="0.7", lw=1, ls=":", label=f"best, alpha {alpha:.3g}")
