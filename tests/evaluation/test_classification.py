"""Classification figures against slow loops written from their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captune.errors import CaptuneError
from captune.evaluation.baselines import chance, linear_probe, majority
from captune.evaluation.classification import (
    accuracy,
    best_temperature,
    calibration,
    calibration_error,
    class_ranks,
    confusion_counts,
    mean_average_precision,
    per_class,
    worst_confusions,
)


def draws(images: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(images, classes, generator=generator)
    return scores, torch.randint(classes, (images,), generator=generator)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(2, 7), st.integers(0, 10**6))
def test_ranks_equal_a_loop_and_ties_count_against(images: int, classes: int, seed: int) -> None:
    scores, target = draws(images, classes, seed)
    scores = scores.round()  # many ties
    expected = [
        1 + sum(float(s) >= float(row[own]) for c, s in enumerate(row) if c != own)
        for row, own in zip(scores, target.tolist(), strict=True)
    ]
    assert class_ranks(scores, target).tolist() == expected


def test_accuracy_and_its_interval() -> None:
    found = accuracy(torch.tensor([1] * 30 + [4] * 20 + [9] * 50))
    assert (found["top1"], found["top5"]) == (30.0, 50.0)
    # Wilson 1927, written out: centre and half width.
    n, p, z = 100, 0.3, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    bounds = [100 * (centre - half), 100 * (centre + half)]
    assert found["intervals"]["top1"] == pytest.approx(bounds, abs=1e-6)


def test_confusions_equal_a_loop() -> None:
    scores, target = draws(300, 5)
    predicted = scores.argmax(dim=1)
    counts = confusion_counts(predicted, target, 6)
    slow = np.zeros((6, 6), dtype=int)
    for true, called in zip(target.tolist(), predicted.tolist(), strict=True):
        slow[true, called] += 1
    assert np.array_equal(counts, slow)
    rows = per_class(counts)
    for place, row in enumerate(rows[:5]):
        wrong = {c: slow[place, c] for c in range(6) if c != place}
        assert row["images"] == slow[place].sum()
        assert row["recall"] == pytest.approx(100 * slow[place, place] / slow[place].sum())
        assert row["precision"] == pytest.approx(100 * slow[place, place] / slow[:, place].sum())
        assert wrong[row["confused_with"]] == max(wrong.values())
    assert rows[5] == {"images": 0, "recall": None, "precision": None, "confused_with": None}


def test_the_worst_confusions_come_first_and_right_answers_are_none() -> None:
    counts = np.array([[90, 3, 0], [7, 1, 0], [0, 3, 5]])
    assert worst_confusions(counts, 9) == [(1, 0, 7), (0, 1, 3), (2, 1, 3)]
    assert worst_confusions(counts, 1) == [(1, 0, 7)]
    assert worst_confusions(np.diag([4, 4]), 5) == []


def test_average_precision_equals_its_formula() -> None:
    scores, _ = draws(40, 4)
    generator = np.random.default_rng(0)
    present = generator.random((40, 4)) < 0.3
    present[:, 3] = False  # no image shows it
    each = []
    for column in range(3):
        order = scores[:, column].argsort(descending=True).tolist()
        hits, total = 0, 0.0
        for place, image in enumerate(order, 1):
            if present[image, column]:
                hits += 1
                total += hits / place
        each.append(total / hits)
    found = mean_average_precision(scores, present)
    assert found["mAP"] == pytest.approx(100 * sum(each) / 3)
    assert (found["classes"], found["images"]) == (3, 40)
    assert found["chance"] == pytest.approx(100 * present[:, :3].mean())


def test_calibration_error_equals_its_formula() -> None:
    logits, target = draws(200, 3)
    bins: list[list[tuple[bool, float]]] = [[] for _ in range(15)]
    for row, own in zip(torch.softmax(logits.double(), 1).tolist(), target.tolist(), strict=True):
        best = max(row)
        bins[min(14, int(best * 15))].append((row.index(best) == own, best))
    expected = sum(
        abs(sum(right for right, _ in b) / len(b) - sum(p for _, p in b) / len(b)) * len(b) / 200
        for b in bins
        if b
    )
    assert calibration_error(logits, target) == pytest.approx(expected)


def drawn_at(temperature: float, images: int = 4000) -> tuple[Tensor, Tensor]:
    """Cosines, and labels drawn from their softmax at a temperature."""
    generator = torch.Generator().manual_seed(1)
    cosines = 0.3 * torch.randn(images, 5, generator=generator)
    chances = torch.softmax(cosines / temperature, dim=1)
    return cosines, torch.multinomial(chances, 1, generator=generator).flatten()


@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.3])
def test_the_temperature_that_labels_were_drawn_at_is_found(temperature: float) -> None:
    cosines, target = drawn_at(temperature)
    assert best_temperature(cosines, target) == pytest.approx(temperature, rel=0.1)


def test_calibration_mends_what_is_too_sure_of_itself() -> None:
    cosines, target = drawn_at(0.2)
    found = calibration(cosines, target, 0.05)
    assert found["before"]["temperature"] == 0.05
    assert found["after"]["temperature"] == pytest.approx(0.2, rel=0.1)
    assert found["after"]["nll"] < found["before"]["nll"]
    assert found["after"]["ece"] < 4 < found["before"]["ece"]


def test_nothing_is_judged_at_a_temperature_that_was_fitted_on_it() -> None:
    """Two halves of opposite needs: fitted on itself each would look perfect."""
    cosines = torch.tensor([[0.5, 0.0]]).repeat(200, 1)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(200, dtype=torch.int64)
    target[order[1::2]] = 1  # one half is always right, the other always wrong
    found = calibration(cosines, target, 1.0)
    assert found["after"]["nll"] > found["before"]["nll"]


# -- baselines ----------------------------------------------------------------------------------
def test_chance_is_k_in_c() -> None:
    assert chance(10) == {"top1": 10.0, "top5": 50.0}
    assert chance(3)["top5"] == 100.0


def test_the_majority_is_of_what_it_learnt_from() -> None:
    target = np.array([0, 0, 0, 1, 2, 2])
    found = majority(target, np.array([2, 2, 2, 1]), 7)
    assert (found["class"], found["top1"]) == (2, pytest.approx(100 * 2 / 6))
    assert found["top5"] == 100.0  # 2, 1, then 0 and two others


def separable(images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features that tell four classes apart, beside as many that tell nothing."""
    generator = np.random.default_rng(seed)
    target = generator.integers(0, 4, images)
    features = generator.normal(size=(images, 8)).astype(np.float32)
    features[np.arange(images), target] += 4
    return features, target


