"""COCO's annotations read by Arrow are what Python's parser makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captune.data import annotations
from captune.data.annotations import columns_by_arrow, columns_by_python, read_annotations

IMAGE = {"id": 1, "file_name": "a.jpg", "license": 3, "flickr_url": "http://x/y"}
CAPTION = {"id": 5, "image_id": 1, "caption": "one"}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["", " two ", "\x1cthree\n", "\u3000four\x85", "\u200bfive", "\U0001f600 “six”", 'a"b\\c/d']
)


def write(path: Path, images: Any, captions: Any, **how: Any) -> Path:
    content = {"info": {"year": 2014}, "images": images, "licenses": [], "annotations": captions}
    path.write_text(json.dumps(content, **how), encoding="utf-8")
    return path


def agree(path: Path, folder: Path) -> None:
    """Arrow reads the file, and as Python does."""
    quick = columns_by_arrow(path, folder)
    assert quick is not None
    for mine, slow in zip(quick, columns_by_python(path, folder), strict=True):
        assert mine.schema == slow.schema
        assert mine.equals(slow)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5, unique=True),
    st.lists(st.tuples(st.integers(0, 4), texts), min_size=1, max_size=9),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_the_same_tables(
    tmp_path: Path,
    ids: list[int],
    told: list[tuple[int, str]],
    indent: int | None,
    ascii_only: bool,
) -> None:
    images = [{"id": i, "file_name": f"./sub//{i} é.jpg", "width": 3.5} for i in ids]
    captions = [
        {"image_id": ids[place % len(ids)], "id": number, "caption": text, "other": [1, {}]}
        for number, (place, text) in enumerate(told)
    ]
    path = write(tmp_path / "a.json", images, captions, indent=indent, ensure_ascii=ascii_only)
    agree(path, tmp_path / "photos")


def test_more_captions_than_are_stripped_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotations, "STRIPPED_AT_ONCE", 4)
    captions = [{"id": n, "image_id": 1, "caption": f" {n} "} for n in range(10)]
    agree(write(tmp_path / "a.json", [IMAGE], captions), tmp_path)


def test_real_annotations(shared_data: Path) -> None:
    agree(shared_data / "coco_karpathy" / "captions_karpathy_test5k.json", Path("val2014"))


@pytest.mark.parametrize(
    ("images", "captions"),
    [
        ([{**IMAGE, "id": "1"}], [CAPTION]),
        ([{**IMAGE, "id": 1.0}], [CAPTION]),
        ([IMAGE], [{**CAPTION, "caption": 7}]),
        ([IMAGE], [{**CAPTION, "caption": None}]),
        ([IMAGE], [{**CAPTION, "image_id": True}]),
    ],
)
def test_what_arrow_refuses_python_reads(tmp_path: Path, images: Any, captions: Any) -> None:
    path = write(tmp_path / "a.json", images, captions)
    assert columns_by_arrow(path, tmp_path) is None
    found, expected = read_annotations(path, tmp_path), columns_by_python(path, tmp_path)
    assert all(mine.equals(slow) for mine, slow in zip(found, expected, strict=True))
    assert found[1]["image"].to_pylist() == [0]


def test_of_a_key_given_twice_the_last_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [IMAGE], [CAPTION])
    content = path.read_text(encoding="utf-8")
    path.write_text(content.replace('"id": 5', '"id": 4, "id": 5'), encoding="utf-8")
    assert read_annotations(path, tmp_path)[1]["caption_id"].to_pylist() == [5]


def test_a_file_larger_than_arrow_takes_is_read_by_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.json", [IMAGE], [CAPTION])
    monkeypatch.setattr(annotations, "LARGEST", path.stat().st_size - 1)
    assert columns_by_arrow(path, tmp_path) is None
    assert read_annotations(path, tmp_path)[1]["caption"].to_pylist() == ["one"]
