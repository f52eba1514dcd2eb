"""Image embeddings of earlier steps, as further negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from captune.matching import Likeness, near_duplicates


class ImageQueue(nn.Module):
    """The last Q image embeddings, a ring (cross-batch memory, Wang et al. 2020, section 3.2), and
    by which captions near-duplicates of those images' are told.

    Its buffers lie in the state dict of the loss that owns it, so a resumed run has them again.

    Attributes:
        embeddings: ``(Q, D)`` fp32.
        images: ``(Q,) int64`` ids; -1 where nothing was written yet.
        position: scalar int64, where the next row goes.
        writers: ``(W,) int64``, for which of these images each caption was written.
        written: ``(W, E)`` fp32, the frozen tower's embeddings of the captions that each image had
            when it was last appended: about Q times the captions an image has in a step.

    Raises:
        ValueError: a length or dimension below 1.
    """

    embeddings: Tensor
    images: Tensor
    position: Tensor
    writers: Tensor
    written: Tensor

    def __init__(self, length: int, dimension: int) -> None:
        super().__init__()
        if length < 1 or dimension < 1:
            raise ValueError(f"a queue needs rows and a dimension, found {length} x {dimension}")
        self.register_buffer("embeddings", torch.zeros(length, dimension))
        self.register_buffer("images", torch.full((length,), -1))
        self.register_buffer("position", torch.tensor(0))
        self.register_buffer("writers", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("written", torch.zeros(0, 0))

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

    @torch.no_grad()
    def remember(self, writers: Tensor, written: Tensor) -> None:
        """Keep the captions ``written (W, E)`` of the images ``writers (W,)`` that are in the
        queue, in place of what was kept of the same images; and drop those of images that left."""
        old = torch.isin(self.writers, self.images) & ~torch.isin(self.writers, writers)
        new = torch.isin(writers, self.images)
        kept = self.written[old] if len(self.writers) else written[:0].float()
        self.written = torch.cat((kept, written[new].float()))
        self.writers = torch.cat((self.writers[old], writers[new]))

    @torch.no_grad()
    def near(self, likeness: Likeness) -> Tensor:
        """``(Q, K) bool``: which of the candidates of ``likeness`` are near-duplicates of a caption
        of an image in the queue."""
        if not len(self.writers):
            return self.images.new_zeros(
                len(self.images), len(likeness.candidates), dtype=torch.bool
            )
        return near_duplicates(self.images, self.writers, likeness._replace(written=self.written))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As any module's, but as many captions come back as were kept."""
        for name in ("writers", "written"):
            if prefix + name in state:
                own = getattr(self, name)
                setattr(self, name, own.new_empty(state[prefix + name].shape))
        super()._load_from_state_dict(state, prefix, *rest)
