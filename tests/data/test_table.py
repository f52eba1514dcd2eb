"""CaptionTable: any number of captions an image, rows that stay true through subsets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captune.data.table import CaptionTable, file_key
from captune.errors import CaptuneError


def table_of(counts: list[int]) -> CaptionTable:
    """Image ``i`` with ``counts[i]`` captions, handed out round robin."""
    images = [(100 + i, f"{i}.jpg", Path(f"{i}.jpg")) for i in range(len(counts))]
    captions = [
        (10 * i + turn, f"caption {turn} of {i}", i)
        for turn in range(max(counts))
        for i, count in enumerate(counts)
        if turn < count
    ]
    return CaptionTable.build(images, captions, name="made", split="val")


@given(st.lists(st.integers(1, 7), min_size=1, max_size=12))
def test_captions_of_an_image_are_its_own_in_order(counts: list[int]) -> None:
    table = table_of(counts)
    for image, count in enumerate(counts):
        texts = [table.caption(int(row)) for row in table.captions_of(image)]
        assert texts == [f"caption {turn} of {image}" for turn in range(count)]


@given(st.lists(st.integers(1, 5), min_size=2, max_size=10), st.randoms())
def test_a_subset_keeps_images_and_captions_together(counts: list[int], random: object) -> None:
    table = table_of(counts)
    rows = list(range(len(counts)))
    random.shuffle(rows)  # type: ignore[attr-defined]
    chosen = rows[: max(1, len(rows) // 2)]
    part = table.take_images(chosen)
    assert [part.file_name(i) for i in range(len(part))] == [f"{row}.jpg" for row in chosen]
    for place, row in enumerate(chosen):
        texts = [part.caption(int(r)) for r in part.captions_of(place)]
        assert texts == [f"caption {turn} of {row}" for turn in range(counts[row])]
    caption_rows, owner = table.captions_among(chosen)
    assert [table.caption(int(r)) for r in caption_rows] == part.texts()
    assert owner.tolist() == part.image_of_caption.tolist()


def test_images_without_captions_are_left_out_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    images = [(1, "a.jpg", Path("a.jpg")), (2, "b.jpg", Path("b.jpg"))]
    table = CaptionTable.build(images, [(7, "of b", 1), (8, "   ", 0)], name="x", split="val")
    assert [table.file_name(i) for i in range(len(table))] == ["b.jpg"]
    said = capsys.readouterr().err
    assert "1 empty captions left out" in said and "without a caption left out: a.jpg" in said


def test_no_captions_at_all_is_an_error() -> None:
    with pytest.raises(CaptuneError, match="no captions"):
        CaptionTable.build([(1, "a.jpg", Path("a.jpg"))], [], name="x", split="val")


def test_digest_changes_with_captions_names_and_order() -> None:
    digests = {table_of([2, 1]).digest, table_of([1, 2]).digest, table_of([2, 2]).digest}
    assert len(digests) == 3
    assert table_of([2, 1]).digest == table_of([2, 1]).digest


def test_coco_images_are_recognised_in_any_folder() -> None:
    name = "COCO_val2014_000000000042.jpg"
    assert file_key(f"val2014/{name}") == file_key(name) == name
    assert file_key("a/1.jpg") != file_key("b/1.jpg")
