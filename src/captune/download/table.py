"""An own table checked and made ready: links fetched, images decoded, failures listed."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from tqdm.auto import tqdm

from captune.data.photos import open_photo
from captune.data.sources import TABLE_SUFFIXES
from captune.data.tabular import TableOptions, is_link, read_rows
from captune.download.links import PATIENCE, fetch_images
from captune.download.photos import bounded, check_side, workers
from captune.download.record import FILE, claimed
from captune.download.stumbling import Patience
from captune.errors import CaptuneError
from captune.files import replacing

OUTPUTS = ("captions.parquet", "failures.csv")  # what is written, and what is left out of it
Row = tuple[str, list[str], str]
"""Image, captions, split (``""`` without one)."""


@dataclass
class TableReport:
    """What was found in a table.

    Attributes:
        table: the file that was read.
        written: the table that ``captune train`` takes.
        rows: rows with an image.
        images: different images.
        captions: captions for each image, empty and repeated ones not counted.
        failures: ``(image, problem)`` in the table's order.
        shared: captions that more than one image has.
        counts: how often each kind of problem occurs.
    """

    table: Path
    written: Path
    rows: int = 0
    images: int = 0
    captions: list[int] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    shared: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def failures_file(self) -> Path:
        """Where the failures are listed, if there are any."""
        return self.written.with_name(OUTPUTS[1])

    def fail(self, image: str, kind: str, detail: str = "") -> None:
        """Note a problem; ``kind`` is what the summary counts."""
        self.failures.append((image, f"{kind}: {detail}" if detail else kind))
        self.counts[kind] += 1

    def describe(self) -> str:
        """The summary, a few lines."""
        each = self.captions or [0]
        lines = [
            f"{self.table}: {self.rows:,} rows, {self.images:,} images, {sum(each):,} captions "
            f"({min(each)} to {max(each)} an image, {sum(each) / len(each):.1f} on average)"
        ]
        lines += [f"  {count:>9,}  {kind}" for kind, count in sorted(self.counts.items())]
        if self.shared:
            lines.append(f"  {self.shared:>9,}  captions that several images share (kept)")
        lines.append(f"written {self.written}: {len(self.captions):,} images")
        if self.failures:
            lines.append(f"listed  {self.failures_file}: {len(self.failures):,} problems")
        return "\n".join(lines)


def convert_table(
    path: str | Path,
    out: str | Path | None = None,
    *,
    options: TableOptions | None = None,
    shrink: int | None = None,
    patience: Patience = PATIENCE,
) -> TableReport:
    """Check a table, fetch the images behind its links, and write ``captions.parquet``.

    Every image is decoded once. What is wrong is listed in ``failures.csv`` and left out; an image
    in several splits is listed and kept. A run that was stopped fetches only what is missing.

    Args:
        out: the folder to write into, ``data/<name of the table>`` by default.
        shrink: the shorter side that fetched images get, in pixels.

    Raises:
        CaptuneError: no such table, not a table, no image of it usable, ``shrink`` without links,
            files in the folder that captune did not write.
    """
    table = Path(path).expanduser()
    check_side(shrink)
    if not table.is_file():
        raise CaptuneError(f"no table at {table}")
    if table.suffix.lower() not in TABLE_SUFFIXES:
        raise CaptuneError(f"{table} is no table that captune reads: {', '.join(TABLE_SUFFIXES)}")
    rows = list(read_rows(table, options or TableOptions()))
    if shrink and not any(is_link(image) for image, _, _ in rows):
        raise CaptuneError(f"--shrink is for images behind links; {table} names none")
    root = Path(out).expanduser() if out else Path("data") / table.stem
    _spare_input(table, root)
    with claimed(root, data="table", source=str(table), shrink=shrink) as record:
        _spare_others(root)
        record.write()
        report = TableReport(table, root / OUTPUTS[0], rows=len(rows))
        names = list(dict.fromkeys(image for image, _, _ in rows))
        report.images = len(names)
        usable = {
            **_fetched(report, [n for n in names if is_link(n)], root, shrink, patience),
            **_decoded(report, [n for n in names if not is_link(n)], root),
        }
        _note_splits(report, rows)
        chosen = _choose_captions(report, rows, usable)
        _write_failures(report)
        if not chosen:
            raise CaptuneError(
                f"none of the {len(names):,} images of {table} can be used with a caption: "
                f"{report.failures[0][0]}: {report.failures[0][1]}; all are in "
                f"{report.failures_file}"
            )
        _write_parquet(report.written, chosen)
    return report


def _spare_input(table: Path, root: Path) -> None:
    """Refuse to write over the table that is read."""
    for path in (root / name for name in OUTPUTS):
        if path.exists() and path.samefile(table):
            raise CaptuneError(
                f"{table} is the table to read, and the result would be written over it: give "
                "another folder with --out"
            )


def _spare_others(root: Path) -> None:
    """Refuse to write over files of these names that captune did not write."""
    there = [path for path in (root / name for name in OUTPUTS) if path.exists()]
    if there and not (root / FILE).exists():
        raise CaptuneError(
            f"{there[0]} is there but no {FILE}, so captune did not write it, and the result "
            "would replace it: give another folder with --out"
        )


def _fetched(
    report: TableReport, links: list[str], root: Path, shrink: int | None, patience: Patience
) -> dict[str, str]:
    """Where the image of each link lies, as the new table names it."""
    if not links:
        return {}
    results = fetch_images(links, root / "images", shrink=shrink, patience=patience)
    for link in links:
        if not results[link].name:
            report.fail(link, "link without an image", results[link].reason)
    return {link: f"images/{results[link].name}" for link in links if results[link].name}


def _decoded(report: TableReport, names: list[str], root: Path) -> dict[str, str]:
    """Where each image of the disk lies, seen from the new table; only those that decode."""
    folder = report.table.parent

    def check(name: str) -> tuple[str, str]:
        try:
            if not (folder / name).is_file():  # raises where a name is too long for the disk
                return name, "missing"
            open_photo(folder / name, least_side=32)
        # Pillow's decoders raise far more than OSError (SyntaxError, ValueError, …).
        except Exception as error:
            return name, str(error) or type(error).__name__
        return name, ""

    faults: dict[str, str] = {}
    with tqdm(total=len(names), unit="image", desc="decoding", disable=not names) as bar:
        for name, fault in bounded(check, names, threads=workers()):
            faults[name] = fault
            bar.update()
    for name in names:
        if faults[name] == "missing":
            report.fail(name, "missing file", str(folder / name))
        elif faults[name]:
            report.fail(name, "unreadable image", faults[name])
    return {name: _seen_from(root, folder / name) for name in names if not faults[name]}


def _seen_from(root: Path, image: Path) -> str:
    try:
        return Path(os.path.relpath(image.resolve(), root.resolve())).as_posix()
    except ValueError:  # another drive on Windows
        return image.resolve().as_posix()


def _note_splits(report: TableReport, rows: list[Row]) -> None:
    """An image that is trained and validated on makes every later number too good."""
    splits: dict[str, set[str]] = {}
    for image, _, split in rows:
        splits.setdefault(image, set()).add(split or "no split")
    for image, found in splits.items():
        if len(found) > 1:
            report.fail(image, "image in several splits (kept)", ", ".join(sorted(found)))


def _choose_captions(
    report: TableReport, rows: list[Row], usable: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """``(image, caption, split)`` of what can be used: no empty caption, none twice."""
    chosen: dict[tuple[str, str, str], None] = {}
    bare = {image: 0 for image, _, _ in rows if image in usable}
    images_of: dict[str, set[str]] = {}
    for image, captions, split in rows:
        if image not in usable:
            continue
        for text in (caption.strip() for caption in captions):
            if not text:
                report.fail(image, "empty caption")
            elif (usable[image], text, split) in chosen:
                report.fail(image, "caption twice for one image", text)
            else:
                chosen[usable[image], text, split] = None
                bare[image] += 1
                images_of.setdefault(text.casefold(), set()).add(image)
    for image, count in bare.items():
        if not count:
            report.fail(image, "image without a caption")
    report.captions = [count for count in bare.values() if count]
    report.shared = sum(len(images) > 1 for images in images_of.values())
    return list(chosen)


def _write_failures(report: TableReport) -> None:
    if not report.failures:
        report.failures_file.unlink(missing_ok=True)
        return
    with (
        replacing(report.failures_file) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        csv.writer(file).writerows([("image", "problem"), *report.failures])


def _write_parquet(path: Path, rows: list[tuple[str, str, str]]) -> None:
    """One caption a row; the column ``split`` only where the table had one."""
    columns = {"image": [row[0] for row in rows], "caption": [row[1] for row in rows]}
    if any(split for _, _, split in rows):
        columns["split"] = [split for _, _, split in rows]
    with replacing(path) as temporary:
        pa.parquet.write_table(pa.table(columns), temporary)
