"""Own tables: links become files, faults become a list, and captune trains on what is left."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from captune.cli.main import main
from captune.data.sources import open_source
from captune.data.tabular import TableOptions
from captune.download.table import TableReport, convert_table
from captune.errors import CaptuneError
from download.web import QUICK, Server, photo


def write(path: Path, rows: list[tuple[str, ...]], header: str = "image,caption") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([tuple(header.split(",")), *rows])
    return path


def failures(report: TableReport) -> list[list[str]]:
    with report.failures_file.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def written(report: TableReport) -> list[dict[str, str]]:
    return pq.read_table(report.written).to_pylist()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    (folder / "cut.jpg").write_bytes(photo(9)[:2000])
    (folder / "text.jpg").write_bytes(b"hello")
    return folder


def test_a_table_with_every_fault(photos: Path, tmp_path: Path) -> None:
    table = write(
        tmp_path / "shop.csv",
        [
            ("photos/0.jpg", "a red shoe", "train"),
            ("photos/0.jpg", "a shoe", "train"),
            ("photos/0.jpg", "a shoe", "train"),  # twice
            ("photos/1.jpg", "a shoe", "val"),  # shared
            ("photos/1.jpg", " ", "val"),  # empty
            ("photos/2.jpg", "a hat", "train"),
            ("photos/2.jpg", "a blue hat", "val"),  # in both splits
            ("photos/3.jpg", "", "train"),  # no caption is left
            ("photos/none.jpg", "a ghost", "train"),
            ("photos/cut.jpg", "half a hat", "train"),
            ("photos/text.jpg", "words", "train"),
        ],
        "image,caption,split",
    )
    report = convert_table(table, tmp_path / "out")
    assert (report.rows, report.images, report.captions, report.shared) == (11, 7, [2, 1, 2], 1)
    assert dict(report.counts) == {
        "missing file": 1,
        "unreadable image": 2,
        "image in several splits (kept)": 1,
        "caption twice for one image": 1,
        "empty caption": 2,
        "image without a caption": 1,
    }
    assert [row[0] for row in failures(report)] == [name for name, _ in report.failures]
    assert ["photos/2.jpg", "image in several splits (kept): train, val"] in failures(report)
    assert any(row[0] == "photos/cut.jpg" and "truncated" in row[1] for row in failures(report))
    assert written(report)[0] == {
        "image": "../photos/0.jpg",
        "caption": "a red shoe",
        "split": "train",
    }
    assert len(written(report)) == 5
    said = report.describe()
    assert "11 rows, 7 images, 5 captions (1 to 2 an image, 1.7 on average)" in said
    assert "1  missing file" in said and str(report.failures_file) in said
    source = open_source(report.written)
    assert len(source.table("train")) == 2 and len(source.table("val")) == 2


def test_a_sound_table_leaves_no_list_of_failures(photos: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", [(f"photos/{n}.jpg", f"thing {n}") for n in range(4)])
    convert_table(table, tmp_path / "out")
    (tmp_path / "out" / "failures.csv").write_text("of an earlier run", encoding="utf-8")
    report = convert_table(table, tmp_path / "out")
    assert not report.failures_file.exists()
    assert pq.read_schema(report.written).names == ["image", "caption"]


def test_columns_and_templates_are_those_of_train(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "t.csv", [("photos/0.jpg", "shoe", "red")], "picture,title,colour")
    monkeypatch.chdir(tmp_path)
    words = ["data", "table", "t.csv", "--image-column", "picture", "--caption", "{colour} {title}"]
    assert main(words) == 0
    assert "data/t/captions.parquet" in capsys.readouterr().out.replace("\\", "/")
    report = TableReport(Path("t.csv"), Path("data/t/captions.parquet"))
    assert written(report) == [{"image": "../../photos/0.jpg", "caption": "red shoe"}]


# -- links ------------------------------------------------------------------------------------
def stock_images(server: Server) -> dict[str, bytes]:
    out = io.BytesIO()
    Image.new("RGBA", (80, 60), (0, 255, 0, 128)).save(out, "PNG")
    server.files |= {f"/{number}": photo(number) for number in range(6)}
    server.files |= {"/green": out.getvalue(), "/page": b"<html>gone</html>"}
    return server.files


def linked(server: Server, tmp_path: Path, *more: str) -> Path:
    names = ["0", "1", "2", "3", "4", "5", "green", *more]
    rows = [(server.url(f"/{name}"), f"a picture of {name}") for name in names]
    return write(tmp_path / "web.csv", rows)


def test_links_become_files_that_captune_reads(server: Server, tmp_path: Path) -> None:
    files = stock_images(server)
    table = linked(server, tmp_path, "page", "none")
    report = convert_table(table, tmp_path / "out", patience=QUICK)
    rows = written(report)
    assert len(rows) == 7
    for row, name in zip(rows, ["0", "1", "2", "3", "4", "5", "green"], strict=True):
        assert row["caption"] == f"a picture of {name}"
        assert (tmp_path / "out" / row["image"]).read_bytes() == files[f"/{name}"]
    assert rows[0]["image"].endswith(".jpg") and rows[6]["image"].endswith(".png")
    problems = {row[0].rsplit("/", 1)[1]: row[1] for row in failures(report)}
    assert set(problems) == {"page", "none"}
    assert "no image" in problems["page"]
    assert "the server answered 404" in problems["none"]
    table_of = open_source(report.written).table("all")
    assert len(table_of) == 7


def test_a_second_run_asks_only_for_what_is_missing(server: Server, tmp_path: Path) -> None:
    stock_images(server)
    table = linked(server, tmp_path)
    first = convert_table(table, tmp_path / "out", patience=QUICK)
    rows = written(first)
    server.asked.clear()
    (tmp_path / "out" / rows[2]["image"]).unlink()
    (tmp_path / "out" / rows[3]["image"]).write_bytes(b"")
    again = convert_table(table, tmp_path / "out", patience=QUICK)
    assert sorted(path for path, _ in server.asked) == ["/2", "/3"]
    assert written(again) == rows


def test_a_link_in_many_rows_is_fetched_once(server: Server, tmp_path: Path) -> None:
    stock_images(server)
    table = write(tmp_path / "w.csv", [(server.url("/0"), f"caption {n}") for n in range(20)])
    convert_table(table, tmp_path / "out", patience=QUICK)
    assert len(server.asked) == 1


def test_a_server_that_stumbles_is_asked_again(server: Server, tmp_path: Path) -> None:
    stock_images(server)
    server.failures = 3
    report = convert_table(linked(server, tmp_path), tmp_path / "out", patience=QUICK)
    assert report.failures == []


def test_links_can_be_shrunk(server: Server, tmp_path: Path) -> None:
    stock_images(server)
    table = linked(server, tmp_path)
    report = convert_table(table, tmp_path / "out", shrink=45, patience=QUICK)
    with Image.open(tmp_path / "out" / written(report)[0]["image"]) as image:
        assert image.size == (60, 45)
    with pytest.raises(CaptuneError, match="holds photos of --shrink 45"):
        convert_table(table, tmp_path / "out", patience=QUICK)


def test_when_no_image_can_be_had_the_command_fails(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write(tmp_path / "w.csv", [(server.url("/none"), "a"), (server.url("/gone"), "b")])
    assert main(["data", "table", str(table), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "none of the 2 images" in said.err and "failures.csv" in said.err and said.out == ""
    with (tmp_path / "out" / "failures.csv").open(encoding="utf-8") as file:
        assert len(list(csv.reader(file))) == 3


def test_training_on_links_points_to_this_command(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = linked(server, tmp_path)
    assert main(["train", str(table), "num_workers=0"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"`captune data table {table}`" in line and server.address in line
    assert server.asked == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [("none.csv", "no table at"), ("folder", "no table at"), ("a.txt", ".csv")],
)
def test_what_is_no_table_is_named(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("image,caption\n", encoding="utf-8")
    with pytest.raises(CaptuneError, match=expected):
        convert_table(tmp_path / name, tmp_path / "out")


def test_shrink_is_for_links(photos: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", [("photos/0.jpg", "a thing")])
    with pytest.raises(CaptuneError, match="--shrink is for images behind links"):
        convert_table(table, tmp_path / "out", options=TableOptions(), shrink=64)
