"""The confusion matrix: rows that sum to all of a class, and few enough to read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from captune.report.classes import SHOWN, accuracy_lines, confusion_figure


def metrics(confusion: Any) -> dict[str, Any]:
    counts = np.array(confusion)
    return {
        "data": "pets",
        "split": "test",
        "images": int(counts.sum()),
        "confusion": [[a, b, int(counts[a, b])] for a, b in np.argwhere(counts).tolist()],
        "per_class": [
            {"class": f"class {place}", "images": int(row.sum())}
            for place, row in enumerate(counts)
        ],
    }


def test_cells_are_percent_of_the_row_and_empty_classes_have_none() -> None:
    figure = confusion_figure(metrics([[3, 1, 0], [0, 0, 0], [0, 0, 8]]))
    axes = figure.axes[0]
    shown = axes.images[0].get_array()
    assert shown.tolist() == [[75, 25, 0], [0, 0, 100]]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["class 0", "class 2"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["class 0", "class 1", "class 2"]
    assert [t.get_text() for t in axes.texts] == ["75", "25", "0", "0", "0", "100"]


def test_of_many_classes_those_with_the_most_errors_are_shown() -> None:
    counts = 9 * np.eye(200, dtype=int)
    counts[150, 7] = 5
    figure = confusion_figure(metrics(counts))
    axes = figure.axes[0]
    names = [t.get_text() for t in axes.get_xticklabels()]
    assert len(names) == SHOWN and {"class 7", "class 150"} <= set(names)
    assert f"the {SHOWN} classes of 200 with the most errors" in axes.get_title()
    row = [t.get_text() for t in axes.get_yticklabels()].index("class 150")
    share = axes.images[0].get_array()[row, names.index("class 7")]
    assert share == pytest.approx(100 * 5 / 14)


def test_a_probe_that_was_left_out_has_no_line() -> None:
    figures = {"top1": 1.0, "top5": 2.0}
    stated = {
        "zero_shot": figures,
        "baselines": {
            "chance": figures,
            "majority": {**figures, "class": "cat", "learnt_from": "these images"},
            "linear_probe": {"left_out": "no network"},
        },
    }
    assert [line.name for line in accuracy_lines(stated)] == [
        "zero-shot",
        "chance",
        "majority (cat)",
    ]
