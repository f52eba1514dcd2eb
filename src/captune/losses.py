"""Contrastive losses: tensors in, tensor out. A loss never sees a model, a loader or a config."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Criterion(Protocol):
    """A loss over matched pairs: row ``i`` of ``image`` belongs to row ``i`` of ``text``.

    An :class:`torch.nn.Module` qualifies; its parameters, if any, are trained with the model.
    """

    def __call__(self, image: Tensor, text: Tensor) -> Tensor:
        """``image`` and ``text`` are ``(B, D)`` unit length, fp32; the result is a scalar."""
        ...


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
