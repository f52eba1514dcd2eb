"""Rows on disk: computed in batches, resumable, whole or not to be opened."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from captune import rowfile
from captune.errors import CaptuneError
from captune.rowfile import Halves, RowFile, Rows

SHAPE = (50, 3)
ORDER = np.random.default_rng(0).permutation(SHAPE[0])


def values(rows: Rows) -> Halves:
    return np.stack([rows, rows**2, -rows], axis=1).astype(np.float16)


class Computing:
    """The values of rows; keeps what it was asked for, and can be told to be interrupted."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self.fail_after = fail_after

    def __call__(self, rows: Rows) -> Halves:
        if self.fail_after is not None and len(self.asked) == self.fail_after:
            raise KeyboardInterrupt
        self.asked.append(rows.tolist())
        return values(rows)


def fill(file: RowFile, computing: Computing) -> None:
    file.fill(ORDER, computing, batch=8, words="counting", unit="row", progress=False)


def file_in(folder: Path, *, fingerprint: str = "one", shape: tuple[int, int] = SHAPE) -> RowFile:
    return RowFile(folder, "numbers", shape, fingerprint)


@pytest.fixture(autouse=True)
def marks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowfile, "SECONDS_BETWEEN_MARKS", 0.0)


def test_rows_are_asked_for_in_order_and_each_lies_at_its_number(tmp_path: Path) -> None:
    computing = Computing()
    file = file_in(tmp_path)
    fill(file, computing)
    assert computing.asked == [ORDER[start : start + 8].tolist() for start in range(0, 50, 8)]
    found = file.open("numbers")
    assert isinstance(found, np.memmap) and not found.flags.writeable
    assert np.array_equal(found, values(np.arange(50)))
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.npy"]


@pytest.mark.parametrize("batches", [0, 1, 3, 6])
def test_an_interrupted_file_cannot_be_opened_and_goes_on(tmp_path: Path, batches: int) -> None:
    file = file_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fill(file, Computing(fail_after=batches))
    assert not file.path.exists()
    with pytest.raises(CaptuneError, match="the numbers in"):
        file.open("numbers")
    computing = Computing()
    fill(file, computing)
    assert [row for rows in computing.asked for row in rows] == ORDER[8 * batches :].tolist()
    undisturbed = RowFile(tmp_path / "other", "numbers", SHAPE, "one")
    undisturbed.folder.mkdir()
    fill(undisturbed, Computing())
    assert file.path.read_bytes() == undisturbed.path.read_bytes()


def test_between_marks_rows_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rowfile, "SECONDS_BETWEEN_MARKS", 1e9)
    with pytest.raises(KeyboardInterrupt):
        fill(file_in(tmp_path), Computing(fail_after=4))
    computing = Computing()
    fill(file_in(tmp_path), computing)
    assert len(computing.asked) == 7


@pytest.mark.parametrize("change", ["fingerprint", "shape", "mark", "list", "empty", "gone"])
def test_what_is_not_this_ones_starts_over(tmp_path: Path, change: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(file_in(tmp_path), Computing(fail_after=3))
    partial, mark = tmp_path / "partial-numbers.npy", tmp_path / "partial-numbers.json"
    assert json.loads(mark.read_text())["done"] == 24
    if change == "shape":
        np.save(partial, np.zeros((50, 4), dtype=np.float16))
    elif change == "mark":
        mark.write_text("{", encoding="utf-8")
    elif change == "list":
        mark.write_text("[24]", encoding="utf-8")
    elif change == "empty":
        partial.write_bytes(b"")
    elif change == "gone":
        partial.unlink()
    computing = Computing()
    file = file_in(tmp_path, fingerprint="two" if change == "fingerprint" else "one")
    fill(file, computing)
    assert len(computing.asked) == 7
    assert np.array_equal(file.open("numbers"), values(np.arange(50)))


@pytest.mark.parametrize("damage", ["cut", "empty", "shape", "dtype", "gone"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    file = file_in(tmp_path)
    fill(file, Computing())
    if damage == "cut":
        file.path.write_bytes(file.path.read_bytes()[:-10])
    elif damage == "empty":
        file.path.write_bytes(b"")
    elif damage == "shape":
        np.save(file.path, np.zeros((50, 4), dtype=np.float16))
    elif damage == "dtype":
        np.save(file.path, np.zeros(SHAPE, dtype=np.float32))
    else:
        file.path.unlink()
    with pytest.raises(CaptuneError, match=f"the numbers in {tmp_path} is damaged"):
        file.open("numbers")
