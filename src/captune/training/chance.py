"""Chance: the loss of embeddings that carry no information, which a training must get below."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from captune.config import Config
from captune.data.stream_table import StreamTable
from captune.data.table import CaptionTable


class Expected(NamedTuple):
    """What a step holds on average: ``captions``, and how many of them describe each image."""

    captions: float
    positives: float


def chance_loss(config: Config, table: CaptionTable | StreamTable, images: int) -> float:
    r"""The loss of a step where nothing is known of which caption describes which image.

    A softmax over N alike has the loss :math:`\ln N`, whichever of them are positives; here the
    mean of both ways. The sigmoid loss of embeddings all alike depends on their logit, which is
    trained, for the bias is: the best one gives each pair the probability :math:`p = n / C` that a
    pair is true, where n of the C captions describe an image, and the pairs of an image sum up to

    .. math:: L = -n \ln p - (C - n) \ln (1 - p)

    Mixed images have the same, for the shares of each add up to n, too. Near-duplicates that are
    ignored make the loss smaller than this: where they are many, a training at chance is not seen.

    Args:
        images: B, of a batch.

    Returns:
        Infinity where it is not known: of a loss of the user's own; of the sigmoid loss where
        near-duplicates are positives, or where a stream's shards decide how many captions of an
        image are drawn again as negatives.
    """
    images = min(images, len(table))  # fewer than a batch make one small batch
    step = _expected(config, table, images)
    if config.criterion:
        return math.inf
    if config.loss == "infonce":
        return (math.log(step.captions) + math.log(images + config.image_queue)) / 2
    alike = config.duplicate_threshold > 0 and config.duplicates == "positive"
    again = bool(config.captions_per_image and config.bank_negatives)
    if alike or (again and isinstance(table, StreamTable)):
        return math.inf
    share = step.positives / step.captions
    entropy = torch.special.entr(torch.tensor([share, 1 - share], dtype=torch.float64)).sum()
    return step.captions * float(entropy)


def _expected(config: Config, table: CaptionTable | StreamTable, images: int) -> Expected:
    """Captions of the bank that a step holds anyway are left out of those drawn from it; further
    ones of its images are positives."""
    total = table.num_captions
    all_of_one = total / len(table)
    own = min(config.captions_per_image or all_of_one, all_of_one)
    drawn = min(config.bank_negatives, total) / total  # of each caption there is
    return Expected(
        captions=images * own + drawn * (total - images * own),
        positives=own + drawn * (all_of_one - own),
    )
