"""What main.ipynb calls: each function shows something and returns the object behind it.

Outside IPython tables are printed, and figures named by their titles.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captune.notebook.display import brief as brief
    from captune.notebook.machine import setup as setup
    from captune.notebook.machine import storage as storage
    from captune.notebook.presets import Preset as Preset
    from captune.notebook.presets import prepare_data as prepare_data
    from captune.notebook.presets import preset as preset
    from captune.notebook.show import describe_model as describe_model
    from captune.notebook.show import show_comparison as show_comparison
    from captune.notebook.show import show_samples as show_samples
    from captune.notebook.show import summary as summary
    from captune.notebook.steps import explain as explain
    from captune.notebook.steps import search as search
    from captune.notebook.steps import show_recall as show_recall
    from captune.notebook.steps import train as train
    from captune.notebook.steps import zero_shot as zero_shot

_HOMES = {
    "brief": "captune.notebook.display",
    "Preset": "captune.notebook.presets",
    "prepare_data": "captune.notebook.presets",
    "preset": "captune.notebook.presets",
    "setup": "captune.notebook.machine",
    "storage": "captune.notebook.machine",
    "describe_model": "captune.notebook.show",
    "show_comparison": "captune.notebook.show",
    "show_samples": "captune.notebook.show",
    "summary": "captune.notebook.show",
    "train": "captune.notebook.steps",
    "show_recall": "captune.notebook.steps",
    "search": "captune.notebook.steps",
    "zero_shot": "captune.notebook.steps",
    "explain": "captune.notebook.steps",
    "zero_shot_accuracy": "captune.notebook.classes",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'captune.notebook' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
