"""InfoNCE over any number of captions, of which several may describe an image."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from captune.losses.criterion import part_of
from captune.losses.image_queue import ImageQueue
from captune.losses.temperature import Tempered
from captune.matching import Block, Pairs, PairsPart


class ContrastiveLoss(Tempered):
    r"""Symmetric InfoNCE that knows which captions describe which image.

    With :math:`s_{ij} = \langle u_i, v_j \rangle / T`, positives :math:`P_i` and candidates
    :math:`A_i` (all captions but the ignored) of image :math:`i`, image→text is

    .. math:: -\frac{1}{B} \sum_i \frac{1}{|P_i|} \sum_{j \in P_i}
        \log\frac{e^{s_{ij}}}{\sum_{k \in A_i} w_{ik} e^{s_{ik}}}

    (Khosla et al. 2020, equation 2). Text→image is the same over the B images for each of the
    ``own`` captions; the loss is the mean of both. Queries without a positive are left out. Where
    ``pairs.share`` says how much of an image each caption describes (mixed images), a query's
    positives weigh in proportion to it in place of :math:`1/|P_i|`. All is computed in fp32.
    Without pairs, and with the defaults, it is :class:`~captune.losses.infonce.InfoNCELoss`.

    Args:
        temperature: :math:`T`, or its first value.
        learn_temperature: train :math:`\log 1/T`; :math:`T` stays between 0.01 and 0.5.
        hard_negatives: :math:`\beta` of :math:`w_{ik} \propto e^{\beta \langle u_i, v_k \rangle}`
            over the negatives of a query, of mean 1 and without gradient (Robinson et al. 2021);
            :math:`w = 1` for positives. The attribute may be changed while training: a warm-up.
        soft_targets: :math:`a`; the target of a query is :math:`1 - a` uniform over its positives
            and :math:`a` the softmax over its candidates of the cosine, over :math:`T`, of captions
            with the mean of an image's own captions (the idea: Andonian et al. 2022; Gao et al.
            2022). Without gradient.
        queue: so many earlier image embeddings are further negatives text→image, but of captions
            that describe them or, as in the batch, resemble one that does. In training mode and
            with pairs only: elsewhere ids are unknown or mean other images. While the attribute
            ``queue_rests`` is set, they are kept and not used: a warm-up.
        dimension: D; needed with a queue.

    Inputs: ``image (B, D)``, ``text (C, D)``, unit length, and their pairs; None means C = B and
    row ``i`` belongs to row ``i``. Output: a scalar.

    Raises:
        ValueError: an argument out of range, or shapes that do not fit.

    Example:
        >>> pairs = match_pairs(images, caption_images, text, own=640, duplicate_threshold=0.9)
        >>> loss = ContrastiveLoss(learn_temperature=True)(image, text, pairs)
    """

    takes_pairs: bool = True
    takes_parts: bool = True

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        hard_negatives: float = 0.0,
        soft_targets: float = 0.0,
        queue: int = 0,
        dimension: int = 0,
    ) -> None:
        super().__init__(temperature, learn_temperature)
        if not hard_negatives >= 0:
            raise ValueError(f"hard_negatives must be at least 0, found {hard_negatives}")
        if not 0 <= soft_targets < 1:
            raise ValueError(f"soft_targets must be at least 0 and below 1, found {soft_targets}")
        self.hard_negatives = hard_negatives
        self.soft_targets = soft_targets
        self.queue = ImageQueue(queue, dimension) if queue else None
        self.queue_rests = False

    def forward(
        self, image: Tensor, text: Tensor, pairs: Pairs | PairsPart | None = None
    ) -> Tensor:
        remember = self.queue if pairs is not None and self.training else None
        part = part_of(image, text, pairs)
        with torch.autocast(image.device.type, enabled=False):
            image, text = image.float(), text.float()
            means = self._means(text, part) if self.soft_targets else None  # (B, D)
            cosine = image[part.rows] @ text.T  # (b, C)
            soft = self._likeness(means[part.rows], text) if means is not None else None  # (b, C)
            to_text = self._direction(cosine, part.to_text, soft, part)

            own = text[part.columns]  # (c, D)
            if isinstance(pairs, PairsPart):
                cosine = own @ image.T  # (c, B)
                soft = self._likeness(own, means) if means is not None else None
            else:  # the same once more
                cosine = cosine[:, : part.own].T
                soft = soft[:, : part.own].T if soft is not None else None
            block = part.to_image
            if remember is not None and not self.queue_rests:
                further, left_out = _queued(remember, own, part)  # (c, Q)
                cosine = torch.cat((cosine, further), 1)
                share = torch.cat((block.shares, torch.zeros_like(further)), 1)
                ignored = torch.cat((block.ignored, left_out), 1)
                block = Block(share > 0, ignored, share)
            to_image = self._direction(cosine, block, soft, part)
        if remember is not None:
            remember.append(image.detach(), part.images)
            if part.likeness is not None:
                remember.remember(part.caption_images[: part.own], part.likeness.written)
        return (to_text + to_image) / 2

    def _direction(
        self, cosine: Tensor, block: Block, soft: Tensor | None, part: PairsPart
    ) -> Tensor:
        """Summed over queries (rows) with a positive, which is where ``share (R, K)`` is above 0,
        and divided by how many there are in all parts; ``soft`` may lack the last columns."""
        share, ignored = block.shares, block.ignored
        logits = self.logits(cosine)  # (R, K)
        if self.hard_negatives:
            negative = ~(ignored | (share > 0))
            weights = _log_weights(self.hard_negatives * cosine.detach(), negative)
            logits = logits + weights
        # The lowest number, not -inf, here and below: where nothing is left, that would be NaN, and
        # times the target, which is 0 there, too.
        log_share = logits.masked_fill_(ignored, torch.finfo(logits.dtype).min).log_softmax(1)

        total = share.sum(1, keepdim=True)
        answered = total[:, 0] > 0
        target = share / total.masked_fill(total == 0, 1.0)
        if soft is not None:
            seen = soft.shape[1]
            likely = soft.masked_fill(ignored[:, :seen], torch.finfo(soft.dtype).min).softmax(1)
            target = (1 - self.soft_targets) * target
            target[:, :seen] += self.soft_targets * likely
        loss = -(target * log_share).sum(1)  # (R,)
        return (loss * answered).sum() / part.total(answered.sum()).clamp(min=1)

    @torch.no_grad()
    def _likeness(self, one: Tensor, other: Tensor) -> Tensor:
        """Logits of means of captions with captions, or of captions with means."""
        return self.logits(one @ other.T)

    @torch.no_grad()
    def _means(self, text: Tensor, part: PairsPart) -> Tensor:
        """``(B, D)``, unit length: the mean of each image's own captions, by their shares."""
        weights = (
            (part.images[:, None] == part.caption_images[part.columns]).float()
            if part.to_image.share is None
            else part.to_image.share.T
        )  # (B, c)
        # The sum's direction is the mean's.
        return F.normalize(part.total(weights @ text[part.columns]), dim=-1)


