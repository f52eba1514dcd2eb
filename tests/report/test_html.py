"""The page: self-contained, escaped, whole, and it tells what it was given."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from captune.evaluation.analysis import Group
from captune.report.html import (
    Analysis,
    Failure,
    Hub,
    Report,
    ResultRow,
    Twins,
    write_report,
)
from captune.report.plots import QueryAnswer

NASTY = '<script>alert("1")</script> & "quoted"'
METRICS = {
    "image_to_text": {"R@1": 12.34, "R@5": 40.06, "R@10": 55.5, "median_rank": 8.5},
    "text_to_image": {"R@1": 9.99, "R@5": 30.0, "R@10": 45.25, "median_rank": 12.0},
    "rsum": 193.14,
}
# Attributes through which a page loads something when it is opened.
LOADING = {"src", "srcset", "data", "poster", "background", "action"}


class Page(HTMLParser):
    """Elements with their attributes, and the text that is shown."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.shown = ""
        self._style = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False
        self.shown += " " if tag in ("td", "th") else ""  # cells stand apart when shown

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.shown += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        """The shown text with single spaces."""
        return " ".join(self.shown.split())


@pytest.fixture
def report(hits: Any, tmp_path: Path) -> Report:
    figure = tmp_path / "curves.png"
    Image.new("RGB", (20, 10), "white").save(figure)
    meant = hits(1)[0].image
    return Report(
        title="captune: squares",
        summary="recipe plain",
        before=[QueryAnswer("red", hits(3), [False, False, True])],
        after=[QueryAnswer("red", hits(2), [True, False], "3 of 8 pictures match")],
        queries_note="what the marks mean",
        results=[
            ResultRow("this run", METRICS),
            ResultRow("zero-shot CLIP", None, "not measured here"),
        ],
        results_note="squares val: 8 images",
        analysis=Analysis(
            easiest=[],
            hardest=[Failure(QueryAnswer("blue on green", hits(2), [False, False]), meant, 37)],
            tables=[("By length", [Group("4 to 8 words", 1200, {"R@1": 9.5, "R@5": 22.0})])],
            hubs=[Hub(meant, 1234)],
            usual=49.6,
            shared=[("a dog", 3)],
            shared_count=2,
            twins=[Twins(meant, meant, 0.9912)],
            twin_count=1,
        ),
        figures=[("Training", figure)],
        commands=[("Search:", 'captune search runs/x "a <dog>"')],
        facts=[("seed", "0")],
        attribution="All emojis designed by OpenMoji (https://openmoji.org)",
        notes=["24 of these images were trained on", "another note"],
    )


def page(report: Report, tmp_path: Path, **changes: Any) -> Page:
    path = tmp_path / "out" / "report.html"
    write_report(path, dataclasses.replace(report, **changes))
    return Page(path)


def test_the_page_loads_nothing(report: Report, tmp_path: Path) -> None:
    found = page(report, tmp_path)
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in found.elements:
        for name in LOADING & attributes.keys():
            assert attributes[name].startswith("data:image/"), attributes[name][:80]
    assert "@import" not in found.source
    assert not re.search(r"url\(\s*['\"]?(?!data:)", found.source)


def test_every_picture_is_inside_the_page_whole_and_has_words(
    report: Report, tmp_path: Path
) -> None:
    pictures = page(report, tmp_path).all("img")
    # 3 before, 2 after, the meant one and the 2 found in its place, a hub, 2 twins, one figure.
    assert len(pictures) == 12
    for picture in pictures:
        assert picture["alt"].strip()
        head, body = picture["src"].split(",", 1)
        assert head in ("data:image/jpeg;base64", "data:image/png;base64")
        with Image.open(io.BytesIO(base64.b64decode(body, validate=True))) as image:
            image.load()


def test_large_photos_come_as_thumbnails(report: Report, hits: Any, tmp_path: Path) -> None:
    hit = hits(1)[0]
    Image.effect_noise((2400, 1600), 90).convert("RGB").save(hit.image, quality=95)
    answers = [QueryAnswer("noise", [hit])]
    found = page(report, tmp_path, before=answers, after=answers, analysis=None)
    assert len(found.source) < 200_000 < Path(hit.image).stat().st_size


@pytest.mark.parametrize("place", ["caption", "query", "title", "summary", "note", "command"])
def test_html_in_words_of_the_data_is_shown_and_not_obeyed(
    place: str, report: Report, hits: Any, tmp_path: Path
) -> None:
    answer = [QueryAnswer("red", hits(1))]
    changes: dict[str, Any] = {
        "caption": {
            "before": answer,
            "after": [QueryAnswer("red", hits(1, caption=NASTY))],
        },
        "query": {"before": answer, "after": [QueryAnswer(NASTY, hits(1))]},
        "title": {"title": NASTY},
        "summary": {"summary": NASTY},
        "note": {"notes": [NASTY]},
        "command": {"commands": [("Search:", NASTY)]},
    }[place]
    found = page(report, tmp_path, **changes)
    assert not found.all("script")
    alternatives = [picture["alt"] for picture in found.all("img")]
    assert NASTY in (alternatives if place == "caption" else found.shown)


def test_the_queries_stand_before_and_after_with_their_notes(
    report: Report, tmp_path: Path
) -> None:
    words = page(report, tmp_path).words
    assert "“red” 3 of 8 pictures match" in words and "what the marks mean" in words
    before, after = words.split("before training", 1)[1].split("after training", 1)
    assert before.split()[:6] == ["✗", "0.90", "✗", "0.80", "✓", "0.70"]
    assert after.split()[:4] == ["✓", "0.90", "✗", "0.80"]


