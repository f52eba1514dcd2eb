"""Contrastive losses: tensors in, tensor out. A loss never sees a model, a loader or a config."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captune.matching import Block, Pairs, PairsPart, one_to_one, whole

TEMPERATURES = (0.01, 0.5)  # a learnt temperature stays between these


class Criterion(Protocol):
    """A loss over matched pairs: row ``i`` of ``image`` belongs to row ``i`` of ``text``.

    An :class:`torch.nn.Module` qualifies; its parameters, if any, are trained with the model.

    A loss that knows :class:`~captune.matching.Pairs` says so by an attribute ``takes_pairs =
    True``. It is then called as a :class:`PairedCriterion`; one without is given one caption for
    each image, as here.
    """

    def __call__(self, image: Tensor, text: Tensor) -> Tensor:
        """``image`` and ``text`` are ``(B, D)`` unit length, fp32; the result is a scalar."""
        ...


class PairedCriterion(Protocol):
    """A loss over B images and C captions; without pairs it is a :class:`Criterion`."""

    takes_pairs: bool

    def __call__(self, image: Tensor, text: Tensor, pairs: Pairs | None = None) -> Tensor:
        """``image (B, D)`` and ``text (C, D)`` are unit length; the result is a scalar."""
        ...


class PartialCriterion(Protocol):
    """A :class:`PairedCriterion` that can average some of the queries only.

    It says so by ``takes_parts = True``. Of several processes each then computes its own part of
    the loss; of any other loss each computes all of it.
    """

    takes_parts: bool

    def __call__(self, image: Tensor, text: Tensor, pairs: Pairs | PairsPart | None) -> Tensor:
        """All images ``(B, D)`` and texts ``(C, D)`` of the step; the results of all parts add up
        to the loss."""
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


class _Tempered(nn.Module):
    """Logits from cosines by a temperature, fixed or learnt (as the parameter log(1/T))."""

    log_scale: nn.Parameter | None

    def __init__(self, temperature: float, learn_temperature: bool) -> None:
        super().__init__()
        low, high = TEMPERATURES
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        if learn_temperature and not low <= temperature <= high:
            raise ValueError(
                f"a learnt temperature must start between {low} and {high}, found {temperature}"
            )
        self._fixed = temperature
        start = nn.Parameter(torch.tensor(-math.log(temperature))) if learn_temperature else None
        self.register_parameter("log_scale", start)

    @property
    def logit_scale(self) -> Tensor:
        """1/T, a scalar; with a gradient where T is learnt.

        The parameter itself is clipped, as CLIP's is (Radford et al. 2021, section 2.5): a clamp
        on its way to the loss would have no gradient outside, and the way back would be shut.
        """
        if self.log_scale is None:
            return torch.tensor(1 / self._fixed)
        low, high = TEMPERATURES
        with torch.no_grad():
            self.log_scale.clamp_(-math.log(high), -math.log(low))
        return self.log_scale.exp()

    @property
    def temperature(self) -> float:
        """T as it stands; where it is learnt, the device is waited for."""
        return self._fixed if self.log_scale is None else 1 / float(self.logit_scale.detach())

    def logits(self, cosine: Tensor) -> Tensor:
        """``cosine / T``."""
        return cosine / self._fixed if self.log_scale is None else cosine * self.logit_scale


class ImageQueue(nn.Module):
    """The last Q image embeddings, a ring (cross-batch memory, Wang et al. 2020, section 3.2).

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