def test_a_probe_learns_from_the_training_split_alone() -> None:
    features, target = separable(200, 0)
    train, train_target = separable(400, 1)
    found = linear_probe(features, target, train, train_target, classes=6)
    assert found["top1"] > 90 and found["images"] == 400
    assert found["learnt_from"] == "the training split"
    shuffled = np.random.default_rng(0).permutation(train_target)
    assert linear_probe(features, target, train, shuffled, classes=6)["top1"] < 50


def test_without_a_training_split_no_image_judges_a_probe_that_learnt_from_it() -> None:
    """Labels that follow from nothing: seen in training they would be known, and are not."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(100, 200)).astype(np.float32)  # more than enough to learn by
    target = generator.integers(0, 2, 100)
    found = linear_probe(features, target, None, None, classes=2)
    assert 25 < found["top1"] < 75
    assert found["images"] == 80
    own, classes = separable(100, 0)
    assert linear_probe(own, classes, None, None, classes=4)["top1"] > 85


def test_a_probe_of_two_classes_is_as_good_as_one_of_four() -> None:
    features, target = separable(200, 0)
    two = target < 2
    found = linear_probe(features[two], target[two], None, None, classes=2)
    assert found["top1"] > 90 and found["top5"] == 100.0


@pytest.mark.parametrize("seed", range(5))
def test_a_class_of_two_images_among_hundreds_ends_nothing(seed: int) -> None:
    """What the strength is chosen on may lack it, and so may what a fold learns from."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(302, 4)).astype(np.float32)
    target = np.repeat([0, 1], [300, 2])
    assert linear_probe(features, target, None, None, classes=2, seed=seed)["top1"] > 95


def test_too_few_images_to_learn_from_are_refused() -> None:
    features, target = separable(4, 0)
    with pytest.raises(CaptuneError, match="4 images are too few"):
        linear_probe(features, target, None, None, classes=4)


def test_a_class_that_the_probe_never_met_is_never_right() -> None:
    features, target = separable(60, 0)
    train, train_target = separable(60, 1)
    met = train_target != 3
    found = linear_probe(features, target, train[met], train_target[met], classes=9)
    assert found["top1"] < 100 * float((target != 3).mean()) + 1e-9
    only = linear_probe(features, target, train[:1], train_target[:1], classes=9)
    assert only["top1"] == pytest.approx(100 * float((target == train_target[0]).mean()))
