"""Rows on disk: computed in batches, gone on with after an interruption, opened only when whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from captune import rowfile
from captune.errors import CaptuneError
from captune.rowfile import Halves, RowFile, Rows

SHAPE = (23, 4)
ORDER = np.random.default_rng(0).permutation(SHAPE[0])


def values(rows: Rows) -> Halves:
    return (rows[:, None] + np.arange(SHAPE[1]) / 8).astype(np.float16)


class Compute:
    """Notes which rows it is asked for; interrupted before it gives more than ``limit``."""

    def __init__(self, limit: int = 10**6) -> None:
        self.rows: list[int] = []
        self.limit = limit

    def __call__(self, rows: Rows) -> Halves:
        if len(self.rows) + len(rows) > self.limit:
            raise KeyboardInterrupt
        self.rows += rows.tolist()
        return values(rows)


def fill(file: RowFile, compute: Compute) -> None:
    file.fill(ORDER, compute, batch=5, words="rows", unit="row", progress=False)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RowFile:
    monkeypatch.setattr(rowfile, "SECONDS_BETWEEN_MARKS", 0.0)
    return RowFile(tmp_path, "rows", SHAPE, "one")


def test_every_row_is_computed_once_in_order_and_read_back(file: RowFile) -> None:
    compute = Compute()
    fill(file, compute)
    assert compute.rows == ORDER.tolist()
    found = file.open("rows")
    assert isinstance(found, np.memmap) and not found.flags.writeable
    assert np.array_equal(found, values(np.arange(SHAPE[0])))
    assert [path.name for path in file.folder.iterdir()] == ["rows.npy"]


@pytest.mark.parametrize("limit", [0, 5, 12, 22])
def test_an_interrupted_file_is_not_there_and_goes_on(
    file: RowFile, tmp_path: Path, limit: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(file, Compute(limit))
    assert not file.path.exists()
    with pytest.raises(CaptuneError, match=r"the rows in .* is damaged"):
        file.open("rows")
    rest = Compute()
    fill(file, rest)
    assert rest.rows == ORDER.tolist()[limit // 5 * 5 :]
    (tmp_path / "other").mkdir()
    undisturbed = RowFile(tmp_path / "other", "rows", SHAPE, "one")
    fill(undisturbed, Compute())
    assert file.path.read_bytes() == undisturbed.path.read_bytes()


def test_interrupted_after_the_last_row_only_the_name_is_left_to_give(
    file: RowFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no rename")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        # The mark itself is written by os.replace or by Path.replace: make it by hand.
        patch.setattr(rowfile, "write_json", lambda path, value: path.write_text(json.dumps(value)))
        with pytest.raises(OSError, match="no rename"):
            fill(file, Compute())
    rest = Compute()
    fill(file, rest)
    assert rest.rows == [] and np.array_equal(file.open("rows"), values(np.arange(SHAPE[0])))


@pytest.mark.parametrize(
    "other",
    [
        {"fingerprint": "two"},
        {"shape": (23, 5)},
        {"shape": (24, 4)},
    ],
)
def test_what_another_computation_left_is_not_gone_on_with(
    file: RowFile, other: dict[str, object]
) -> None:
    changed = RowFile(**{**file.__dict__, **other})
    with pytest.raises(KeyboardInterrupt):
        fill(changed, _Wider(12, changed.shape[1]))
    compute = Compute()
    fill(file, compute)
    assert compute.rows == ORDER.tolist()
    assert np.array_equal(file.open("rows"), values(np.arange(SHAPE[0])))


class _Wider(Compute):
    def __init__(self, limit: int, width: int) -> None:
        super().__init__(limit)
        self.width = width

    def __call__(self, rows: Rows) -> Halves:
        super().__call__(rows)
        return np.full((len(rows), self.width), 7, dtype=np.float16)


def test_two_files_of_one_folder_do_not_meet(file: RowFile) -> None:
    second = RowFile(file.folder, "more", SHAPE, "one")
    for one in (file, second):
        with pytest.raises(KeyboardInterrupt):
            fill(one, Compute(10))
    rest = Compute()
    fill(second, rest)
    assert rest.rows == ORDER.tolist()[10:] and not file.path.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "shape", "type", "absent"])
def test_a_damaged_file_is_refused(file: RowFile, damage: str) -> None:
    fill(file, Compute())
    if damage == "cut":
        file.path.write_bytes(file.path.read_bytes()[:-9])
    elif damage == "empty":
        file.path.write_bytes(b"")
    elif damage == "shape":
        np.save(file.path, np.zeros((3, 4), dtype=np.float16))
    elif damage == "type":
        np.save(file.path, np.zeros(SHAPE, dtype=np.float32))
    else:
        file.path.unlink()
    with pytest.raises(CaptuneError, match=r"the rows in .* is damaged"):
        file.open("rows")


@pytest.mark.parametrize("name", ["partial-rows.npy", "partial-rows.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[10]"])
def test_what_an_interruption_left_damaged_starts_over(
    file: RowFile, name: str, content: bytes
) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(file, Compute(10))
    assert (file.folder / name).is_file()
    (file.folder / name).write_bytes(content)
    compute = Compute()
    fill(file, compute)
    assert compute.rows == ORDER.tolist()
    assert np.array_equal(file.open("rows"), values(np.arange(SHAPE[0])))
