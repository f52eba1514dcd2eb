"""Figures hold what they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from captune.evaluation.explain import HeatMap
from captune.evaluation.retrieval import Hit
from captune.evaluation.zeroshot import Prediction
from captune.report.plots import (
    GREEN,
    GREY,
    RED,
    QueryAnswer,
    before_and_after,
    heat_maps,
    recall_bars,
    retrieval_sheet,
    sample_sheet,
    save_figure,
    training_curves,
    zero_shot_bars,
)
from conftest import write_scene

HISTORY: list[dict[str, Any]] = [
    {
        "epoch": epoch,
        "train_loss": 5.0 - epoch,
        "val_loss": 4.5 - epoch / 2,
        "image_to_text": {"R@1": 1.0 * epoch, "R@5": 2.0 * epoch},
        "text_to_image": {"R@1": 3.0 * epoch, "R@5": 4.0 * epoch},
    }
    for epoch in (1, 2, 3)
]
# matplotlib reads what stands between two dollar signs as a formula.
DOLLARS = "from $5 {a kilo to $6} a kilo"


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Each curve's points, by its name in the legend."""
    found = {}
    for line in axes.get_lines():
        x, y = line.get_data()
        found[str(line.get_label())] = (list(x), list(y))
    return found


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.fixture
def picture(tmp_path: Path) -> str:
    write_scene(tmp_path / "picture.jpg", "white", "red")
    return str(tmp_path / "picture.jpg")


def prediction(picture: str, **probabilities: float) -> Prediction:
    label = max(probabilities, key=lambda name: probabilities[name])
    return Prediction(picture, label, probabilities)


def test_the_loss_curves_are_train_and_validation_over_epochs() -> None:
    loss, _ = training_curves(HISTORY).axes
    assert lines(loss) == {
        "train": ([1, 2, 3], [4.0, 3.0, 2.0]),
        "validation": ([1, 2, 3], [4.0, 3.5, 3.0]),
    }
    assert loss.get_xlabel() == "epoch"


def test_the_recall_curves_are_both_directions_at_one_and_five() -> None:
    _, recall = training_curves(HISTORY).axes
    assert {name: y for name, (_, y) in lines(recall).items()} == {
        "image→text R@1": [1.0, 2.0, 3.0],
        "image→text R@5": [2.0, 4.0, 6.0],
        "text→image R@1": [3.0, 6.0, 9.0],
        "text→image R@5": [4.0, 8.0, 12.0],
    }
    assert "percent" in recall.get_title() and recall.get_ylim()[0] == 0


def test_curves_of_a_single_epoch_are_points_that_can_be_seen() -> None:
    loss, recall = training_curves(HISTORY[:1], "one epoch").axes
    markers = {line.get_marker() for axes in (loss, recall) for line in axes.get_lines()}
    assert markers == {"o"}


def test_the_title_of_the_curves_is_the_given_one() -> None:
    assert training_curves(HISTORY, "recipe plain").get_suptitle() == "recipe plain"


def test_a_long_title_stays_inside_of_the_curves() -> None:
    title = "recipe best · " + " ".join(f"some_key_{number}=0.25" for number in range(20))
    figure = training_curves(HISTORY, title)
    figure.draw_without_rendering()
    assert figure._suptitle is not None
    box = figure._suptitle.get_window_extent()
    assert 0 < box.x0 < box.x1 < figure.bbox.width
    assert figure.get_suptitle().split() == title.split()


def test_each_query_has_a_band_with_its_words_and_its_pictures(hits: Any) -> None:
    answers = [QueryAnswer("red on black", hits(3)), QueryAnswer("blue", hits(2))]
    figure = retrieval_sheet(answers, "top pictures")
    bands = list(figure.subfigs)
    assert [band.get_suptitle() for band in bands] == ["“red on black”", "“blue”"]
    drawn = [sum(len(axes.get_images()) for axes in band.axes) for band in bands]
    assert drawn == [3, 2]
    assert figure.get_suptitle() == "top pictures"


