"""The stopwatch: calls added up by name."""

from __future__ import annotations

import time

import torch

from captune.workflow.stopwatch import Stopwatch


def test_a_stopwatch_adds_up_calls_by_name() -> None:
    watch = Stopwatch(torch.device("cpu"))
    nap = watch.around("nap", lambda seconds: time.sleep(seconds) or "rested")
    assert [nap(0.01), nap(0.02)] == ["rested", "rested"]
    assert 0.03 <= watch.seconds["nap"] < 0.3
