"""The sigmoid loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captune.losses.criterion import part_of
from captune.losses.temperature import Tempered
from captune.matching import Pairs, PairsPart


class SigLIPLoss(Tempered):
    r"""Sigmoid loss: each pair is a question of its own (Zhai et al. 2023, equation 1).

    With :math:`s_{ij} = \langle u_i, v_j \rangle / T`, :math:`z_{ij} = 1` for positives and
    :math:`-1` for negatives, over the pairs that are not ignored,

    .. math:: L = -\frac{1}{B} \sum_{i,j} \log \sigma(z_{ij} (s_{ij} + b))

    Args:
        temperature: :math:`T`, or its first value; 0.1 as in the paper.
        learn_temperature: train :math:`\log 1/T`; :math:`T` stays between 0.01 and 0.5.
        bias: first value of :math:`b`, which is always learnt; -10 as in the paper.

    Where ``pairs.share`` says how much of an image each caption describes (mixed images), a pair is
    true to that share: the term is :math:`a \log\sigma(s + b) + (1 - a) \log\sigma(-s - b)`.

    Inputs and output: as :class:`~captune.losses.contrastive.ContrastiveLoss`.

    Raises:
        ValueError: an argument out of range, or shapes that do not fit.

    Example:
        >>> loss = SigLIPLoss()(image, text, pairs)
    """

    takes_pairs: bool = True
    takes_parts: bool = True

    def __init__(
        self, *, temperature: float = 0.1, learn_temperature: bool = True, bias: float = -10.0
    ) -> None:
        super().__init__(temperature, learn_temperature)
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(
        self, image: Tensor, text: Tensor, pairs: Pairs | PairsPart | None = None
    ) -> Tensor:
        part = part_of(image, text, pairs)
        positive, ignored, share = part.to_text
        with torch.autocast(image.device.type, enabled=False):
            logits = self.logits(image.float()[part.rows] @ text.float().T) + self.bias  # (b, C)
            loss = -F.logsigmoid(torch.where(positive, logits, -logits))
            if share is not None:  # a positive is true of its share, false of the rest
                rest = (1 - share).masked_fill(~positive, 0.0)
                loss = (1 - rest) * loss - rest * F.logsigmoid(-logits)
            return loss.masked_fill(ignored, 0.0).sum() / len(image)
