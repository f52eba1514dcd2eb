"""Rows gathered into columns give what a plain loop over the rows gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captune.data import rowset as rowset_module
from captune.data.rowset import RowSet
from captune.data.table import files_present

Row = tuple[str, list[str], str]

rows = st.lists(
    st.tuples(
        st.sampled_from(["a.jpg", "b.jpg", "c.jpg", "d.jpg"]),
        st.lists(st.sampled_from(["one", " two ", "", "\x1cthree\n", "é"]), max_size=3),
        st.sampled_from(["", "train", "val"]),
    ),
    max_size=12,
)


def slow(found: list[Row], keep: list[bool]) -> tuple[list[str], list[str], list[int]]:
    """Images, captions and each caption's place, by a loop."""
    images: list[str] = []
    captions: list[str] = []
    owner: list[int] = []
    for (image, texts, _), kept in zip(found, keep, strict=True):
        if not kept:
            continue
        if image not in images:
            images.append(image)
        captions += [text.strip() for text in texts]
        owner += [images.index(image)] * len(texts)
    return images, captions, owner


@settings(max_examples=300, deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_chosen_rows_equal_a_loop(found: list[Row], random: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rowset_module, "CHUNK", 2)  # several chunks
        gathered = RowSet.gather(found)
    assert len(gathered) == len(found)
    keep = [random.random() < 0.6 for _ in found]  # type: ignore[attr-defined]
    images, captions, owner = gathered.chosen(np.array(keep, dtype=bool))
    expected = slow(found, keep)
    assert [gathered.images[place] for place in images] == expected[0]
    assert (captions.to_pylist(), owner.tolist()) == expected[1:]


@settings(max_examples=50, deadline=None)
@given(rows)
def test_rows_of_a_split_are_those_that_name_it(found: list[Row]) -> None:
    gathered = RowSet.gather(found)
    for split in ("", "train", "val", "elsewhere"):
        assert gathered.of_split(split).tolist() == [row[2] == split for row in found]


def test_files_that_are_there_are_told_from_those_that_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    names = ["a.jpg", "folder.jpg", "link.jpg", "b.jpg", "gone/a.jpg", "./a.jpg"]
    there = files_present([str(tmp_path / name) for name in names])
    assert there == [True, False, True, False, False, True]
