"""How well images are told into classes: accuracy, confusions, calibration, mAP; tensors only.

A class scores an image by its logit. Top-K: the true class is among the first K, and ties count
against it, as in retrieval.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn import functional as F

from captune.evaluation.intervals import CONFIDENCE

TOP = (1, 5)
BINS = 15  # of the calibration error, as Guo et al. 2017
TEMPERATURES = (1e-3, 1.0)  # what a calibrated one lies between, for cosines


def class_ranks(scores: Tensor, target: Tensor) -> Tensor:
    """Place of the true class ``target (N,)`` among all by ``scores (N, C)``, the best being 1."""
    own = scores.gather(1, target[:, None])
    return (scores >= own).sum(dim=1)  # the own class is among them


def accuracy(ranks: Tensor) -> dict[str, Any]:
    """Top-1 and top-5 in percent with Wilson's 95 % interval, from ranks ``(N,)``."""
    found: dict[str, Any] = {"intervals": {"confidence": CONFIDENCE, "method": "Wilson"}}
    for k in TOP:
        hits = int((ranks <= k).sum())
        bounds = binomtest(hits, len(ranks)).proportion_ci(CONFIDENCE, method="wilson")
        found[f"top{k}"] = 100 * hits / len(ranks)
        found["intervals"][f"top{k}"] = [100 * bounds.low, 100 * bounds.high]
    return found


def confusion_counts(predicted: Tensor, target: Tensor, classes: int) -> npt.NDArray[np.int64]:
    """``(C, C)``: how many images of class ``row`` were called class ``column``."""
    pairs = torch.bincount(target * classes + predicted, minlength=classes * classes)
    return pairs.view(classes, classes).numpy()


def per_class(confusion: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    """Of each class: ``images``, ``recall`` and ``precision`` in percent (None where undefined),
    and the ``confused_with`` class that its images are called most often (None: never)."""
    rows = []
    for place, row in enumerate(confusion):
        wrong = row.copy()
        wrong[place] = 0
        right, called = int(row[place]), int(confusion[:, place].sum())
        rows.append(
            {
                "images": int(row.sum()),
                "recall": 100 * right / int(row.sum()) if row.sum() else None,
                "precision": 100 * right / called if called else None,
                "confused_with": int(wrong.argmax()) if wrong.sum() else None,
            }
        )
    return rows


def worst_confusions(confusion: npt.NDArray[np.int64], most: int) -> list[tuple[int, int, int]]:
    """``(true class, called class, images)`` of the commonest confusions, commonest first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    found = [(int(p) // len(wrong), int(p) % len(wrong)) for p in order]
    return [
        (true, called, int(wrong[true, called])) for true, called in found if wrong[true, called]
    ]


def mean_average_precision(scores: Tensor, present: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Multi-label ``mAP`` in percent: the mean over classes of average precision, each class
    ranking all images by ``scores (N, C)``; classes that no image shows are left out.

    ``chance`` is what random scores give: the mean share of images that show a class.
    """
    shown = np.flatnonzero(present.any(axis=0))
    each = [average_precision_score(present[:, c], scores[:, c].numpy()) for c in shown]
    return {
        "mAP": 100 * float(np.mean(each)),
        "chance": 100 * float(present[:, shown].mean()),
        "classes": len(shown),
        "images": len(present),
    }


def calibration(
    cosines: Tensor, target: Tensor, temperature: float, *, seed: int = 0
) -> dict[str, Any]:
    """How far probabilities can be believed, at the model's temperature and at a calibrated one.

    The calibrated temperature minimises the mean negative log-likelihood (Guo et al. 2017, section
    4.2). Each half of the images, drawn by ``seed``, is judged by what was fitted on the other, so
    nothing is measured on what it was fitted on; ``temperature`` is the geometric mean of the two.

    Args:
        cosines: ``(N, C)``.
        target: ``(N,)``.
        temperature: the model's own.

    Returns:
        ``before`` and ``after``: ``temperature``, ``nll`` (nats) and ``ece``, the expected
        calibration error over 15 bins of equal width, in percent points.
    """
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    halves = order[::2], order[1::2]
    fitted = [best_temperature(cosines[half], target[half]) for half in halves]
    after = torch.empty_like(cosines)
    for half, other in zip(halves, reversed(fitted), strict=True):
        after[half] = cosines[half] / other
    return {
        "fitted_on": "the other half of the images",
        "before": {"temperature": temperature, **_trust(cosines / temperature, target)},
        "after": {"temperature": float(np.sqrt(np.prod(fitted))), **_trust(after, target)},
    }


def best_temperature(cosines: Tensor, target: Tensor) -> float:
    """The temperature of least negative log-likelihood, between 0.001 and 1."""
    exact = cosines.double()

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(exact / np.exp(log_temperature), target))

    low, high = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def _trust(logits: Tensor, target: Tensor) -> dict[str, float]:
    return {
        "nll": float(F.cross_entropy(logits.double(), target)),
        "ece": 100 * calibration_error(logits, target),
    }


def calibration_error(logits: Tensor, target: Tensor) -> float:
    r"""Expected calibration error (Guo et al. 2017, equation 3), 0 to 1:

    .. math:: \sum_b \frac{n_b}{N} |acc_b - conf_b|
    """
    confidence, called = torch.softmax(logits.double(), dim=1).max(dim=1)
    right = (called == target).double()
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, right - confidence)
    return float(gaps.abs().sum()) / len(target)