class ContrastiveLoss(_Tempered):
    r"""Symmetric InfoNCE that knows which captions describe which image.

    With :math:`s_{ij} = \langle u_i, v_j \rangle / T`, positives :math:`P_i` and candidates
    :math:`A_i` (all captions but the ignored) of image :math:`i`, image→text is

    .. math:: -\frac{1}{B} \sum_i \frac{1}{|P_i|} \sum_{j \in P_i}
        \log\frac{e^{s_{ij}}}{\sum_{k \in A_i} w_{ik} e^{s_{ik}}}

    (Khosla et al. 2020, equation 2). Text→image is the same over the B images for each of the
    ``own`` captions; the loss is the mean of both. Queries without a positive are left out. Where
    ``pairs.share`` says how much of an image each caption describes (mixed images), a query's
    positives weigh in proportion to it in place of :math:`1/|P_i|`. All is computed in fp32.
    Without pairs, and with the defaults, it is :class:`InfoNCELoss`.

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
        queue: so many earlier image embeddings are further negatives text→image. In training mode
            and with pairs only: elsewhere ids are unknown or mean other images.
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

    def forward(
        self, image: Tensor, text: Tensor, pairs: Pairs | PairsPart | None = None
    ) -> Tensor:
        remember = self.queue if pairs is not None and self.training else None
        part = _part(image, text, pairs)
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
            if remember is not None:
                further, left_out = _queued(remember, own, part)  # (c, Q)
                cosine = torch.cat((cosine, further), 1)
                share = torch.cat((block.shares, torch.zeros_like(further)), 1)
                ignored = torch.cat((block.ignored, left_out), 1)
                block = Block(share > 0, ignored, share)
            to_image = self._direction(cosine, block, soft, part)
        if remember is not None:
            remember.append(image.detach(), part.images)
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


class SigLIPLoss(_Tempered):
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

    Inputs and output: as :class:`ContrastiveLoss`.

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
        part = _part(image, text, pairs)
        positive, ignored, share = part.to_text
        with torch.autocast(image.device.type, enabled=False):
            logits = self.logits(image.float()[part.rows] @ text.float().T) + self.bias  # (b, C)
            loss = -F.logsigmoid(torch.where(positive, logits, -logits))
            if share is not None:  # a positive is true of its share, false of the rest
                rest = (1 - share).masked_fill(~positive, 0.0)
                loss = (1 - rest) * loss - rest * F.logsigmoid(-logits)
            return loss.masked_fill(ignored, 0.0).sum() / len(image)


def _part(image: Tensor, text: Tensor, pairs: Pairs | PairsPart | None) -> PairsPart:
    """What is averaged here: a part, or all pairs."""
    return pairs if isinstance(pairs, PairsPart) else whole(_checked(image, text, pairs))


def _checked(image: Tensor, text: Tensor, pairs: Pairs | None) -> Pairs:
    """``pairs``, else the diagonal's; their shape must fit, or they would broadcast unnoticed."""
    shape = (len(image), len(text))
    if pairs is None:
        if len(set(shape)) > 1:
            raise ValueError(f"without pairs rows must match: {shape[0]} images, {shape[1]} texts")
        return one_to_one(len(image), image.device)
    masks = [mask for mask in (pairs.positive, pairs.ignored, pairs.share) if mask is not None]
    found = [tuple(mask.shape) for mask in masks]
    if set(found) != {shape}:
        raise ValueError(f"the pairs of {shape[0]} images and {shape[1]} texts are {found}")
    return pairs


def _log_weights(scaled: Tensor, negative: Tensor) -> Tensor:
    """Log of weights in proportion to ``exp(scaled)``, of mean 1 over a row's negatives, else 0."""
    total = scaled.masked_fill(~negative, -math.inf).logsumexp(1, keepdim=True)
    mean = total - negative.sum(1, keepdim=True).log()
    return torch.where(negative, scaled - mean, 0.0)


def _queued(queue: ImageQueue, text: Tensor, part: PairsPart) -> tuple[Tensor, Tensor]:
    """Cosines ``(c, Q)`` of the part's own captions with the queue; where they are no negatives.

    That is where the queue is still empty, and where the very images that a caption describes, or
    ignores, in this batch lie in the queue from an earlier one.
    """
    related = part.to_image.positive | part.to_image.ignored  # (c, B)
    again = part.images[:, None] == queue.images  # (B, Q)
    left_out = (related.float() @ again.float() > 0) | (queue.images < 0)
    # A copy: the queue is overwritten before the gradient of `text` needs it.
    return text @ queue.embeddings.clone().T, left_out
