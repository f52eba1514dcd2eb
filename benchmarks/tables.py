"""Tables of captions opened: python benchmarks/tables.py [--images N].

An own table in Parquet, a row for each of 5 N captions (N: a million), and COCO's own JSON with
82,783 images and 414,113 captions. Every image is a hard link to one of a few files: opening a
table looks whether files are there and decodes none. Each is opened in a process of its own; its
peak memory is above what the imports take.

Writes benchmarks/results/tables.json and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from memory import write_coco
from record import heading, keep

from captune import open_source

LINKS = 50_000  # to one file: some file systems allow no more than 65,000
CAPTIONS = 5
WORDS = np.array(["a", "man", "woman", "dog", "on", "the", "with", "street", "red", "two", "near"])


def write_table(folder: Path, images: int) -> Path:
    """A Parquet file of ``CAPTIONS`` rows for each image, and the images."""
    (folder / "photos").mkdir()
    for number in range(images):
        if number % LINKS == 0:
            source = folder / f"{number}.jpg"
            source.write_bytes(b"never decoded")
        os.link(source, folder / "photos" / f"{number:07d}.jpg")
    schema = pa.schema([("image", pa.string()), ("caption", pa.string())])
    rng = np.random.default_rng(0)
    path = folder / "million.parquet"
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, images, 20_000):
            numbers = np.repeat(np.arange(start, min(start + 20_000, images)), CAPTIONS)
            drawn = WORDS[rng.integers(0, len(WORDS), (len(numbers), 10))]
            names = [f"photos/{number:07d}.jpg" for number in numbers]
            writer.write_table(pa.table([names, [" ".join(row) for row in drawn]], schema=schema))
    return path


def opened(path: str, splits: list[str]) -> None:
    """Open splits one after the other; print what it took as JSON."""
    before = peak()
    began = time.perf_counter()
    source = open_source(path)
    tables = [source.table(split) for split in splits]
    digests = [table.digest for table in tables]
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - began,
                "peak_bytes": peak() - before,
                "images": sum(map(len, tables)),
                "captions": sum(table.captions.num_rows for table in tables),
                "digests": digests,
            }
        )
    )


def peak() -> int:
    """The largest resident size of this program so far, in bytes, from Linux's own account:
    ``getrusage`` would begin with that of the process which started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Write both, open each in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--opened", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.opened:
        opened(arguments.opened[0], arguments.opened[1:])
        return
    found = heading("pyarrow")
    with tempfile.TemporaryDirectory() as scratch:
        own, coco = Path(scratch) / "own", Path(scratch) / "coco"
        own.mkdir()
        table = write_table(own, arguments.images)
        write_coco(coco)
        cases = {"parquet": (table, ("train", "val")), "coco": (coco, ("train",))}
        for name, (path, splits) in cases.items():
            command = [sys.executable, __file__, "--opened", str(path), *splits]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name] = json.loads(answer.stdout)
    keep("tables", found)


if __name__ == "__main__":
    main()
