"""A batch of pairs, and the loss over it as a slow loop written from its formula, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from captune.matching import Pairs, match_pairs

Queue = list[tuple[int, Tensor]]
Written = dict[int, list[Tensor]]  # the frozen captions of each image that was in the queue


def unit(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


def batch(
    seed: int, duplicates: str = "ignore", threshold: float = 0.8
) -> tuple[Tensor, Tensor, Pairs]:
    """Four images with 1 to 3 captions, a bank of 7 captions of which one is image 11's."""
    images = torch.tensor([11, 3, 8, 5])
    owners = torch.tensor([11, 3, 3, 3, 8, 8, 5, 5, 20, 11, 21, 22, 23, 24, 25])
    text = unit(15, 3, seed)
    pairs = match_pairs(
        images, owners, text, own=8, duplicate_threshold=threshold, duplicates=duplicates
    )
    return unit(4, 3, seed + 1000), text, pairs


def slow_query(
    cosine: list[Tensor],
    describes: Sequence[float],
    left_out: list[bool],
    temperature: float,
    beta: float = 0.0,
    soft: float = 0.0,
    likeness: list[Tensor] | None = None,
) -> Tensor:
    """One query against its candidates, in float64; ``describes``: how much of each candidate it
    does, or a candidate of it: 0 for a negative."""
    every = range(len(cosine))
    negatives = [k for k in every if not describes[k] and not left_out[k]]
    weight = dict.fromkeys(every, 1.0)
    if negatives:
        hardness = {k: math.exp(beta * cosine[k].item()) for k in negatives}
        mean = sum(hardness.values()) / len(negatives)
        weight |= {k: hardness[k] / mean for k in negatives}
    parts = {k: weight[k] * torch.exp(cosine[k] / temperature) for k in every if not left_out[k]}
    total = torch.stack(list(parts.values())).sum()
    loss = torch.zeros((), dtype=torch.float64)
    likely = {}
    if likeness is not None:
        likely = {
            k: math.exp(float(likeness[k]) / temperature)
            for k in range(len(likeness))
            if not left_out[k]
        }
    for k in parts:
        target = (1 - soft) * (describes[k] / sum(describes) if describes[k] else 0.0)
        if k in likely:
            target += soft * likely[k] / sum(likely.values())
        loss = loss - target * torch.log(parts[k] / total)
    return loss


def slow_means(text: Tensor, pairs: Pairs) -> list[Tensor]:
    """The mean of each image's own captions; of a mixed image, of those that describe some of it,
    weighed by how much."""
    owners, means = pairs.caption_images.tolist(), []
    for i, image in enumerate(pairs.images.tolist()):
        mean = torch.zeros(text.shape[1], dtype=torch.float64)
        for j in range(pairs.own):
            share = owners[j] == image if pairs.share is None else float(pairs.share[i, j])
            mean = mean + share * text[j].detach().double()
        means.append(mean / mean.norm())
    return means


def slow_contrastive(
    image: Tensor,
    text: Tensor,
    pairs: Pairs,
    temperature: float = 0.07,
    beta: float = 0.0,
    soft: float = 0.0,
    queue: Queue | None = None,
    written: Written | None = None,
) -> tuple[Tensor, Tensor]:
    """Image→text and text→image; of mixed images, too."""
    image, text = image.double(), text.double()
    rows, ids = range(len(image)), pairs.images.tolist()
    describes = pairs.positive.double() if pairs.share is None else pairs.share
    like = [[mean @ row.detach() for row in text] for mean in slow_means(text, pairs)]

    to_text = [
        slow_query(
            [image[i] @ text[j] for j in range(len(text))],
            describes[i].tolist(),
            pairs.ignored[i].tolist(),
            temperature,
            beta,
            soft,
            like[i] if soft else None,
        )
        for i in rows
    ]
    to_image = []
    for j in range(pairs.own):
        described = {ids[i] for i in rows if pairs.positive[i, j] or pairs.ignored[i, j]}
        described |= {n for n, mine in (written or {}).items() if _is_near(pairs, j, mine)}
        further = [row for number, row in queue or [] if number not in described]
        to_image.append(
            slow_query(
                [image[i] @ text[j] for i in rows] + [row.double() @ text[j] for row in further],
                describes[:, j].tolist() + [0.0] * len(further),
                pairs.ignored[:, j].tolist() + [False] * len(further),
                temperature,
                beta,
                soft,
                [like[i][j] for i in rows] if soft else None,
            )
        )
    return torch.stack(to_text).mean(), torch.stack(to_image).mean()


def _is_near(pairs: Pairs, caption: int, others: list[Tensor]) -> bool:
    """Whether the own ``caption`` resembles one of ``others``, by frozen embeddings."""
    if pairs.likeness is None:
        return False
    row = pairs.likeness.written[caption]
    return any(float(row @ other) >= pairs.likeness.threshold for other in others)


def slow_loss(
    image: Tensor,
    text: Tensor,
    pairs: Pairs,
    settings: Mapping[str, float],
    queue: Queue | None = None,
    written: Written | None = None,
) -> Tensor:
    """The mean of both directions, for settings as ``ContrastiveLoss`` takes them."""
    both = slow_contrastive(
        image,
        text,
        pairs,
        settings.get("temperature", 0.07),
        settings.get("hard_negatives", 0.0),
        settings.get("soft_targets", 0.0),
        queue,
        written,
    )
    return (both[0] + both[1]) / 2


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"hard_negatives": 1.5},
    {"soft_targets": 0.3},
    {"hard_negatives": 0.5, "soft_targets": 0.1, "temperature": 0.2},
]
