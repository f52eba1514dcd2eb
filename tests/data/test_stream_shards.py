"""Shards of anywhere: what a pattern names, what a tar file holds, and what is passed over."""

from __future__ import annotations

import io
import json
import pickle
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from captune.data import stream_shards
from captune.data.stream_shards import (
    Shard,
    ShardReader,
    ShardSample,
    expand_pattern,
    find_shards,
    is_pattern,
)
from captune.errors import CaptuneError, MissingExtraError
from shards import caption, photo, sample, tar_of, write_shards


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_shards, "PAUSES", (0.0,) * 4)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """An HTTP server of ``tmp_path`` on the loopback."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def read(path: Path, members: list[tuple[str, bytes]]) -> tuple[list[ShardSample], dict[str, str]]:
    """The samples of a tar of ``members``, and the problems without the shard's own name."""
    path.write_bytes(tar_of(members))
    reader = ShardReader(str(path))
    samples = list(reader)
    return samples, {name.removeprefix(f"{path}::"): why for name, why in reader.problems.items()}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("photos.csv", False),
        ("coco2014", False),
        ("s3://photos/a.tar", True),
        ("cc-{0..9}.tar", True),
        ("shards/*", True),
        ("one.tar", True),
        ("one.tar.gz", True),
    ],
)
def test_what_is_taken_for_shards(data: str, expected: bool) -> None:
    assert is_pattern(data) is expected


def test_a_folder_may_have_brackets_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "photos [2024]").mkdir()
    assert not is_pattern(str(tmp_path / "photos [2024]"))
    assert is_pattern(str(tmp_path / "photos [2025]"))


def test_braces_and_wildcards_name_local_shards_in_order(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, [1, 1, 1])
    expected = [str(tmp_path / f"squares-0{number}.tar") for number in range(3)]
    assert expand_pattern(pattern) == expected
    assert expand_pattern(f"{tmp_path}/squares-*.tar") == expected
    assert expand_pattern(f"{tmp_path}/squares-0?.tar") == expected
    assert expand_pattern(f"{tmp_path}/squares-{{02,00}}.tar") == [expected[2], expected[0]]
    assert [shard.size for shard in find_shards(expected)] == [
        Path(p).stat().st_size for p in expected
    ]


def test_relative_paths_become_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert expand_pattern("a-{0..1}.tar") == [str(tmp_path / f"a-{n}.tar") for n in (0, 1)]


def test_urls_of_other_stores(tmp_path: Path, web: str) -> None:
    write_shards(tmp_path, [2])
    content = (tmp_path / "squares-00.tar").read_bytes()
    store = fsspec.filesystem("memory")
    store.pipe("/urls/a-0.tar", content)
    store.pipe("/urls/a-1.tar", content)
    kept = [f"memory:///urls/a-{number}.tar" for number in (0, 1)]
    assert expand_pattern("memory:///urls/a-{0..1}.tar") == kept
    listed = expand_pattern("memory:///urls/a-*.tar")
    assert [shard.size for shard in find_shards([*kept, *listed])] == [len(content)] * 4
    local = list(ShardReader(str(tmp_path / "squares-00.tar")))
    assert [item.captions for item in local] == [[caption(0)], [caption(1)]]
    for url in (*kept, *listed, f"{web}/squares-00.tar"):
        assert [item[1:] for item in ShardReader(url)] == [item[1:] for item in local]
    assert find_shards([f"{web}/squares-00.tar"])[0].size == len(content)
    with pytest.raises(CaptuneError, match=r"1 of 2 shards are not there.*squares-09\.tar"):
        find_shards([f"{web}/squares-00.tar", f"{web}/squares-09.tar"])


def test_what_a_pattern_may_do_wrong(tmp_path: Path) -> None:
    write_shards(tmp_path, [1])
    for pattern, words in (
        (f"{tmp_path}/none-*.tar", "no shard matches"),
        (f"{tmp_path}/a-{{0..1.tar", "Unbalanced"),
        (f"{tmp_path}/squares-{{00,00}}.tar", "more than once"),
        ("nowhere://bucket/*.tar", "cannot be listed"),
    ):
        with pytest.raises(CaptuneError, match=words) as caught:
            expand_pattern(pattern)
        assert "\n" not in str(caught.value)
    for url, words in (
        (str(tmp_path), "is a folder"),
        (f"{tmp_path}/squares-07.tar", "1 of 1 shards are not there"),
        ("nowhere://bucket/a.tar", "cannot be reached"),
        (f"pipe:touch {tmp_path}/ran #://a.tar", "cannot be reached"),  # webdataset would run it
    ):
        with pytest.raises(CaptuneError, match=words) as caught:
            find_shards([url])
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("fsspec", "webdataset"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingExtraError, match=r"captune\[shards\]") as caught:
                expand_pattern("a.tar")
            assert package in str(caught.value)


