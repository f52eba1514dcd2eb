"""A watchdog: what an epoch's figures say is wrong with a training, in plain words with a fix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captune.config import LEARNT_TEMPERATURES

# Fewer images than this have neither a meaningful spread nor a meaningful rank.
MIN_IMAGES = 16
# Mean cosine above 0.95. Contrastively trained image towers lie in a cone too (CLIP's mean cosine
# is near 0.5), so that only what is far narrower is a collapse.
COLLAPSED_SPREAD = 0.05
# Pictures of anything cannot be told apart along three directions or fewer...
COLLAPSED_RANK = 3.0
# ... unless there are hardly more to be had: then a fifth of them.
COLLAPSED_SHARE = 0.2
# The first epoch is warm-up, and on small data only a few steps: it may well be at chance.
STUCK_FROM_EPOCH = 2
# Any training that learns is below this share of chance by then (Flickr8k's first: 0.81, with the
# sigmoid loss 0.85), or comes down to it by at least as much an epoch: the sigmoid loss may start
# far above, for its bias does.
STUCK_SHARE = 0.97
# Above chance by more than an untrained model's luck, and not falling: steps so large that they do
# harm.
DIVERGING_SHARE = 1.05
# With very many negatives the loss moves late; recall that doubled shows that it does learn.
LEARNING_GROWTH = 2.0
# Two falls in a row that lose less than this of the best rsum are a plateau's jitter.
HARMFUL_FALL = 0.02
# How near to one of its limits a trained temperature counts as there.
TEMPERATURE_MARGIN = 0.02


@dataclass(frozen=True)
class EpochSigns:
    """What the watchdog looks at, once an epoch.

    Attributes:
        epoch: from 1.
        train_loss: mean of the epoch.
        chance_loss: the loss of embeddings that carry no information
            (:func:`captune.training.chance.chance_loss`).
        val_loss: of any scale, as long as it stays the same one.
        rsum: sum of the six recalls on validation, percent.
        temperature: None where it is not trained.
        spread, effective_rank: :func:`spread` and :func:`effective_rank` of validation images.
        dimension: D of the embeddings.
        images: how many images these two are of.
        stage: 1 or 2.
    """

    epoch: int
    train_loss: float
    chance_loss: float
    val_loss: float
    rsum: float
    temperature: float | None
    spread: float
    effective_rank: float
    dimension: int
    images: int
    stage: int = 2

    @property
    def rate(self) -> str:
        """The key of the stage's learning rate."""
        return "head_learning_rate" if self.stage == 1 else "learning_rate"

    @property
    def passes(self) -> str:
        """The key of the stage's length."""
        return "head_epochs" if self.stage == 1 else "num_epochs"

    @classmethod
    def of(
        cls,
        row: Mapping[str, Any],
        *,
        chance_loss: float,
        temperature_learnt: bool,
        dimension: int,
    ) -> EpochSigns:
        """From a row of a run's history, and what the row does not say."""
        return cls(
            epoch=row["epoch"],
            train_loss=row["train_loss"],
            chance_loss=chance_loss,
            val_loss=row["val_loss"],
            rsum=row["rsum"],
            temperature=row["temperature"] if temperature_learnt else None,
            spread=row["spread"],
            effective_rank=row["effective_rank"],
            dimension=dimension,
            images=row["images"],
            stage=row["stage"],
        )


def spread(image: Tensor) -> float:
    r"""Mean cosine distance of all pairs of ``image (N, D)``, unit length: 0 where all are alike.

    One minus the mean pairwise cosine, which needs no pairs: with the mean embedding :math:`m`,
    :math:`\sum_{i \ne j} \langle u_i, u_j \rangle = N^2 \lVert m \rVert^2 - N`, exactly. Isotropic
    embeddings have 1, opposite ones a little more (at most N/(N-1)). A single one has 0.
    """
    count = len(image)
    if count < 2:
        return 0.0
    total = image.double().sum(0)  # (D,), N times the mean
    cosine = (float(total @ total) - count) / (count * (count - 1))
    return 1 - cosine


def effective_rank(image: Tensor) -> float:
    """In how many directions ``image (N, D)`` varies (Roy and Vetterli 2007).

    The exponential of the entropy of the singular values, brought to sum 1, of the embeddings less
    their mean: from 1 (all on a line) to min(D, N - 1) (the same in every direction); 0 where they
    do not vary at all.

    Raises:
        ValueError: NaN or infinite values.
    """
    if not bool(image.isfinite().all()):
        raise ValueError("the embeddings hold NaN or infinite values")
    centred = image.double() - image.double().mean(0)
    wide = centred.shape[0] < centred.shape[1]
    gram = centred @ centred.T if wide else centred.T @ centred
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    # fp32 embeddings of one and the same picture differ in their seventh digit.
    if float(singular.max()) <= 1e-6 * len(image) ** 0.5:
        return 0.0
    share = singular / singular.sum()
    return float(torch.special.entr(share).sum().exp())


