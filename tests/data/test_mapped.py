"""A mapped table is the same table, in a file of the cache in place of memory."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captune.data import mapped as mapped_module
from captune.data.mapped import mapped
from captune.files import cache_dir


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_module, "WORTH_A_FILE", 0)
    monkeypatch.setattr(mapped_module, "ROWS_AT_ONCE", 3)


def table_of(texts: list[str]) -> pa.Table:
    return pa.table({"caption": pa.array(texts, pa.string()), "image": range(len(texts))})


def files() -> list[Path]:
    return sorted((cache_dir() / "tables").iterdir())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(), min_size=1, max_size=12), st.integers(1, 12))
def test_the_same_rows_in_one_chunk(texts: list[str], at: int) -> None:
    in_two = pa.concat_tables([table_of(texts)[:at], table_of(texts)[at:]])
    found = mapped(in_two)
    assert found.equals(table_of(texts))
    assert found.schema == in_two.schema
    assert [column.num_chunks for column in found.columns] == [1, 1]


def test_it_takes_no_memory() -> None:
    texts = [f"caption {number} " + "long " * 20 for number in range(10_000)]
    before = pa.total_allocated_bytes()
    table = table_of(texts)
    assert pa.total_allocated_bytes() > before + 1_000_000  # else this proves nothing
    table = mapped(table)
    assert pa.total_allocated_bytes() < before + 10_000
    assert table["caption"].to_pylist() == texts


def test_one_file_for_one_content() -> None:
    mapped(table_of(["a", "b", "c", "d"]))
    (first,) = files()
    written = first.stat().st_mtime_ns
    mapped(
        pa.concat_tables([table_of(["a", "b", "c", "d"])[:1], table_of(["a", "b", "c", "d"])[1:]])
    )
    assert files() == [first] and first.stat().st_mtime_ns == written
    mapped(table_of(["a", "b", "c", "e"]))
    mapped(table_of(["a", "b", "c", "d"]).rename_columns(["text", "image"]))
    assert len(files()) == 3


@pytest.mark.parametrize("left", [0, 7, 300])
def test_a_file_cut_short_is_written_again(left: int) -> None:
    mapped(table_of(["a", "b"]))
    (file,) = files()
    file.write_bytes(file.read_bytes()[:left])
    assert mapped(table_of(["a", "b"])).equals(table_of(["a", "b"]))
    assert mapped_module._open(file).equals(table_of(["a", "b"]))


def test_without_a_cache_it_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder can be made in here", encoding="utf-8")
    monkeypatch.setenv("CAPTUNE_CACHE", str(tmp_path / "file" / "cache"))
    table = table_of(["a", "b"])
    assert mapped(table) is table


def test_a_small_table_is_not_worth_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_module, "WORTH_A_FILE", 1 << 20)
    table = table_of(["a", "b"])
    assert mapped(table) is table
    assert not (cache_dir() / "tables").exists()
