"""Memory of training by the number of images: python benchmarks/growth.py [--images N ...].

`captune train` with both stages, an epoch each, and its report, on folders of 10,000 and 100,000
images (five captions each; every image one of a few JPEGs of 32 pixels, small towers with random
weights), each in a fresh process. The figure is the largest sum of *anonymous* memory, shared pages
counted once (Pss_Anon), of the process and its loaders: pages mapped from bank and features can be
dropped at any time and are left out. Linux only.

Writes benchmarks/results/growth.json and prints it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from memory import PeakMemory, write_coco
from record import heading, keep

HERE = Path(__file__).parent
VALIDATION = 500


class PeakAnonymous(PeakMemory):
    """The largest anonymous memory of this process and its children, sampled."""

    def _bytes_of(self, process: psutil.Process) -> int:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
        return 1024 * int(rollup.split("Pss_Anon:")[1].split()[0])


def write_data(folder: Path, images: int) -> None:
    """A COCO folder with a small validation split."""
    write_coco(folder, images=images, captions=5 * images, size=(32, 32))
    write_coco(
        folder,
        images=VALIDATION,
        captions=5 * VALIDATION,
        size=(32, 32),
        split="val",
        first=10_000_000,
    )


def train(folder: str) -> None:
    """Train in this process on the data in ``folder``; print the peak."""
    from captune import device
    from captune.cli.main import main as captune

    device.MEMORY_TO_SPARE = math.inf  # as where memory is short
    towers = ["image_encoder=standins:small", "text_encoder=standins:text", "hidden_dim=64"]
    values = ["head_epochs=1", "num_epochs=1", "log_with=none"]
    words = ["train", folder, "--out", f"{folder}-run", "--json", *towers, *values]
    began = time.perf_counter()
    with PeakAnonymous() as peak, contextlib.redirect_stdout(sys.stderr):
        code = captune(words)
    seconds = time.perf_counter() - began
    print(json.dumps({"code": code, "bytes": peak.bytes, "seconds": round(seconds, 1)}))


def measure(images: int) -> dict[str, Any]:
    """A training in a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "coco"
        write_data(folder, images)
        environment = {
            **os.environ,
            "CAPTUNE_CACHE": str(Path(scratch) / "cache"),
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, str(HERE / "growth.py"), "--train", str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found = json.loads(done.stdout)
    if found["code"] != 0:
        sys.exit(done.stderr)
    return {
        "images": images,
        "peak anonymous MB": round(found["bytes"] / 1e6, 1),
        "seconds": found["seconds"],
    }


def main() -> None:
    """Measure, keep and print."""
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=(10_000, 100_000))
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    arguments = parser.parse_args()
    result = heading()
    rows = [measure(images) for images in arguments.images]
    first, last = (rows[place]["peak anonymous MB"] for place in (0, -1))
    keep(
        "growth",
        result | {"rows": rows, "growth, percent": round(100 * (last / first - 1), 1)},
        arguments.out,
    )


if __name__ == "__main__":
    main()