class Watchdog:
    """Looks at each epoch in turn; a warning is said once, and again only if it had gone away.

    Whoever resumes a training shows it the earlier epochs first and drops what it says of them.
    """

    def __init__(self) -> None:
        self._history: list[EpochSigns] = []
        self._active: set[str] = set()
        self._noted = False

    def look(self, signs: EpochSigns) -> list[str]:
        """What is wrong, a sentence each: ``warning: ...`` with the likely fix, or ``note: ...``.

        Args:
            signs: of the epoch that has just ended; epochs come in order.

        Returns:
            Nothing where all is well, or where all has been said already.
        """
        self._history.append(signs)
        found = {
            "collapse": _collapse(signs),
            "stuck": _stuck(self._history),
            "overfitting": _overfitting(self._history),
            "temperature": _temperature(signs),
        }
        said = [
            f"warning: epoch {signs.epoch}: {sentence}"
            for kind, sentence in found.items()
            if sentence and kind not in self._active
        ]
        self._active = {kind for kind, sentence in found.items() if sentence}
        note = "" if self._noted else _normal(self._history)
        if note:
            self._noted = True
            said.append(f"note: epoch {signs.epoch}: {note}")
        return said


def _collapse(signs: EpochSigns) -> str:
    """All embeddings alike, or along very few directions."""
    if signs.images < MIN_IMAGES:
        return ""
    if signs.spread < COLLAPSED_SPREAD:
        what = f"are nearly all alike (mean cosine {1 - signs.spread:.3f})"
    elif signs.effective_rank < _rank_limit(signs):
        what = f"vary in only {signs.effective_rank:.1f} of {signs.dimension} directions"
    else:
        return ""
    return (
        f"the embeddings of the {signs.images:,} validation images {what}: lower {signs.rate}, "
        "and check that the image files are not copies of a few pictures"
    )


def _rank_limit(signs: EpochSigns) -> float:
    """The effective rank below which embeddings have collapsed."""
    return min(COLLAPSED_RANK, COLLAPSED_SHARE * min(signs.dimension, signs.images - 1))


def _stuck(history: list[EpochSigns]) -> str:
    """The training loss still at chance and not falling, and recall not rising either."""
    signs = history[-1]
    if signs.epoch < STUCK_FROM_EPOCH or signs.chance_loss <= 0:
        return ""
    share = signs.train_loss / signs.chance_loss
    if share < STUCK_SHARE or signs.rsum >= LEARNING_GROWTH * history[0].rsum > 0:
        return ""
    before = history[-2].train_loss if len(history) > 1 else 0.0
    if signs.train_loss < STUCK_SHARE * before:
        return ""
    figures = f"({signs.train_loss:.3f}, chance is {signs.chance_loss:.3f})"
    if share > DIVERGING_SHARE and signs.train_loss >= before:
        return f"the training loss is worse than guessing {figures}: lower {signs.rate}"
    return (
        f"the training loss is no better than guessing {figures}: check that each caption stands "
        f"with its own image; if they do, try {signs.rate} ten times lower, then ten times higher"
    )


def _overfitting(history: list[EpochSigns]) -> str:
    """Recall falling two epochs in a row, by more than jitter, while the training loss falls."""
    if len(history) < 3:
        return ""
    first, second, third = history[-3:]
    best = max(history, key=lambda signs: signs.rsum)
    falling = first.rsum > second.rsum > third.rsum
    learning = first.train_loss > second.train_loss > third.train_loss
    if not (falling and learning and third.rsum < (1 - HARMFUL_FALL) * best.rsum):
        return ""
    return (
        f"recall on validation falls while the training loss falls (rsum {third.rsum:.1f}, best "
        f"{best.rsum:.1f} in epoch {best.epoch}): it learns the training images by heart. The best "
        f"epoch is kept; for a better one take fewer {third.passes}, more dropout or augment=true"
    )


def _temperature(signs: EpochSigns) -> str:
    """A trained temperature that rests at one of its limits."""
    low, high = LEARNT_TEMPERATURES
    if signs.temperature is None:
        return ""
    if signs.temperature <= low * (1 + TEMPERATURE_MARGIN):
        return (
            f"the temperature has fallen to its limit {low}: the training pairs are told apart too "
            "easily; take learn_temperature=false temperature=0.05, or more data or dropout"
        )
    if signs.temperature >= high * (1 - TEMPERATURE_MARGIN):
        return (
            f"the temperature has risen to its limit {high}: images and captions do not match; "
            f"check that each caption stands with its own image, then lower {signs.rate}"
        )
    return ""


def _normal(history: list[EpochSigns]) -> str:
    """Validation loss up and recall up: what looks wrong to many, and is not."""
    if len(history) < 2:
        return ""
    before, now = history[-2:]
    if not (now.val_loss > before.val_loss and now.rsum > before.rsum):
        return ""
    return (
        "the validation loss rose and recall rose too. That is normal: the loss also counts how "
        "sure the model is, recall only who comes first; epochs are chosen by recall"
    )