def test_scores_stand_above_their_pictures_in_the_order_of_the_hits(hits: Any) -> None:
    (band,) = retrieval_sheet([QueryAnswer("red", hits(3))]).subfigs
    assert [axes.get_title() for axes in band.axes] == ["0.90", "0.80", "0.70"]


def test_right_pictures_are_marked_green_and_wrong_ones_red(hits: Any) -> None:
    (band,) = retrieval_sheet([QueryAnswer("red", hits(2), [True, False])]).subfigs
    shown = [(axes.get_title(), to_hex(axes.title.get_color())) for axes in band.axes]
    assert shown == [("✓ 0.90", GREEN), ("✗ 0.80", RED)]


def test_a_long_query_is_cut_and_says_so(hits: Any) -> None:
    words = "a square " * 30
    (band,) = retrieval_sheet([QueryAnswer(words, hits(2))]).subfigs
    title = band.get_suptitle()
    assert len(title) < 60 and title.endswith("…”") and title[1:20] == words[:19]


def test_a_sheet_of_no_queries_can_still_be_saved(tmp_path: Path) -> None:
    save_figure(retrieval_sheet([]), tmp_path / "empty.png")
    with Image.open(tmp_path / "empty.png") as image:
        assert image.format == "PNG"


def test_bars_are_the_five_likeliest_labels_best_first_in_percent(picture: str) -> None:
    given = prediction(picture, cat=0.1, dog=0.4, cow=0.05, hen=0.25, pig=0.15, rat=0.03, owl=0.02)
    image, bars = zero_shot_bars([given]).axes
    assert len(image.get_images()) == 1
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([40, 25, 15, 10, 5])
    named = [label.get_text() for label in bars.get_yticklabels()]
    assert named == ["dog", "hen", "pig", "cat", "cow"]
    assert texts(bars) == ["40 %", "25 %", "15 %", "10 %", "5 %"]
    # The first bar is on top only where the axis points down.
    low, high = bars.get_ylim()
    assert low > high


def test_the_true_label_is_green_and_the_others_grey(picture: str) -> None:
    given = prediction(picture, dog=0.7, cat=0.3)
    _, bars = zero_shot_bars([given], ["cat"]).axes
    assert [to_hex(bar.get_facecolor()) for bar in bars.patches] == [GREY, GREEN]


def test_without_a_truth_no_bar_looks_right_or_wrong(picture: str) -> None:
    given = prediction(picture, dog=0.7, cat=0.3)
    _, bars = zero_shot_bars([given], [None]).axes
    colours = {to_hex(bar.get_facecolor()) for bar in bars.patches}
    assert len(colours) == 1 and not colours & {GREEN, GREY, RED}


def test_each_image_has_its_own_row_of_bars(picture: str) -> None:
    figure = zero_shot_bars(
        [prediction(picture, dog=0.7, cat=0.3), prediction(picture, dog=0.2, cat=0.8)]
    )
    tops = [axes.get_yticklabels()[0].get_text() for axes in figure.axes[1::2]]
    assert tops == ["dog", "cat"]


