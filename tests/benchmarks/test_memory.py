"""The memory that the README promises, measured at COCO's size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"


def test_training_on_coco_fits_a_free_colab(tmp_path: Path) -> None:
    """12 GB of memory, and 15 GB on the GPU where there is one."""
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["images"], found["captions"]) == (82_783, 414_113)
    assert found["trainable_parameters"] == 26_131_008
    # Less than what the arrays alone take would mean that nothing was measured.
    # A CPU without bf16 holds twice the bytes for each activation; a GPU holds them itself.
    assert 1 < found["peak_memory_gb"] < (15 if found["precision"] == "fp32" else 12)
    on_gpu = found["peak_device_memory_gb"]
    assert (on_gpu is None) == (found["device"] == "cpu")
    assert on_gpu is None or 1 < on_gpu < 15


def test_what_lasts_a_moment_is_sampled_too(script: Callable[[str], ModuleType]) -> None:
    with script("memory").PeakMemory(seconds=60) as peak:
        pass
    assert peak.bytes > 1e6