def test_captions_as_text_and_as_json(tmp_path: Path) -> None:
    stated = {
        "a": {"caption": "one"},
        "b": {"captions": ["one", " two ", "", 3]},
        "c": {"caption": "of the metadata", "width": 7},
        "d": {"caption": ["one", "two"]},
        "e": {"captions": ["half a character \ud800"]},
    }
    members = []
    for key, value in stated.items():
        members += [(f"{key}.jpg", photo(0)), (f"{key}.json", json.dumps(value).encode())]
        members += [("c.txt", b" the text\n")] if key == "c" else []
    samples, problems = read(tmp_path / "a.tar", members)
    assert [item.captions for item in samples] == [
        ["one"],
        ["one", "two"],
        ["the text"],
        ["one", "two"],
        ["half a character ?"],
    ]
    assert problems == {}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_pictures_of_all_kinds_and_folders_inside(tmp_path: Path, mode: str) -> None:
    kinds = {"jpg": "JPEG", "JPEG": "JPEG", "png": "PNG", "webp": "WEBP"}
    members = []
    for place, (ending, kind) in enumerate(kinds.items()):
        members += [(f"in/{place}.{ending}", photo(place, kind)), (f"in/{place}.txt", b"words")]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of([("__meta__", b"x"), *members], mode))
    samples = list(ShardReader(str(path)))
    assert [item.image for item in samples] == [m[1] for m in members if m[1] != b"words"]
    assert samples[0].name == f"{path}::in/0.jpg"


def test_what_is_no_sample_is_named_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_shards, "LARGEST_MEMBER", 5000)
    members = [
        *sample(0),
        ("1.jpg", photo(1)),
        ("2.txt", b"no picture"),
        ("3.jpg", photo(3)),
        ("3.json", b"{no json"),
        ("4.jpg", photo(4)),
        ("4.txt", b"\xff\xfe"),
        ("5.jpg", photo(5)),
        ("5.jpg", photo(6)),
        ("5.txt", b"five"),
        ("6.jpg", b"\0" * 5001),
        ("6.txt", b"huge"),
        ("7.jpg", photo(7)),
        ("7.txt", b"  \n"),
        ("8.jpg", photo(8)),
        ("8.json", b"[" * 3000),
        *sample(9),
    ]
    samples, problems = read(tmp_path / "a.tar", members)
    assert [item.captions for item in samples] == [[caption(0)], ["five"], [caption(9)]]
    assert samples[1].image == photo(5)
    assert set(problems) == {"1", "2", "3", "4", "5.jpg", "6", "6.jpg", "7", "8"}
    assert (problems["1"], problems["2"], problems["5.jpg"]) == (
        "no caption",
        "no image",
        "named twice",
    )


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "sprung"), "w")

    trap = pickle.dumps(Trap())
    members = [("0.jpg", photo(0))]
    members += [(f"0.{kind}", trap) for kind in ("pyd", "pkl", "pickle", "pth", "cls", "npy")]
    samples, problems = read(tmp_path / "a.tar", [*members, ("0.txt", b"words")])
    assert [item.captions for item in samples] == [["words"]] and problems == {}
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("cut", [512, 1000, 1100, 1536, 700])
def test_a_tar_cut_short_gives_what_it_holds(tmp_path: Path, cut: int) -> None:
    """In a photo, in a caption, in a header, and between two members."""
    whole = tar_of([member for number in range(6) for member in sample(number)])
    path = tmp_path / "a.tar"
    last = tar_of([member for number in range(5) for member in sample(number)]).rstrip(b"\0")
    path.write_bytes(whole[: -(-len(last) // 512) * 512 + cut])
    reader = ShardReader(str(path))
    found = [item.captions[0] for item in reader]
    assert len(found) == 5
    assert found == [caption(number) for number in range(len(found))]
    assert f"damaged after {len(found)} samples" in reader.problems[str(path)]


def test_a_file_that_is_no_tar_has_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"<html>not found</html>" * 100)
    reader = ShardReader(str(path))
    assert list(reader) == [] and "damaged after 0 samples" in reader.problems[str(path)]


class Stumbling:
    """A store whose files fail, or end, after some bytes, the first ``times`` they are read."""

    def __init__(self, content: bytes, after: int, times: int, *, ends: bool) -> None:
        self.content, self.after, self.times, self.ends = content, after, times, ends
        self.opened = 0

    def open(self, url: str, mode: str) -> Any:
        self.opened += 1
        if self.opened > self.times:
            return io.BytesIO(self.content)
        store = self

        class File(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                if self.tell() + (size or 0) > store.after and not store.ends:
                    raise ConnectionResetError("the line broke")
                return super().read(size)

        return File(self.content[: self.after] if self.ends else self.content)


@pytest.mark.parametrize("ends", [False, True])
def test_a_line_that_breaks_loses_and_repeats_nothing(
    monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    content = tar_of([member for number in range(20) for member in sample(number)])
    store = Stumbling(content, len(content) // 2, 1, ends=ends)
    monkeypatch.setattr(fsspec, "open", store.open)
    reader = ShardReader("far://a.tar")
    assert [item.captions for item in reader] == [[caption(number)] for number in range(20)]
    assert store.opened == 2 and reader.problems == {}


def test_a_line_that_stays_broken_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    content = tar_of([member for number in range(20) for member in sample(number)])
    store = Stumbling(content, len(content) // 2, 99, ends=False)
    monkeypatch.setattr(fsspec, "open", store.open)
    with pytest.raises(CaptuneError, match=r"far://a\.tar cannot be read after .* the line broke"):
        list(ShardReader("far://a.tar"))
    assert store.opened == 4


def test_a_shard_that_changes_has_another_version(tmp_path: Path) -> None:
    write_shards(tmp_path, [1])
    path = tmp_path / "squares-00.tar"
    before = find_shards([str(path)])
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    assert find_shards([str(path)]) != before
    assert isinstance(before[0], Shard)
