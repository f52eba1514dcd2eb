"""A batch of pairs, and the loss over it as a slow loop written from its formula, in float64."""

from __future__ import annotations

import math

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
    positive: list[bool],
    left_out: list[bool],
    temperature: float,
    beta: float = 0.0,
    share: float = 0.0,
    likeness: list[Tensor] | None = None,
) -> Tensor:
    """One query against its candidates, in float64."""
    every = range(len(cosine))
    negatives = [k for k in every if not positive[k] and not left_out[k]]
    weight = dict.fromkeys(every, 1.0)
    if negatives:
        hardness = {k: math.exp(beta * cosine[k].item()) for k in negatives}
        mean = sum(hardness.values()) / len(negatives)
        weight |= {k: hardness[k] / mean for k in negatives}
    parts = {k: weight[k] * torch.exp(cosine[k] / temperature) for k in every if not left_out[k]}
    total = torch.stack(list(parts.values())).sum()
    count = sum(positive)
    loss = torch.zeros((), dtype=torch.float64)
    likely = {}
    if likeness is not None:
        likely = {
            k: math.exp(float(likeness[k]) / temperature)
            for k in range(len(likeness))
            if not left_out[k]
        }
    for k in parts:
        target = (1 - share) * (1 / count if positive[k] else 0.0)
        if k in likely:
            target += share * likely[k] / sum(likely.values())
        loss = loss - target * torch.log(parts[k] / total)
    return loss


def slow_contrastive(
    image: Tensor,
    text: Tensor,
    pairs: Pairs,
    temperature: float = 0.07,
    beta: float = 0.0,
    share: float = 0.0,
    queue: Queue | None = None,
    written: Written | None = None,
) -> tuple[Tensor, Tensor]:
    """Image→text and text→image."""
    image, text = image.double(), text.double()
    rows, ids = range(len(image)), pairs.images.tolist()
    owners = pairs.caption_images.tolist()
    like: list[list[Tensor]] = []
    for i in rows:
        mine = [text[j].detach() for j in range(pairs.own) if owners[j] == ids[i]]
        mean = torch.stack(mine).mean(0)
        like.append([mean @ text[k].detach() / mean.norm() for k in range(len(text))])
    soft = bool(share)

    to_text = [
        slow_query(
            [image[i] @ text[j] for j in range(len(text))],
            pairs.positive[i].tolist(),
            pairs.ignored[i].tolist(),
            temperature,
            beta,
            share,
            like[i] if soft else None,
        )
        for i in rows
    ]
    to_image = []
    for j in range(pairs.own):
        described = {ids[i] for i in rows if pairs.positive[i, j] or pairs.ignored[i, j]}
        described |= {n for n, mine in (written or {}).items() if _is_near(pairs, j, mine)}
        further = [row for number, row in queue or [] if number not in described]
        nothing = [False] * len(further)
        to_image.append(
            slow_query(
                [image[i] @ text[j] for i in rows] + [row.double() @ text[j] for row in further],
                pairs.positive[:, j].tolist() + nothing,
                pairs.ignored[:, j].tolist() + nothing,
                temperature,
                beta,
                share,
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


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"hard_negatives": 1.5},
    {"soft_targets": 0.3},
    {"hard_negatives": 0.5, "soft_targets": 0.1, "temperature": 0.2},
]
