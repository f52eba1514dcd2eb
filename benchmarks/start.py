"""Seconds until something happens: python benchmarks/start.py [--repeats N] [--images N].

`captune --help`, and `captune train` on a folder of COCO's size (82,783 images, 414,113 captions,
5,000 images more to validate on, every image one of a few JPEGs) until its first step begins:
tables, banks (there already), a ResNet-50 with random weights, loader processes and the first batch
of 128 photos. Each in fresh processes, from their start on, Python and all imports included. The
first process, which builds the banks, is not counted. Without stage 1, which would first pass all
photos.

Writes benchmarks/results/start.json and prints it.
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
from typing import Any

import psutil
from memory import CAPTIONS, IMAGES, write_coco
from record import heading, keep, median, timed

HERE = Path(__file__).parent
VALIDATION = 5000


def first_step(words: list[str]) -> None:
    """`captune` with ``words``; when the first step begins, print seconds and leave."""
    from captune.cli.main import main as captune
    from captune.training import steps

    def begins(*_: Any, **__: Any) -> Any:
        since_start = time.time() - psutil.Process().create_time()
        spent = time.process_time()
        print(json.dumps({"seconds": since_start, "processor seconds": spent}), flush=True)
        raise KeyboardInterrupt

    steps.train_step = begins
    sys.exit(captune(words))


def help_seconds(repeats: int) -> dict[str, Any]:
    """Of `captune --help`."""
    command = [sys.executable, "-m", "captune", "--help"]
    taken = [
        timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        for _ in range(repeats)
    ]
    return {
        "seconds": median([one.seconds for one in taken]),
        "processor seconds": median([one.processor for one in taken]),
    }


def step_seconds(folder: Path, repeats: int, images: int, captions: int) -> dict[str, Any]:
    """Of `captune train` to its first step, the main process's processor seconds with it."""
    write_coco(folder / "coco", images=images, captions=captions)
    write_coco(
        folder / "coco",
        images=VALIDATION,
        captions=5 * VALIDATION,
        split="val",
        first=10_000_000,
    )
    towers = ["image_encoder=standins:resnet50", "text_encoder=standins:text"]
    splits = ["train_split=train", "val_split=val", "head_epochs=0", "log_with=none"]
    environment = {
        **os.environ,
        "CAPTUNE_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    found = []
    for number in range(repeats + 1):
        out = ["--out", str(folder / f"run{number}")]
        words = ["train", str(folder / "coco"), *out, *towers, *splits]
        command = [sys.executable, str(HERE / "start.py"), "--first-step", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if not done.stdout:
            sys.exit(done.stderr)
        found.append(json.loads(done.stdout))
    return {
        "images": images,
        "captions": captions,
        **{key: median([one[key] for one in found[1:]]) for key in found[0]},
        "building the bank too, seconds": median([found[0]["seconds"]]),
    }


def main() -> None:
    """Measure, keep and print."""
    if sys.argv[1:2] == ["--first-step"]:
        first_step(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    arguments = parser.parse_args()
    result = heading() | {"help": help_seconds(arguments.repeats)}
    with tempfile.TemporaryDirectory() as scratch:
        result["first step"] = step_seconds(
            Path(scratch), arguments.repeats, arguments.images, arguments.captions
        )
    keep("start", result, arguments.out)


if __name__ == "__main__":
    main()
