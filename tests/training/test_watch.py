"""The watchdog: silent on health, one sentence with a fix for each thing that goes wrong."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captune.config import FIELDS
from captune.training.watch import EpochSigns, Watchdog, effective_rank, spread

STAGE_2_KEYS = ("learning_rate", "num_epochs")
HEALTHY = EpochSigns(
    epoch=1,
    train_loss=3.9,
    chance_loss=math.log(128),
    val_loss=3.1,
    rsum=105.0,
    temperature=0.06,
    spread=0.7,
    effective_rank=90.0,
    dimension=384,
    images=1000,
)


def epochs(**columns: list[float]) -> list[EpochSigns]:
    """Healthy epochs but for the columns given."""
    count = len(next(iter(columns.values())))
    return [
        replace(HEALTHY, epoch=place + 1, **{key: v[place] for key, v in columns.items()})
        for place in range(count)
    ]


def said(history: list[EpochSigns]) -> list[list[str]]:
    dog = Watchdog()
    return [dog.look(signs) for signs in history]


def unit(rows: int, dimension: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dimension, generator=generator), dim=-1)


def seen(image: Tensor) -> EpochSigns:
    return replace(
        HEALTHY,
        spread=spread(image),
        effective_rank=effective_rank(image),
        dimension=image.shape[1],
        images=len(image),
    )


# -- the two measures -------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [2, 3, 40])
def test_spread_is_the_mean_over_all_pairs(rows: int) -> None:
    image = unit(rows, 8) + 0.3
    image = F.normalize(image, dim=-1)
    pairs = [float(image[i] @ image[j]) for i in range(rows) for j in range(rows) if i != j]
    assert spread(image) == pytest.approx(1 - sum(pairs) / len(pairs), abs=1e-6)


def test_spread_of_equal_orthogonal_and_single_embeddings() -> None:
    assert spread(unit(1, 8).repeat(50, 1)) == pytest.approx(0, abs=1e-6)
    assert spread(torch.eye(6)) == pytest.approx(1)
    assert spread(unit(1, 8)) == 0


def slow_effective_rank(image: Tensor) -> float:
    singular = torch.linalg.svdvals((image - image.mean(0)).double()).tolist()
    shares = [value / sum(singular) for value in singular]
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


@pytest.mark.parametrize("shape", [(200, 12), (12, 200), (30, 30)])
def test_effective_rank_is_the_one_of_its_definition(shape: tuple[int, int]) -> None:
    image = F.normalize(unit(*shape) * torch.linspace(0.05, 1, shape[1]), dim=-1)
    assert effective_rank(image) == pytest.approx(slow_effective_rank(image), rel=1e-4)


def test_effective_rank_from_nothing_to_all_directions() -> None:
    line = torch.linspace(-1, 1, 40)[:, None] * unit(1, 16)
    assert effective_rank(unit(1, 16).repeat(40, 1)) == 0
    assert effective_rank(line + unit(1, 16, 1)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.cat([torch.eye(16), -torch.eye(16)])) == pytest.approx(16)
    assert effective_rank(unit(1, 16)) == 0
    with pytest.raises(ValueError, match="NaN"):
        effective_rank(torch.full((4, 4), float("nan")))


# -- silence ----------------------------------------------------------------------------------
def test_a_healthy_history_needs_no_word() -> None:
    history = epochs(
        train_loss=[3.95, 2.8, 2.2, 1.9, 1.7, 1.6],
        val_loss=[3.1, 2.9, 2.8, 2.8, 2.79, 2.79],
        rsum=[105.0, 126.0, 140.0, 139.0, 141.0, 140.5],
        temperature=[0.07, 0.06, 0.05, 0.045, 0.04, 0.04],
        spread=[0.3, 0.5, 0.7, 0.8, 0.8, 0.8],
    )
    assert said(history) == [[]] * 6


def test_one_epoch_at_chance_is_only_warm_up() -> None:
    assert said(epochs(train_loss=[4.9, 4.5])) == [[], []]


def test_a_loss_near_chance_is_no_matter_while_recall_doubles() -> None:
    assert said(epochs(train_loss=[4.86, 4.8], rsum=[4.0, 12.0])) == [[], []]


def test_isotropic_embeddings_are_well() -> None:
    assert said([seen(unit(300, 384)), seen(unit(300, 16))]) == [[], []]


@pytest.mark.parametrize("images", [1, 2, 8])
def test_a_handful_of_images_is_not_judged(images: int) -> None:
    assert Watchdog().look(seen(unit(1, 16).repeat(images, 1))) == []


# -- warnings ---------------------------------------------------------------------------------
def test_collapsed_embeddings() -> None:
    collapsed = F.normalize(unit(1, 384) + 0.05 * unit(300, 384, 1), dim=-1)
    (warning,) = Watchdog().look(seen(collapsed))
    assert "nearly all alike (mean cosine 0.99" in warning and "lower learning_rate" in warning
    assert "copies" in warning


def test_embeddings_on_a_line_or_a_plane() -> None:
    """Well apart, and yet of one or two directions."""
    for directions in (1, 2):
        flat = F.normalize(torch.randn(300, directions) @ unit(directions, 384), dim=-1)
        signs = seen(flat)
        assert signs.spread > 0.9
        (warning,) = Watchdog().look(signs)
        assert "of 384 directions" in warning and "lower learning_rate" in warning


def test_a_loss_that_stays_at_chance() -> None:
    first, second, third = said(epochs(train_loss=[4.86, 4.85, 4.84], rsum=[3.2, 3.4, 3.1]))
    assert first == [] and third == []
    assert "no better than guessing (4.850, chance is 4.852)" in second[0]
    assert "each caption stands with its own image" in second[0]


def test_a_loss_that_comes_down_from_far_above_chance_is_left_to_come() -> None:
    down = epochs(train_loss=[20.0, 9.0, 6.0, 5.5, 5.0, 4.82, 4.81], rsum=[3.0] * 7)
    assert [len(found) for found in said(down)] == [0] * 6 + [1]
    for last, words in ((8.9, "no better than guessing"), (9.1, "worse than guessing")):
        halted = epochs(train_loss=[20.0, 9.0, last], rsum=[3.0] * 3)
        assert words in said(halted)[2][0]


def test_the_sigmoid_loss_of_flickr8k_and_of_its_captions_shuffled() -> None:
    """The first epochs of stage 1 of best-adapter, as they were measured."""
    chance = [36.349] * 5
    learning = epochs(
        chance_loss=chance,
        train_loss=[39.644, 30.902, 28.576, 27.602, 26.832],
        rsum=[70.4, 171.4, 219.4, 238.5, 256.5],
    )
    assert said(learning) == [[]] * 5
    shuffled = epochs(
        chance_loss=chance,
        train_loss=[40.769, 36.682, 36.503, 36.407, 36.321],
        rsum=[3.4, 4.7, 5.0, 5.3, 4.8],
    )
    warnings = said(shuffled)
    assert [len(found) for found in warnings] == [0, 0, 1, 0, 0]
    assert "no better than guessing (36.503, chance is 36.349)" in warnings[2][0]


def test_a_loss_above_chance() -> None:
    _, (warning,) = said(epochs(train_loss=[5.5, 6.2], rsum=[3.2, 3.2]))
    assert "worse than guessing" in warning and "lower learning_rate" in warning


def test_recall_that_falls_while_the_loss_falls() -> None:
    history = epochs(train_loss=[3.0, 2.0, 1.0, 0.5, 0.3], rsum=[100.0, 130.0, 126.0, 120.0, 115.0])
    warnings = said(history)
    assert [len(found) for found in warnings] == [0, 0, 0, 1, 0]
    assert "rsum 120.0, best 130.0 in epoch 2" in warnings[3][0]
    assert "best epoch is kept" in warnings[3][0] and "dropout" in warnings[3][0]


def test_a_plateau_and_a_loss_that_rises_are_not_overfitting() -> None:
    assert said(epochs(train_loss=[3.0, 2.0, 1.0], rsum=[130.0, 129.5, 129.0])) == [[]] * 3
    assert said(epochs(train_loss=[3.0, 3.1, 3.2], rsum=[130.0, 120.0, 110.0])) == [[]] * 3


@pytest.mark.parametrize(("value", "word"), [(0.01, "fallen"), (0.5, "risen")])
def test_a_temperature_at_its_limit(value: float, word: str) -> None:
    (warning,) = Watchdog().look(replace(HEALTHY, temperature=value))
    assert f"{word} to its limit {value}" in warning
    assert Watchdog().look(replace(HEALTHY, temperature=None)) == []


def test_a_rising_validation_loss_with_rising_recall_is_noted_once_as_normal() -> None:
    history = epochs(val_loss=[3.0, 3.1, 3.2, 3.0, 3.3], rsum=[100.0, 110.0, 115.0, 118.0, 120.0])
    words = said(history)
    assert [len(found) for found in words] == [0, 1, 0, 0, 0]
    assert words[1][0].startswith("note: ") and "normal" in words[1][0]


# -- once, and again --------------------------------------------------------------------------
def test_a_warning_returns_only_after_it_went_away() -> None:
    words = said(epochs(spread=[0.01, 0.01, 0.5, 0.01, 0.01]))
    assert [len(found) for found in words] == [1, 0, 0, 1, 0]
    assert words[3][0].startswith("warning: epoch 4: ")


def test_two_things_at_once_are_two_sentences() -> None:
    _, found = said(epochs(train_loss=[4.86, 4.86], spread=[0.5, 0.01], rsum=[3.0, 3.0]))
    assert len(found) == 2 and all("\n" not in sentence for sentence in found)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_keys_that_it_tells_to_change_are_of_the_stage(stage: int) -> None:
    wrong = [
        epochs(spread=[0.01]),
        epochs(train_loss=[4.86, 4.86], rsum=[3.0, 3.0]),
        epochs(train_loss=[9.0, 9.0], rsum=[3.0, 3.0]),
        epochs(train_loss=[2.0, 1.9, 1.8], rsum=[120.0, 100.0, 80.0]),
        epochs(temperature=[0.01]),
        epochs(temperature=[0.5]),
    ]
    sentences = [
        sentence
        for history in wrong
        for found in said([replace(signs, stage=stage) for signs in history])
        for sentence in found
    ]
    assert len(sentences) == len(wrong)
    named = {key for sentence in sentences for key in re.findall(r"[a-z]+(?:_[a-z]+)+", sentence)}
    rate, passes = ("head_learning_rate", "head_epochs") if stage == 1 else STAGE_2_KEYS
    assert named == {rate, passes, "learn_temperature"} and named <= set(FIELDS)