def test_dollar_signs_in_a_query_are_text_and_no_formula(hits: Any, tmp_path: Path) -> None:
    save_figure(retrieval_sheet([QueryAnswer(DOLLARS, hits(1))]), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_dollar_signs_in_a_label_are_text_and_no_formula(picture: str, tmp_path: Path) -> None:
    given = prediction(picture, **{DOLLARS: 0.7, "cat": 0.3})
    save_figure(zero_shot_bars([given]), tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_dollar_signs_in_a_title_are_text_and_no_formula(tmp_path: Path) -> None:
    save_figure(training_curves(HISTORY, DOLLARS), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_large_photos_are_drawn_small(tmp_path: Path) -> None:
    """Otherwise a sheet of camera photos takes a gigabyte to draw."""
    Image.new("RGB", (3000, 2000), "red").save(tmp_path / "large.jpg")
    hit = Hit(str(tmp_path / "large.jpg"), 0.5, "a large photo")
    (band,) = retrieval_sheet([QueryAnswer("red", [hit])]).subfigs
    (drawn,) = band.axes[0].get_images()
    height, width = drawn.get_array().shape[:2]
    assert max(height, width) <= 200 and width / height == pytest.approx(1.5, abs=0.05)


def test_a_figure_that_cannot_be_drawn_leaves_the_old_file(tmp_path: Path) -> None:
    class Undrawable(Figure):
        def savefig(self, *given: Any, **named: Any) -> None:
            raise RuntimeError("no ink")

    path = tmp_path / "curves.png"
    path.write_bytes(b"the old picture")
    with pytest.raises(RuntimeError, match="no ink"):
        save_figure(Undrawable(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    assert path.read_bytes() == b"the old picture"


def test_samples_stand_above_their_captions_in_rows_of_four(picture: str, tmp_path: Path) -> None:
    figure = sample_sheet([(picture, DOLLARS)] * 5, "train")
    drawn = [len(axes.get_images()) for axes in figure.axes]
    assert drawn == [1, 1, 1, 1, 1, 0, 0, 0]
    assert " ".join(figure.axes[0].get_title().split()) == DOLLARS
    save_figure(figure, tmp_path / "samples.png")


def test_recall_bars_are_both_directions_with_chance() -> None:
    directions = ("image_to_text", "text_to_image")
    keys = ("R@1", "R@5", "R@10")
    metrics = {
        d: dict(zip(keys, (10.0, 30.0, 40.0 + n), strict=True)) for n, d in enumerate(directions)
    }
    chance = {d: dict.fromkeys(keys, 5.0) for d in directions}
    (axes,) = recall_bars(metrics, chance, "recall").axes
    assert [bar.get_height() for bar in axes.patches] == [10, 30, 40, 10, 30, 41]
    assert texts(axes)[-1] == "41.0"
    assert all(list(line.get_ydata()) == [5, 5, 5] for line in axes.get_lines())
    legend = axes.get_legend()
    assert legend is not None
    named = {text.get_text() for text in legend.get_texts()}
    assert named == {"image→text", "text→image", "chance"}
    (bare,) = recall_bars(metrics).axes
    assert not bare.get_lines()


def heat(query: str, strength: float) -> HeatMap:
    values = np.zeros((8, 8), np.float32)
    values[0, 0] = 1
    return HeatMap(query, values, strength, np.zeros((8, 8, 3), np.uint8), 0.25, "occlusion")


def test_heat_lies_over_the_picture_on_one_scale_a_row(tmp_path: Path) -> None:
    figure = heat_maps([[heat("a cat", 0.4), heat(DOLLARS, 0.1)], [heat("a cat", 0.2)]], "why")
    drawn = [len(axes.get_images()) for axes in figure.axes]
    assert drawn == [2, 2, 2, 1, 2, 0]
    tops = [float(axes.get_images()[1].get_array().max()) for axes in figure.axes[1:3]]
    assert tops == pytest.approx([1, 0.25])
    assert figure.axes[1].get_title() == "“a cat” 0.25"
    save_figure(figure, tmp_path / "heat.png")


def test_heat_of_nothing_is_the_bare_picture(tmp_path: Path) -> None:
    figure = heat_maps([[heat("a cat", 0.0)]])
    save_figure(figure, tmp_path / "heat.png")
    assert float(np.asarray(figure.axes[1].get_images()[1].get_alpha()).max()) == 0
    none = heat_maps([])
    save_figure(none, tmp_path / "none.png")
    assert not any(axes.get_images() for axes in none.axes)


def test_before_and_after_are_two_rows_of_the_same_query(hits: Any) -> None:
    before = QueryAnswer("red hearts", hits(3), [False, False, True])
    after = QueryAnswer("red hearts", hits(2), [True, True], "2 of 8 pictures match")
    figure = before_and_after(before, after)
    assert figure.get_suptitle() == "“red hearts” (2 of 8 pictures match)"
    upper, lower = figure.subfigs
    assert (upper.get_suptitle(), lower.get_suptitle()) == ("before training", "after training")
    assert [axes.get_title() for axes in upper.axes] == ["✗ 0.90", "✗ 0.80", "✓ 0.70"]
    assert [axes.get_title() for axes in lower.axes] == ["✓ 0.90", "✓ 0.80", ""]
    assert sum(len(axes.images) for axes in lower.axes) == 2
