"""A file is whole or absent; wrong formats are refused with what was found."""

from __future__ import annotations

from pathlib import Path

import pytest

from captune.errors import CaptuneError
from captune.files import cache_dir, read_json, read_versioned, replacing, write_json, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half of the new", encoding="utf-8")
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_json_keeps_every_letter(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "a.json", {"caption": "ein Käse — 猫"})
    assert read_json(tmp_path / "deep" / "a.json", what="file") == {"caption": "ein Käse — 猫"}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"", b"[" * 200_000, b"9" * 5000])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CaptuneError, match=r"a\.json cannot be read as JSON"):
        read_json(tmp_path / "a.json", what="file")


@pytest.mark.parametrize("value", [{"format_version": 99}, {}, [1], "x"])
def test_another_version_is_refused(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "a.json", value)
    with pytest.raises(CaptuneError, match="this captune reads 1"):
        read_versioned(tmp_path / "a.json", what="run", version=1)


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTUNE_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("CAPTUNE_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "captune"
