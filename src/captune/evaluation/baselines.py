"""What a zero-shot result is to be held against: chance, the commonest class, a linear probe."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold, ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from captune.errors import CaptuneError
from captune.evaluation.classification import TOP, accuracy, class_ranks

STRENGTHS = (1.0, 0.1, 0.01, 0.001)  # scikit-learn's C, weak penalties first: of equals the first
FOLDS = 5
FEW = 50  # images: of fewer none is spared to choose the strength on

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def chance(classes: int) -> dict[str, float]:
    """Top-1 and top-5 in percent of a guess."""
    return {f"top{k}": 100 * min(1.0, k / classes) for k in TOP}


def majority(target: Labels, learnt_from: Labels, classes: int) -> dict[str, Any]:
    """Top-1 and top-5 of naming the commonest classes of ``learnt_from`` for every image."""
    counts = np.bincount(learnt_from, minlength=classes)
    order = np.argsort(-counts, kind="stable")
    place = np.empty(classes, dtype=np.int64)
    place[order] = 1 + np.arange(classes)
    return {**accuracy(torch.from_numpy(place[target])), "class": int(order[0])}


def linear_probe(
    features: Floats,
    target: Labels,
    train_features: Floats | None,
    train_target: Labels | None,
    *,
    classes: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Logistic regression on frozen features, which has labels to learn from (Alain and Bengio
    2016; Radford et al. 2021, section 3.2).

    Features are standardised; the strength of its L2 penalty is chosen on a fifth of what it
    learns from. Where there is no training split, each fifth of the images is judged by a probe
    that learnt from the other four.

    Args:
        features: ``(N, F)``, of the images that are judged; ``target (N,)``.
        train_features: ``(M, F)``, with ``train_target (M,)``; None: no training split.
        classes: C; those that the probe never met stand last, all alike.
        seed: of the draws.

    Returns:
        What :func:`captune.evaluation.classification.accuracy` gives, ``learnt_from`` in words,
        and ``images`` that it learnt from.

    Raises:
        CaptuneError: no training split, and too few images to learn from some of them.
    """
    scores = np.full((len(target), classes), -np.inf)
    if train_features is not None and train_target is not None:
        _fill(scores, slice(None), features, train_features, train_target, seed)
        learnt, images = "the training split", len(train_target)
    else:
        if len(target) < FOLDS:
            raise CaptuneError(
                f"there is no training split, and {len(target)} images are too few to learn from "
                f"some of them: it takes {FOLDS}"
            )
        for rest, fold in KFold(FOLDS, shuffle=True, random_state=seed).split(target):
            _fill(scores, fold, features[fold], features[rest], target[rest], seed)
        learnt = "the other four fifths of these images"
        images = len(target) * (FOLDS - 1) // FOLDS
    ranks = class_ranks(torch.from_numpy(scores), torch.from_numpy(target))
    return {**accuracy(ranks), "learnt_from": learnt, "images": images}


def _fill(
    scores: npt.NDArray[np.float64],
    rows: slice | npt.NDArray[np.int64],
    features: Floats,
    train_features: Floats,
    train_target: Labels,
    seed: int,
) -> None:
    """Train a probe and write its scores of ``features`` into ``scores[rows]``."""
    block = np.full((len(features), scores.shape[1]), -np.inf)
    met = np.unique(train_target)
    if len(met) == 1:  # nothing to tell apart
        block[:, met] = 0.0
    else:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
        cut = next(ShuffleSplit(1, test_size=1 / FOLDS, random_state=seed).split(train_target))
        if len(train_target) >= FEW and len(np.unique(train_target[cut[0]])) > 1:
            model = GridSearchCV(model, {"logisticregression__C": list(STRENGTHS)}, cv=[cut])
        with warnings.catch_warnings():
            # With a weak penalty it may stop before the very optimum; of many classes and few
            # images it asks whether this is a regression. It is a probe all the same.
            warnings.simplefilter("ignore", UserWarning)
            model.fit(train_features, train_target)
        found = model.decision_function(features)
        # Of two classes scikit-learn gives one column, for the second.
        block[:, model.classes_] = found if found.ndim == 2 else np.stack([-found, found], axis=1)
    scores[rows] = block
