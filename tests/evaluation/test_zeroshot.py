"""Zero-shot labels: the probabilities are the ones of the formula."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from captune.data.pixels import UnreadableImageError
from captune.errors import CaptuneError
from captune.evaluation.zeroshot import TEMPLATES, classify, label_embeddings
from captune.models import CLIPModel
from conftest import write_scene

LABELS = ["a cat", "a dog", "an aeroplane in the sky"]
# Unlike each other, so that their mean is visibly shorter than 1 and must be made unit again.
UNLIKE = ("{}", "zzz zzz {} zzz zzz zzz !!!")


@pytest.fixture(scope="module")
def model(tiny_clip: Path) -> CLIPModel:
    return CLIPModel.zero_shot(str(tiny_clip))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "one.jpg", tmp_path / "two.jpg", tmp_path / "three.jpg"]
    for path, square in zip(paths, ("red", "white", "blue"), strict=True):
        write_scene(path, "black", square)
    return paths


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def slow_probabilities(
    model: CLIPModel, image: list[float], labels: list[str], templates: tuple[str, ...]
) -> list[float]:
    """Radford et al. 2021: mean over templates, made unit, softmax at the logit scale."""
    logits = []
    for label in labels:
        prompts = [model.encode_text(t.replace("{}", label))[0].tolist() for t in templates]
        mean = [sum(column) / len(prompts) for column in zip(*prompts, strict=True)]
        logits.append(float(model.logit_scale) * dot(image, unit(mean)))
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("templates", [TEMPLATES, UNLIKE, ("a photo of {}.",)])
def test_probabilities_equal_the_formula(
    templates: tuple[str, ...], model: CLIPModel, pictures: list[Path]
) -> None:
    vectors = model.encode_image(pictures).tolist()
    predictions = classify(model, pictures, LABELS, templates=templates)
    for vector, prediction in zip(vectors, predictions, strict=True):
        expected = slow_probabilities(model, vector, LABELS, templates)
        assert list(prediction.probabilities) == LABELS
        assert list(prediction.probabilities.values()) == pytest.approx(expected, abs=2e-4)


def test_the_formula_is_sharp_enough_to_notice_a_mean_that_is_not_made_unit(
    model: CLIPModel,
) -> None:
    """Otherwise the test above would pass without the step it is there for."""
    prompts = [template.replace("{}", LABELS[0]) for template in UNLIKE]
    mean = model.encode_text(prompts).mean(dim=0)
    assert float(mean.norm()) < 0.995
    assert float(label_embeddings(model, LABELS, UNLIKE)[0].norm()) == pytest.approx(1, abs=1e-5)


def test_probabilities_sum_to_one_and_the_label_is_the_likeliest(
    model: CLIPModel, pictures: list[Path]
) -> None:
    for prediction in classify(model, pictures, LABELS):
        assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert prediction.probabilities[prediction.label] == max(prediction.probabilities.values())


def test_predictions_come_in_the_order_of_the_images(
    model: CLIPModel, pictures: list[Path]
) -> None:
    forward = classify(model, pictures, LABELS)
    backward = classify(model, pictures[::-1], LABELS)
    assert [p.image for p in forward] == [str(path) for path in pictures]
    for one, other in zip(forward, backward[::-1], strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-2)
    assert forward[0].probabilities != pytest.approx(forward[1].probabilities, abs=1e-6)


def test_a_sharper_logit_scale_makes_the_likeliest_label_likelier(
    tiny_clip: Path, pictures: list[Path]
) -> None:
    model = CLIPModel.zero_shot(str(tiny_clip))
    probabilities = []
    for scale in (1.0, 20.0, 100.0):
        model.logit_scale.fill_(scale)
        probabilities.append(max(classify(model, pictures[:1], LABELS)[0].probabilities.values()))
    assert probabilities == sorted(probabilities) and probabilities[0] < probabilities[-1]


@pytest.mark.parametrize("labels", [[], ["a cat"], ["a cat", "a dog", "a cat"]])
def test_fewer_than_two_different_labels_are_refused(
    labels: list[str], model: CLIPModel, pictures: list[Path]
) -> None:
    with pytest.raises(CaptuneError, match="two different labels"):
        classify(model, pictures, labels)


def test_a_template_without_a_place_for_the_label_is_named(
    model: CLIPModel, pictures: list[Path]
) -> None:
    with pytest.raises(CaptuneError, match=r"'a photo of'"):
        classify(model, pictures, LABELS, templates=("{}", "a photo of"))


def test_braces_in_a_label_are_text(model: CLIPModel, pictures: list[Path]) -> None:
    labels = ["{0}", "{name}"]
    assert list(classify(model, pictures[:1], labels)[0].probabilities) == labels


def test_an_unreadable_image_is_named(model: CLIPModel, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(UnreadableImageError, match=r"broken\.jpg"):
        classify(model, [broken], LABELS)
