"""A large batch in the memory of a small one: the backbone sees it in chunks (GradCache).

A contrastive loss needs all images of a step at once, but only their pooled features: the
activations inside the backbone, nearly all of the memory, need not be there together (Gao et al.
2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"). So each chunk
passes through the backbone twice, first without activations for its features, then with them for
its share of the gradient; between the two, head, mixup and loss work on the whole batch's features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from captune.device import send
from captune.models import CLIPModel
from captune.training.draws import Draws
from captune.training.loader import Batch
from captune.training.mixing import Mix
from captune.training.sharing import gather, own_draws, own_rows

Autocast = Callable[[], AbstractContextManager[object]]


def embed(
    model: CLIPModel, batch: Batch, mix: Mix | None, chunk_size: int, autocast: Autocast
) -> tuple[Tensor, PooledChunks | None]:
    """The embeddings ``(B, D)`` of a batch's images, unit length, mixed where there is a ``mix``.

    Args:
        chunk_size: images that go through the backbone at once; 0 = all of them. Kept features
            have passed it already.
        autocast: makes the context of the forward pass.

    Returns:
        The embeddings, and the chunks whose ``backward`` must follow that of the loss; None where
        all images went through the backbone at once.
    """
    if batch.sizes is not None:
        return _embed_shared(model, batch, batch.sizes, mix, chunk_size, autocast)
    pixels = batch.inputs
    if pixels.dim() == 2 or not 0 < chunk_size < len(pixels):
        with autocast():
            return batch.embed(model) if mix is None else mix.embed(model, batch), None
    pixels = send(pixels, model.device)
    photos: Callable[[slice], Tensor] = pixels.__getitem__
    if mix is not None and mix.photos:
        photos, mix = partial(mix.blend, pixels), None  # what is pooled is mixed already
    chunks = PooledChunks(model, photos, even_slices(len(pixels), chunk_size), autocast)
    kept = batch._replace(inputs=chunks.features)
    with autocast():
        return kept.embed(model) if mix is None else mix.embed(model, kept), chunks


def _embed_shared(
    model: CLIPModel,
    batch: Batch,
    sizes: Sequence[int],
    mix: Mix | None,
    chunk_size: int,
    autocast: Autocast,
) -> tuple[Tensor, PooledChunks | None]:
    """The same where several processes share the batch: of all its images, in each of them."""
    inputs = send(batch.inputs, model.device)
    chunks = None
    if inputs.dim() > 2:
        photos: Callable[[slice], Tensor] = inputs.__getitem__
        if mix is not None and mix.photos:
            first, every = own_rows(sizes).start, gather(inputs, sizes)
            blend = partial(mix.blend, every)
            photos = lambda rows: blend(slice(first + rows.start, first + rows.stop))  # noqa: E731
            mix = None
        with own_draws(model.device, batch.images):
            inputs, chunks = _pooled(model, photos, len(inputs), chunk_size, autocast)
    # fp32: what comes back is added up over the processes.
    kept = batch._replace(inputs=gather(inputs.float(), sizes), sizes=None)
    with autocast():
        return kept.embed(model) if mix is None else mix.embed(model, kept), chunks


def _pooled(
    model: CLIPModel,
    photos: Callable[[slice], Tensor],
    count: int,
    chunk_size: int,
    autocast: Autocast,
) -> tuple[Tensor, PooledChunks | None]:
    """The pooled features of this process's ``count`` photos, and their chunks.

    They ask for a gradient in every process or in none, for it is added up over all.
    """
    trained = any(p.requires_grad for p in parameters_of_backbone(model))
    chunks = None
    if count == 0:
        pooled = torch.zeros(0, model.feature_dim, device=model.device)
    elif 0 < chunk_size < count:
        chunks = PooledChunks(model, photos, even_slices(count, chunk_size), autocast)
        pooled = chunks.features
    else:
        with autocast():
            pooled = model.pooled_features(photos(slice(0, count)))
    if trained and not pooled.requires_grad:
        pooled.requires_grad_()
    return pooled, chunks


class PooledChunks:
    """The pooled features of a batch's photos, chunk by chunk, and their way back.

    The gradients are those of the whole batch: in fp32 but for rounding, in bf16 and fp16 within
    what these leave uncertain. Two things differ. A BatchNorm whose statistics move takes those of
    each chunk, and its running ones move once a chunk. A backbone that draws (dropout, stochastic
    depth) draws for each chunk in turn: other masks, of the same distribution.

    Args:
        model: its backbone and pooling are what is passed twice.
        photos: gives the pixels ``(n, 3, S, S)`` of n rows of the batch.
        chunks: all rows of the batch, in order.
        autocast: makes the context of each pass.

    ``features (B, C)`` ask for a gradient wherever a weight before them does.
    """

    def __init__(
        self,
        model: CLIPModel,
        photos: Callable[[slice], Tensor],
        chunks: Sequence[slice],
        autocast: Autocast,
    ) -> None:
        self._model = model
        self._photos = photos
        self._chunks = chunks
        self._autocast = autocast
        self._draws: list[Draws] = []
        pooled = []
        # A context of its own: in some versions of torch, autocast keeps the weights that it casts
        # until it is left, and those cast here know no gradient.
        with torch.no_grad(), autocast():
            for rows in chunks:
                self._draws.append(Draws.now(model.device))
                pooled.append(model.pooled_features(photos(rows)))
        trained = any(p.requires_grad for p in parameters_of_backbone(model))
        self.features = torch.cat(pooled).requires_grad_(trained)

    def backward(self, before_last: Callable[[], None] = lambda: None) -> None:
        """Bring the gradient of ``features`` to the weights before them; call it once.

        ``before_last`` is called before the last chunk's own backward pass.

        A loss that was scaled (fp16) has left a scaled gradient here, so nothing is scaled again.
        """
        gradient = self.features.grad
        if gradient is None:  # nothing before them is trained
            return
        after = Draws.now(self._model.device)
        with _no_running_statistics(_parts(self._model)):
            for rows, draws in zip(self._chunks, self._draws, strict=True):
                draws.again()
                with self._autocast():
                    pooled = self._model.pooled_features(self._photos(rows))
                if rows is self._chunks[-1]:
                    before_last()
                if pooled.requires_grad:  # else what is trained is not passed at all
                    torch.autograd.backward(pooled, gradient[rows])
        after.again()  # the next step draws as if nothing had been drawn twice


def parameters_of_backbone(model: CLIPModel) -> list[nn.Parameter]:
    """What an image passes before its features are pooled, in order."""
    return [p for part in _parts(model) for p in part.parameters()]


def even_slices(count: int, size: int) -> list[slice]:
    """``count`` rows in as few slices of at most ``size`` as can be, as even as can be: no last one
    of a few images, whose BatchNorm would have poor statistics."""
    number = math.ceil(count / size)
    bounds = [count * place // number for place in range(number + 1)]
    return [slice(low, high) for low, high in pairwise(bounds)]


def _parts(model: CLIPModel) -> list[nn.Module]:
    """What :meth:`CLIPModel.pooled_features` passes through."""
    return [part for part in (model.image_encoder, model.pooling) if part is not None]


@contextmanager
def _no_running_statistics(parts: Sequence[nn.Module]) -> Iterator[None]:
    """BatchNorms that take their batch's statistics still do, but do not count it a second time."""
    norms = [
        module
        for part in parts
        for module in part.modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
