"""Training from photos against the same step from memory: python benchmarks/endtoend.py DATA.

`captune bench` (captune.workflow.bench), some times over: a step of stage 2 on a batch that lies in
memory, then training as it is, photos decoded by the loader. The figure is the median
of the shares. The processor's time says nothing here: what counts is whether the step waits.

Photos are taken again from the first on where DATA has too few; with `--pack` they are first packed
(`captune data pack`).

Writes benchmarks/results/endtoend.json, or what `--name` says (with -gpu on a card), and prints it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import device_name, heading, keep, median
from standins import copies

from captune.config import Config, parse_value
from captune.download.pack import pack
from captune.workflow.bench import WARM_UP, bench


def measure(
    data: str, values: dict[str, Any], steps: int, repeats: int, packed: bool = False
) -> dict[str, Any]:
    """The share of each repeat, and what they were made of."""
    config = Config.from_mapping({"train_split": "train", **values})
    with tempfile.TemporaryDirectory() as scratch:
        images = config.batch_size * (steps + WARM_UP)
        folder = copies(data, Path(scratch) / "photos", images)
        if packed:
            pack(folder, Path(scratch) / "pack", splits=["train"])
            folder = Path(scratch) / "pack"
        found = [bench(str(folder), config=config, steps=steps) for _ in range(repeats)]
    speeds = [one["images_per_second"] for one in found]
    return {
        "towers": config.towers,
        "batch_size": found[0]["batch_size"],
        "precision": found[0]["precision"],
        "workers": found[0]["workers"],
        "photo": found[0]["photo"],
        "packed": packed,
        "device": device_name(torch.device(found[0]["device"])),
        "steps of a repeat": steps,
        "share of the speed from memory": median([one["share_of_ceiling"] for one in found]),
        "shares": [round(one["share_of_ceiling"], 4) for one in found],
        "images a second": {name: median([one[name] for one in speeds]) for name in speeds[0]},
    }


def main() -> None:
    """Measure, keep and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--towers", default="minilm-lite0")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pack", action="store_true", help="pack the photos first")
    parser.add_argument("--name", default="", help="of the result; default endtoend[-pack]")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    parser.add_argument("values", nargs="*", metavar="key=value", help="further config values")
    arguments = parser.parse_args()
    values: dict[str, Any] = {"towers": arguments.towers, "batch_size": arguments.batch_size}
    for word in arguments.values:
        key, _, value = word.partition("=")
        values[key] = parse_value(key, value)
    found = measure(arguments.data, values, arguments.steps, arguments.repeats, arguments.pack)
    name = arguments.name or "endtoend" + "-pack" * arguments.pack
    keep(name, heading("Pillow") | found, arguments.out)


if __name__ == "__main__":
    main()
