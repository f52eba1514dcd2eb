"""Tables for papers: every figure with its interval, and what was measured below."""

from __future__ import annotations

import re
from typing import Any

import pytest

from captune.report.tables import as_latex, as_markdown

RECALLS = {"R@1": 12.34, "R@5": 40.06, "R@10": 55.5}
METRICS: dict[str, Any] = {
    "model": "runs/my_run",
    "data": "photos & more",
    "split": "val",
    "images": 1000,
    "captions": 5000,
    "protocol": {"name": "full", "words": "all captions", "ties": "ties count against the query"},
    "notes": ["the best epoch was chosen on 1,000 of these images"],
    "image_to_text": {**RECALLS, "median_rank": 8.5, "mean_rank": 31.2, "MRR": 22.0, "mAP@R": 9.9},
    "text_to_image": {**RECALLS, "median_rank": 9.0, "mean_rank": 41.0, "MRR": 21.0, "mAP@R": 9.1},
    "rsum": 215.8,
    "intervals": {
        "image_to_text": {key: [value - 2, value + 2] for key, value in RECALLS.items()},
        "text_to_image": {key: [value - 1, value + 1] for key, value in RECALLS.items()},
        "rsum": [210.0, 221.0],
    },
}


def test_markdown_has_a_row_a_direction_and_says_what_was_measured() -> None:
    lines = as_markdown(METRICS).splitlines()
    assert lines[0] == "|  | R@1 | R@5 | R@10 | median rank | mean rank | MRR | mAP@R |"
    assert lines[2].startswith("| image to text | 12.3 [10.3, 14.3] | 40.1 [38.1, 42.1] |")
    assert lines[3].endswith("| 9 | 41.0 | 21.0 | 9.1 |")
    assert {line.count("|") for line in lines[:4]} == {9}
    for said in ("full", "1,000 images", "[210.0, 221.0]", "ties count", "The best epoch"):
        assert said in lines[-1]


def test_latex_is_balanced_and_escaped() -> None:
    text = as_latex(METRICS)
    opened = re.findall(r"\\begin\{(\w+)\}", text)
    closed = re.findall(r"\\end\{(\w+)\}", text)
    assert opened == closed[::-1] == ["table", "tabular"]
    assert r"runs/my\_run on photos \& more" in text and r"95 \%" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {row.count("&") for row in rows} == {7}
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize("write", [as_markdown, as_latex])
def test_every_recall_has_its_interval(write: Any) -> None:
    text = write(METRICS)
    bounds = [[v - 2, v + 2] for v in RECALLS.values()] + [[v - 1, v + 1] for v in RECALLS.values()]
    for low, high in bounds:
        assert f"[{low:.1f}, {high:.1f}]" in text
