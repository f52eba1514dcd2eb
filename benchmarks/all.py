"""All figures that captune promises: python benchmarks/all.py [--data DATA] [--captions FILE].

Each part is a script of its own; what lies in benchmarks/results already is not measured again
unless --again says so, so that an interrupted run goes on where it was. Parts that need photos of
COCO's size with captions are left out where no DATA is given; the bank's can be given captions
alone, in a JSON file with COCO's `annotations`. Where there is a CUDA card, some parts are measured
on it; all others on the processor. At the end a table: target, measured, met or not, when and
where. `make bench DATA=... CAPTIONS=... AGAIN=1` calls this.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, where

Found = Mapping[str, Any]
ASKED = {"photos": "DATA=folder", "captions": "DATA=folder or CAPTIONS=file.json"}


@dataclass(frozen=True)
class Target:
    """One promised figure of a part's result, at least or at most ``bound``."""

    what: str
    bound: float
    unit: str
    read: Callable[[Found], float]
    at_least: bool = False

    def met(self, measured: float) -> bool:
        """Whether ``measured`` keeps the promise."""
        return measured >= self.bound if self.at_least else measured <= self.bound

    def row(self, found: Found | None) -> tuple[str, str, str, str]:
        """What, target, measured, and whether it is met; ``found`` None: not measured."""
        sign = "≥" if self.at_least else "≤"
        target = f"{sign} {self.bound:g} {self.unit}".rstrip()
        if found is None:
            return self.what, target, "-", "not measured"
        measured = self.read(found)
        words = "met" if self.met(measured) else "NOT met"
        return self.what, target, f"{measured:.4g} {self.unit}".rstrip(), words


@dataclass(frozen=True)
class Part:
    """A script, the name of its result, and what is promised of it."""

    script: str
    result: str
    targets: tuple[Target, ...]
    needs: str = ""  # "photos" or "captions"
    card: bool = False  # a CUDA card; the others' figures are the processor's

    @property
    def path(self) -> Path:
        """Where its result lies."""
        return RESULTS / f"{self.result}{'-gpu' * self.card}.json"

    def found(self) -> Found | None:
        """Its result, if it was measured."""
        if not self.path.is_file():
            return None
        found: Found = json.loads(self.path.read_text(encoding="utf-8"))
        return found

    def measure(self, data: str) -> bool:
        """Run the script; whether it came to its end."""
        script, *options = self.script.split()
        words = [data] if self.needs else []
        command = [sys.executable, str(Path(__file__).parent / script), *words, *options]
        cards = {} if self.card else {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, stdout=subprocess.DEVNULL, env={**os.environ, **cards})
        return done.returncode == 0


def fast(name: str) -> Callable[[Found], float]:
    """By the clock: in how many times the plain loop's time ``name`` is done."""
    return lambda found: float(found["ways"][name]["times as fast"])


def share(found: Found) -> float:
    """Of the speed from memory."""
    return float(found["share of the speed from memory"])


RESNET50 = "image_encoder=standins:resnet50 text_encoder=standins:text recipe=plain"

PARTS = (
    Part(
        f"endtoend.py {RESNET50} --batch-size 16 --steps 12 --name endtoend-resnet50",
        "endtoend-resnet50",
        (Target("ResNet-50 from photos, of its speed from memory", 0.95, "", share, True),),
        needs="photos",
    ),
    Part(
        "endtoend.py",
        "endtoend",
        (
            Target(
                "EfficientNet-Lite0 from photos, of its speed from memory", 0.95, "", share, True
            ),
        ),
        needs="photos",
    ),
    Part(
        "steps.py",
        "steps",
        (Target("ResNet-50 step, times a plain loop's speed", 3, "", fast("captune"), True),),
        needs="photos",
    ),
    Part(
        "bank.py --captions 25000",
        "bank",
        (Target("caption bank, times a plain loop's speed", 4, "", fast("bank"), True),),
        needs="captions",
    ),
    Part(
        "stage1.py",
        "stage1",
        (
            Target("stage 1, an epoch of COCO's size", 60, "s", lambda f: f["epoch, seconds"]),
            Target("its peak memory", 4, "GB", lambda f: f["peak memory, GB"]),
        ),
    ),
    Part(
        "growth.py",
        "growth",
        (
            Target(
                "memory of training, 100,000 images against 10,000",
                10,
                "%",
                lambda found: found["growth, percent"],
            ),
        ),
    ),
    Part(
        "tables.py",
        "tables",
        (
            Target("table of a million images", 120, "s", lambda f: f["parquet"]["seconds"]),
            Target("its memory", 2, "GB", lambda f: f["parquet"]["peak_bytes"] / 1e9),
            Target("table of COCO's JSON", 20, "s", lambda f: f["coco"]["seconds"]),
        ),
    ),
    Part(
        "start.py",
        "start",
        (
            Target("captune --help", 0.5, "s", lambda found: found["help"]["seconds"]),
            Target(
                "captune train to its first step", 10, "s", lambda f: f["first step"]["seconds"]
            ),
        ),
    ),
    Part(
        "ranking.py --part coco",
        "ranking-coco",
        (Target("ranks of COCO's val, in bare products", 1.2, "", lambda found: found["ratio"]),),
    ),
    Part(
        "steps.py --from-memory --batch-size 256 --steps 6",
        "steps",
        (Target("on a card: ResNet-50 step, times a plain loop's", 4, "", fast("captune"), True),),
        needs="photos",
        card=True,
    ),
    Part(
        f"endtoend.py {RESNET50} --batch-size 256 --steps 60 --pack --name endtoend-pack",
        "endtoend-pack",
        (Target("on a card: ResNet-50 from a pack, of memory's speed", 0.95, "", share, True),),
        needs="photos",
        card=True,
    ),
)


def run(parts: tuple[Part, ...], data: Mapping[str, str], again: bool) -> list[str]:
    """Measure what is wanted, on what ``data`` has for its needs; names of parts that failed."""
    failed = []
    for part in parts:
        if part.needs and not data[part.needs]:
            print(f"{part.path.stem}: left out, it needs {part.needs}: {ASKED[part.needs]}")
        elif part.card and not torch.cuda.is_available():
            print(f"{part.path.stem}: left out, it needs a CUDA card")
        elif part.path.is_file() and not again:
            print(f"{part.path.stem}: measured already, {part.found()['date']}")  # type: ignore[index]
        else:
            print(f"{part.path.stem}: measuring …", flush=True)
            if not part.measure(data.get(part.needs, "")):
                failed.append(part.path.stem)
    return failed


def table(parts: tuple[Part, ...]) -> str:
    """Target, measured, met or not, and when and where; a line each."""
    rows = [("", "target", "measured", "", "")]
    for part in parts:
        found = part.found()
        told = "" if found is None else where(found)
        rows += [(*target.row(found), told) for target in part.targets]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """Measure and sum up; 1 where a part failed to run (a target that is not met is no failure)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="", help="photos with captions: COCO layout or table")
    parser.add_argument("--captions", default="", help="for the bank; default those of DATA")
    parser.add_argument("--again", action="store_true", help="measure all parts anew")
    arguments = parser.parse_args()
    data = {"photos": arguments.data, "captions": arguments.captions or arguments.data}
    failed = run(PARTS, data, arguments.again)
    print(f"\n{table(PARTS)}")
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
