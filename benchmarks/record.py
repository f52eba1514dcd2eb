"""What all benchmarks share: machine and versions, turns, processor time, and where results lie."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from captune import __version__
from captune.device import has_native_bf16
from captune.files import write_json

VERSION = 1
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Taken:
    """Seconds by the clock, and of all processors (this process and children that have ended)."""

    seconds: float
    processor: float


def timed(work: Callable[[], Any]) -> Taken:
    """What one call of ``work`` takes."""
    clock, processor = time.perf_counter(), processor_seconds()
    work()
    return Taken(time.perf_counter() - clock, processor_seconds() - processor)


def processor_seconds() -> float:
    """User and system time of this process's threads and of its children that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def in_turns(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[Taken]]:
    """Each way ``repeats`` times, taking turns, so that other work on the machine meets all."""
    taken: dict[str, list[Taken]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            taken[name].append(timed(work))
    return taken


def summary(taken: Mapping[str, list[Taken]]) -> dict[str, Any]:
    """Medians of each way, and in how many times the first way's time each is done.

    A ratio is of two turns of one repeat; the figure is the median over repeats.
    """
    first = next(iter(taken.values()))
    return {
        name: {
            "seconds": median([one.seconds for one in turns]),
            "processor seconds": median([one.processor for one in turns]),
            "times as fast": ratio(first, turns, "seconds"),
            "times as fast, processor": ratio(first, turns, "processor"),
            "turns": [[round(one.seconds, 4), round(one.processor, 4)] for one in turns],
        }
        for name, turns in taken.items()
    }


def ratio(first: list[Taken], turns: list[Taken], what: str) -> float:
    """The median over repeats of ``first`` in times of ``turns``."""
    pairs = zip(first, turns, strict=True)
    return median([getattr(a, what) / getattr(b, what) for a, b in pairs])


def median(values: list[float]) -> float:
    """With four digits."""
    return float(f"{statistics.median(values):.4g}")


def machine() -> dict[str, Any]:
    """Processor, cores, threads, precision, memory, and how busy the machine was."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": has_native_bf16(torch.device("cpu")),
        "memory GB": round(psutil.virtual_memory().total / 1e9, 1),
        "load before": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    """Its name, where Linux tells it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def device_name(device: torch.device) -> str:
    """``cpu``, or what the card is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def versions(*packages: str) -> dict[str, str]:
    """Of captune, Python, torch and ``packages``."""
    found = {"captune": __version__, "Python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in ("torch", *packages)}


def heading(*packages: str, device: torch.device | None = None) -> dict[str, Any]:
    """What every result begins with; ``device``: what computes, where it is not the processor."""
    return {
        "format_version": VERSION,
        "date": date.today().isoformat(),
        "machine": machine(),
        "device": device_name(device or torch.device("cpu")),
        "versions": versions(*packages),
    }


def keep(name: str, result: Mapping[str, Any], folder: Path | None = None) -> None:
    """Write ``results/NAME.json``, or into ``folder``, and print what was found.

    What was measured on a card (``device`` says so) is ``NAME-gpu``, beside that of the processor.
    """
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    card = result.get("device", "cpu") != "cpu"
    write_json(folder / f"{name}{'-gpu' * card}.json", dict(result))
    print(json.dumps(result, indent=2))


def where(result: Mapping[str, Any]) -> str:
    """The day of a result, and the card or processor that it was measured on."""
    machine = result.get("machine", {})
    card = result.get("device", "cpu")
    return f"{result['date']}, {machine['processor'] if card == 'cpu' else card}"
