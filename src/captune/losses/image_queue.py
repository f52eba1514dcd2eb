"""Image embeddings of earlier steps, as further negatives."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImageQueue(nn.Module):
    """The last Q image embeddings, a ring (cross-batch memory, Wang et al. 2020, section 3.2).

    Of its images only a caption's own are left out of that caption's negatives: others whose
    captions resemble it are not, for the queue keeps no captions.

    Its buffers lie in the state dict of the loss that owns it, so a resumed run has them again.

    Attributes:
        embeddings: ``(Q, D)`` fp32.
        images: ``(Q,) int64`` ids; -1 where nothing was written yet.
        position: scalar int64, where the next row goes.

    Raises:
        ValueError: a length or dimension below 1.
    """

    embeddings: Tensor
    images: Tensor
    position: Tensor

    def __init__(self, length: int, dimension: int) -> None:
        super().__init__()
        if length < 1 or dimension < 1:
            raise ValueError(f"a queue needs rows and a dimension, found {length} x {dimension}")
        self.register_buffer("embeddings", torch.zeros(length, dimension))
        self.register_buffer("images", torch.full((length,), -1))
        self.register_buffer("position", torch.tensor(0))

    @torch.no_grad()
    def append(self, embeddings: Tensor, images: Tensor) -> None:
        """Write ``embeddings (B, D)`` of ``images (B,)`` over the oldest rows."""
        length = len(self.images)
        embeddings, images = embeddings[-length:], images[-length:]
        # Computed on the device: reading the position would make the host wait at every step.
        rows = (self.position + torch.arange(len(images), device=images.device)) % length
        self.embeddings[rows] = embeddings.float()
        self.images[rows] = images
        self.position.copy_((self.position + len(images)) % length)
