"""A blend's table and picture hold its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from captune.report.blend import Blend
from captune.report.plots import save_figure


def row(alpha: float, rsum: float) -> dict[str, Any]:
    recalls = {"R@1": rsum / 30, "R@5": rsum / 6, "R@10": rsum / 5}
    return {
        "alpha": alpha,
        "fingerprint": f"{alpha}",
        "image_to_text": recalls,
        "text_to_image": {key: value + 1 for key, value in recalls.items()},
        "rsum": rsum,
        "intervals": {"rsum": [rsum - 9, rsum + 11]},
    }


TOLD: dict[str, Any] = {
    "models": [{"model": "runs/$a@stage-1"}, {"model": "runs/$a"}],
    "data": "photos",
    "split": "val",
    "images": 1000,
    "captions": 5000,
    "rows": [row(0.0, 300.0), row(0.5, 330.0), row(1.0, 320.0)],
    "best": {
        "alpha": 0.5,
        "rsum": 330.0,
        "less_first": {"rsum": {"value": 30.0, "low": 21.0, "high": 39.5}},
        "less_second": {"rsum": {"value": 10.0, "low": -1.0, "high": 20.0}},
    },
    "notes": ["alpha was chosen on val"],
}


def test_the_table_has_a_row_an_alpha_and_both_differences() -> None:
    lines = Blend(Path("runs/a-blend"), TOLD).to_text().splitlines()
    assert lines[0] == "photos val: 1,000 images, 5,000 captions (percent)"
    assert " ".join(lines[5].split()) == ("*0.5 11.0 55.0 66.0 12.0 56.0 67.0 330.0 [321.0, 341.0]")
    assert "  +30.0 [+21.0, +39.5], against runs/$a@stage-1" in lines
    assert "  +10.0 [-1.0, +20.0] within noise, against runs/$a" in lines
    assert lines[-1] == "note: alpha was chosen on val"


def test_the_picture_is_rsum_and_recall_over_alpha(tmp_path: Path) -> None:
    figure = Blend(tmp_path, TOLD).figure()
    rsum, recall = figure.axes
    curves = {str(line.get_label()): list(line.get_ydata()) for line in rsum.get_lines()}
    assert curves["rsum"] == [300.0, 330.0, 320.0]
    assert list(rsum.get_lines()[1].get_xdata()) == [0.5, 0.5]
    named = {str(line.get_label()): list(line.get_ydata()) for line in recall.get_lines()}
    assert named["image→text R@1"] == [10.0, 11.0, 320 / 30]
    save_figure(figure, tmp_path / "blend.png")
    assert (tmp_path / "blend.png").stat().st_size > 5000