def test_pictures_of_unknown_truth_carry_no_mark(report: Report, hits: Any, tmp_path: Path) -> None:
    answers = [QueryAnswer("red", hits(2))]
    words = page(report, tmp_path, before=answers, after=answers, analysis=None).words
    assert "0.90 0.80" in words and "✓" not in words and "✗" not in words


def test_queries_that_are_not_the_same_before_and_after_are_refused(
    report: Report, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="zip"):
        page(report, tmp_path, before=[])


def test_a_row_of_results_holds_all_numbers_of_both_directions(
    report: Report, tmp_path: Path
) -> None:
    words = page(report, tmp_path).words
    assert "this run 12.3 40.1 55.5 8.5 10.0 30.0 45.2 12 193.1" in words
    assert "squares val: 8 images" in words


def test_a_row_without_numbers_says_why(report: Report, tmp_path: Path) -> None:
    assert "zero-shot CLIP not measured here" in page(report, tmp_path).words


def test_failures_show_the_query_its_rank_and_the_picture_that_was_meant(
    report: Report, tmp_path: Path
) -> None:
    found = page(report, tmp_path)
    assert "Where it fails" in found.words
    assert "“blue on green” own picture at rank 37" in found.words
    assert [p["alt"] for p in found.all("img")].count("the picture that was meant") == 1


def test_without_failures_there_is_no_word_of_them(report: Report, tmp_path: Path) -> None:
    assert report.analysis is not None
    bare = dataclasses.replace(report.analysis, hardest=[])
    assert "Where it fails" not in page(report, tmp_path, analysis=bare).words


def test_groups_hubs_and_duplicates_are_told(report: Report, tmp_path: Path) -> None:
    words = page(report, tmp_path).words
    assert "4 to 8 words 1,200 9.5 22.0" in words
    assert "50 captions do so on average" in words and "1,234 captions" in words
    assert "2 captions stand with more than one picture" in words and "“a dog” (3) …" in words
    assert "1 pair of pictures is nearly the same" in words and "0.991" in words
    assert report.analysis is not None
    one = dataclasses.replace(report.analysis, shared_count=1)
    assert "1 caption stands with more than one" in page(report, tmp_path, analysis=one).words
    bare = dataclasses.replace(report.analysis, shared=[], shared_count=0, twins=[], twin_count=0)
    words = page(report, tmp_path, analysis=bare).words
    assert "No caption stands with more than one picture" in words
    assert "No two pictures are nearly the same" in words


def test_what_is_found_most_surely_comes_before_what_fails(
    report: Report, hits: Any, tmp_path: Path
) -> None:
    assert "most surely" not in page(report, tmp_path).words
    assert report.analysis is not None
    sure = dataclasses.replace(
        report.analysis, easiest=[QueryAnswer("a red square", hits(1), [True])]
    )
    words = page(report, tmp_path, analysis=sure).words
    assert words.index("“a red square”") < words.index("Where it fails")


def test_intervals_stand_below_the_figures_that_have_them(report: Report, tmp_path: Path) -> None:
    intervals = {
        direction: {key: [1.5, 2.5] for key in ("R@1", "R@5", "R@10")}
        for direction in ("image_to_text", "text_to_image")
    }
    metrics = {**METRICS, "intervals": {**intervals, "rsum": [180.0, 206.25]}}
    words = page(report, tmp_path, results=[ResultRow("this run", metrics)]).words
    assert "12.31.5–2.5" in words and "193.1180.0–206.2" in words


def test_every_note_is_shown(report: Report, tmp_path: Path) -> None:
    words = page(report, tmp_path).words
    assert "Note: 24 of these images were trained on" in words and "Note: another note" in words


def test_commands_facts_and_attribution_are_shown(report: Report, tmp_path: Path) -> None:
    words = page(report, tmp_path).words
    assert 'Search: captune search runs/x "a <dog>"' in words
    assert "seed 0" in words
    assert "All emojis designed by OpenMoji (https://openmoji.org)" in words


def test_figures_stand_under_their_names(report: Report, tmp_path: Path) -> None:
    found = page(report, tmp_path)
    assert found.all("img")[-1]["alt"] == "Training"
    assert found.all("img")[-1]["src"].startswith("data:image/png;base64,")


def test_the_page_says_its_encoding_and_language(report: Report, tmp_path: Path) -> None:
    found = page(report, tmp_path, title="Räder über 東京")
    assert found.all("meta")[0] == {"charset": "utf-8"} and found.all("html")[0]["lang"] == "en"
    assert "Räder über 東京" in found.shown


def test_a_page_that_fails_on_the_way_leaves_the_old_one(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.html"
    path.parent.mkdir()
    path.write_text("the old page", encoding="utf-8")
    with pytest.raises(FileNotFoundError):
        page(report, tmp_path, figures=[("gone", tmp_path / "gone.png")])
    assert path.read_text(encoding="utf-8") == "the old page"
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_the_page_is_renamed_into_place_and_not_written_there(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opens it meanwhile sees the old page or the new one, whole."""
    path = tmp_path / "out" / "report.html"
    path.parent.mkdir()
    path.write_text("the old page", encoding="utf-8")

    def no_rename(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", no_rename)
    with pytest.raises(OSError, match="disk full"):
        page(report, tmp_path)
    assert path.read_text(encoding="utf-8") == "the old page"
