"""The index of a stream: what is where, read once, and made anew when a shard changes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captune.data import stream_table
from captune.data.stream_table import StreamTable, pattern_name, rotated
from captune.errors import CaptuneError
from captune.files import cache_dir
from shards import caption, photo, sample, tar_of, write_shards

SIZES = [4, 1, 6]
CAPTIONS = 3


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    return write_shards(tmp_path / "s", SIZES, CAPTIONS)


def test_rows_are_numbered_through_all_shards(pattern: str) -> None:
    """Against plain lists of all captions."""
    table = StreamTable.open(pattern)
    texts = [text for shard in table.shards for text in shard.texts()]
    assert texts == [caption(n, turn) for n in range(sum(SIZES)) for turn in range(CAPTIONS)]
    assert (len(table), table.num_captions) == (11, 33)
    owner = np.repeat(np.arange(11), CAPTIONS)
    assert [table.captions_of(n).tolist() for n in range(11)] == [
        np.flatnonzero(owner == n).tolist() for n in range(11)
    ]
    rows = np.random.default_rng(0).permutation(33)
    assert table.owners_of(rows).tolist() == owner[rows].tolist()
    assert table.ids_of(np.array([3, 1])).tolist() == [3, 1]
    assert table.negatives_for(np.array([10, 4, 5])) == [range(12, 15), range(15, 33)]
    assert table.describe() == "squares: 3 shards, 11 images, 33 captions"
    assert table.file_keys() == []


def test_few_shards_are_held_at_a_time(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_table, "STARTS_KEPT", 1)
    table = StreamTable.open(pattern)
    assert [table.captions_of(n)[0] for n in (0, 4, 10, 0)] == [0, 12, 30, 0]
    assert len(table._recent) == 1


def test_a_shard_is_read_once_until_it_changes(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = stream_table.ShardReader

    def reader(url: str) -> Any:
        read.append(Path(url).name)
        return real(url)

    monkeypatch.setattr(stream_table, "ShardReader", reader)
    first = StreamTable.open(pattern)
    assert sorted(read) == [f"squares-0{n}.tar" for n in range(3)]
    again = StreamTable.open(pattern)
    assert len(read) == 3 and again.record() == first.record()
    path = tmp_path / "s" / "squares-01.tar"
    path.write_bytes(tar_of([*sample(4), *sample(99)]))
    changed = StreamTable.open(pattern)
    assert read[3:] == ["squares-01.tar"]
    assert len(changed) == 12 and changed.digest != first.digest


def test_names_may_be_of_any_bytes(tmp_path: Path) -> None:
    """A tar of another age or system holds names that are no UTF-8."""
    out = tmp_path / "old.tar"
    with tarfile.open(out, "w", encoding="latin-1") as archive:
        for name, content in (("caf\xe9.jpg", photo(1)), ("caf\xe9.txt", b"a cup of coffee")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    table = StreamTable.open(str(out))
    assert len(table) == 1 and table.shards[0].texts() == ["a cup of coffee"]
    assert table.shards[0].marks().shape == (1,)


def test_what_was_cut_short_is_read_again(pattern: str) -> None:
    first = StreamTable.open(pattern)
    (Path(first.shards[1].folder) / "index.json").unlink()  # it is written last
    assert StreamTable.open(pattern).record() == first.record()


def test_a_damaged_cache_is_named(pattern: str) -> None:
    table = StreamTable.open(pattern)
    folder = Path(table.shards[0].folder)
    for name, use in (
        ("starts.npy", lambda: StreamTable(pattern, table.shards).captions_of(0)),
        ("captions.parquet", table.shards[0].texts),
        ("index.json", lambda: StreamTable.open(pattern)),
    ):
        (folder / name).write_bytes(b"{}")
        with pytest.raises(CaptuneError, match=folder.name):
            use()


def test_another_version_is_refused(pattern: str) -> None:
    path = Path(StreamTable.open(pattern).shards[0].folder) / "index.json"
    stated = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**stated, "format_version": 99}), encoding="utf-8")
    with pytest.raises(CaptuneError, match="format_version 99"):
        StreamTable.open(pattern)


def test_what_is_left_out_is_said_in_one_line_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        members = [*sample(number), ("bare.jpg", photo(1)), ("deaf.txt", b"no picture")]
        (tmp_path / f"a-{number}.tar").write_bytes(tar_of(members))
    table = StreamTable.open(f"{tmp_path}/a-*.tar")
    assert table.left_out == table.record()["left_out"] == 4
    told = [line for line in capsys.readouterr().err.splitlines() if "left out of a" in line]
    assert len(told) == 1
    assert "a-0.tar::bare (no caption)" in told[0] and "and 1 more" in told[0]


@pytest.mark.parametrize("members", [[], [("0.jpg", b"x")], [("0.txt", b"words")]])
def test_a_shard_without_captions_is_an_error(
    tmp_path: Path, members: list[tuple[str, bytes]]
) -> None:
    pattern = write_shards(tmp_path, [1, 1])
    (tmp_path / "squares-01.tar").write_bytes(tar_of(members))
    with pytest.raises(CaptuneError, match=r"squares-01\.tar has no picture with a caption"):
        StreamTable.open(pattern)
    assert (
        not list((cache_dir() / "shards").glob("*/index.json"))
        or len(list((cache_dir() / "shards").glob("*/index.json"))) == 1
    )


def test_processes_begin_at_shares_of_their_own() -> None:
    assert rotated(5, 0, 1) == [0, 1, 2, 3, 4]
    assert [rotated(5, rank, 2) for rank in (0, 1)] == [[0, 1, 2, 3, 4], [2, 3, 4, 0, 1]]
    assert [rotated(2, rank, 3)[0] for rank in range(3)] == [0, 0, 1]


def test_the_index_is_the_same_whichever_process_opens_it(pattern: str) -> None:
    records = [StreamTable.open(pattern, rank=rank, world_size=3).record() for rank in range(3)]
    assert records[0] == records[1] == records[2]


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("shards/cc-{00000..00009}.tar", "cc"),
        ("s3://bucket/photos/{00000..00009}.tar", "photos"),
        ("s3://bucket/laion_*.tar.gz", "laion"),
        ("one.tar", "one"),
        ("{0..9}.tar", "stream"),
    ],
)
def test_a_stream_is_named_after_its_pattern(pattern: str, name: str) -> None:
    assert pattern_name(pattern) == name
