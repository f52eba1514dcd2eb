"""InfoNCE over as many captions as images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InfoNCELoss(nn.Module):
    r"""Symmetric InfoNCE (van den Oord et al. 2018; Radford et al. 2021, figure 3).

    With :math:`s_{ij} = \langle u_i, v_j \rangle / T`,

    .. math:: L = -\frac{1}{2B} \sum_i \left(
        \log\frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}} + \log\frac{e^{s_{ii}}}{\sum_j e^{s_{ji}}} \right)

    Args:
        temperature: :math:`T`, fixed; 0.07 as in the paper.

    Inputs: ``image (B, D)`` and ``text (B, D)``, unit length. Output: a scalar; :math:`\ln B` for
    embeddings that carry no information.

    Example:
        >>> loss = InfoNCELoss(temperature=0.07)(image, text)
    """

    def __init__(self, *, temperature: float = 0.07) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        self.temperature = temperature

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        logits = image @ text.T / self.temperature  # (B, B), row: image, column: text
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
