"""Warm-up and cosine."""

from __future__ import annotations

import math

import pytest

from captune.config import DEFAULT_CONFIG, Config
from captune.training.schedule import finished, planned_epochs, rate_factor, warmup_within


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


def rows(*rsums: float) -> list[dict[str, float]]:
    return [{"rsum": rsum} for rsum in rsums]


PLAIN = Config.from_mapping({"recipe": "plain", "num_epochs": 3})
TWO = DEFAULT_CONFIG.replace(head_epochs=3, num_epochs=6, patience=2)
HEAD_ALONE = TWO.replace(freeze_backbone=True)


@pytest.mark.parametrize(("config", "planned"), [(PLAIN, 3), (TWO, 9), (HEAD_ALONE, 3)])
def test_epochs_of_both_stages_are_planned(config: Config, planned: int) -> None:
    assert planned_epochs(config) == planned
    rising = [float(i) for i in range(planned)]
    assert finished(config, rows(*rising))
    assert not any(finished(config, rows(*rising[:done])) for done in range(planned))


@pytest.mark.parametrize(
    ("rsums", "over"),
    [
        ((9, 8, 7, 1), False),  # stage 1 falls: its epochs are not counted
        ((9, 9, 9, 1, 1), False),  # one epoch without a better one
        ((9, 9, 9, 1, 1, 1), True),  # an equal one is not better
        ((9, 9, 9, 5, 4, 3), True),
        ((9, 9, 9, 5, 4, 6), False),  # better again: the count begins anew
        ((9, 9, 9, 5, 4, 6, 5, 5), True),
        ((9, 9, 9, 1, 2, 3), False),  # below stage 1's, but rising
    ],
)
def test_patience_counts_epochs_of_the_second_stage_alone(
    rsums: tuple[float, ...], over: bool
) -> None:
    assert finished(TWO, rows(*rsums)) is over
    assert not finished(TWO.replace(patience=0), rows(*rsums))


def test_without_a_first_stage_patience_counts_from_the_first_epoch() -> None:
    config = PLAIN.replace(patience=1, num_epochs=9)
    assert not finished(config, rows(1, 2, 3)) and finished(config, rows(1, 2, 2))


def test_the_head_alone_knows_no_patience() -> None:
    config = HEAD_ALONE.replace(head_epochs=6)
    assert not finished(config, rows(9, 1, 1, 1, 1)) and finished(config, rows(9, 1, 1, 1, 1, 1))
