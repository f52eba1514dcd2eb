"""Training from photos against the same step from memory: python benchmarks/endtoend.py DATA.

`captune bench` (captune.workflow.bench), some times over: a step of stage 2 on a batch that lies in
memory, then training as it is, photos decoded by the loader's processes. The figure is the median
of the shares. The processor's time says nothing here: what counts is whether the step waits.

Writes benchmarks/results/endtoend.json and prints it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from record import heading, keep, median

from captune.config import Config, parse_value
from captune.workflow.bench import bench


def measure(data: str, values: dict[str, Any], steps: int, repeats: int) -> dict[str, Any]:
    """The share of each repeat, and what they were made of."""
    config = Config.from_mapping(values)
    found = [bench(data, config=config, steps=steps) for _ in range(repeats)]
    speeds = [one["images_per_second"] for one in found]
    return {
        "towers": config.towers,
        "batch_size": found[0]["batch_size"],
        "precision": found[0]["precision"],
        "workers": found[0]["workers"],
        "photo": found[0]["photo"],
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
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    parser.add_argument("values", nargs="*", metavar="key=value", help="further config values")
    arguments = parser.parse_args()
    values: dict[str, Any] = {"towers": arguments.towers, "batch_size": arguments.batch_size}
    for word in arguments.values:
        key, _, value = word.partition("=")
        values[key] = parse_value(key, value)
    result = heading("Pillow") | measure(arguments.data, values, arguments.steps, arguments.repeats)
    keep("endtoend", result, arguments.out)


if __name__ == "__main__":
    main()