def _log_weights(scaled: Tensor, negative: Tensor) -> Tensor:
    """Log of weights in proportion to ``exp(scaled)``, of mean 1 over a row's negatives, else 0."""
    total = scaled.masked_fill(~negative, -math.inf).logsumexp(1, keepdim=True)
    mean = total - negative.sum(1, keepdim=True).log()
    return torch.where(negative, scaled - mean, 0.0)


def _queued(queue: ImageQueue, text: Tensor, part: PairsPart) -> tuple[Tensor, Tensor]:
    """Cosines ``(c, Q)`` of the part's own captions with the queue; where they are no negatives.

    That is where the queue is still empty, where the very images that a caption describes, or
    ignores, in this batch lie in the queue from an earlier one, and where it is a near-duplicate of
    a caption of another image there.
    """
    related = part.to_image.positive | part.to_image.ignored  # (c, B)
    again = part.images[:, None] == queue.images  # (B, Q)
    left_out = (related.float() @ again.float() > 0) | (queue.images < 0)
    if part.likeness is not None:
        own = part.likeness.written[part.columns]
        left_out |= queue.near(part.likeness._replace(candidates=own)).T
    # A copy: the queue is overwritten before the gradient of `text` needs it.
    return text @ queue.embeddings.clone().T, left_out
