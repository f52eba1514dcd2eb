"""Warm-up and cosine."""

from __future__ import annotations

import math

import pytest

from captune.training.schedule import rate_factor, warmup_within


@pytest.mark.parametrize(
    ("asked", "total", "given"), [(500, 6460, 500), (500, 940, 94), (500, 9, 0), (0, 1000, 0)]
)
def test_warm_up_is_never_more_than_a_tenth(asked: int, total: int, given: int) -> None:
    assert warmup_within(asked, total) == given


def test_rises_in_a_line_then_falls_on_a_cosine_to_zero() -> None:
    factors = [rate_factor(step, 10, 110) for step in range(111)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    expected = [0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(101)]
    assert factors[10:] == pytest.approx(expected)
    assert factors[-1] == pytest.approx(0.0, abs=1e-12) and max(factors) == 1.0
