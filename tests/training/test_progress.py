"""The sums of an epoch."""

from __future__ import annotations

import pytest
import torch

from captune.training.progress import EpochMeter, EpochProgress


def test_the_meter_sums_what_it_is_given() -> None:
    meter = EpochMeter(EpochProgress(0))
    meter.add(torch.tensor(2.0), torch.tensor(0.5), 4)
    meter.add(torch.tensor(1.0), torch.tensor(1.0), 2)
    meter.settle()
    summary = meter.progress.summary()
    assert summary["train_loss"] == pytest.approx(10 / 6)
    assert summary["train_accuracy"] == pytest.approx(100 * 4 / 6)
