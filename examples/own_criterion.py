"""A loss of one's own: captune train DATA criterion=own_criterion:make"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SigmoidLoss(nn.Module):
    """Pairwise sigmoid loss of SigLIP (Zhai et al. 2023); its two weights are trained along."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:  # (B, D), (B, D), unit length
        logits = image @ text.T * self.log_scale.exp() + self.bias  # (B, B)
        signs = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -F.logsigmoid(signs * logits).sum(1).mean()


make = SigmoidLoss
