"""One validation: the loss over batches, and retrieval over the whole split."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from captune.config import DEFAULT_CONFIG, Config
from captune.device import autocast, choose_precision
from captune.errors import CaptuneError
from captune.losses import Criterion
from captune.metrics import retrieval_metrics
from captune.models import CLIPModel
from captune.processes import processes
from captune.training.chunks import embed
from captune.training.loader import Batches, with_bank
from captune.training.watch import effective_rank, spread


@torch.no_grad()
def validate(
    model: CLIPModel,
    val_loader: Any,
    criterion: Criterion,
    config: Config | Mapping[str, Any] = DEFAULT_CONFIG,
) -> dict[str, Any]:
    """Loss over batches, and retrieval over the whole split with all its captions.

    Args:
        model: on its device.
        val_loader: ``make_loader(..., shuffle=False)``, or a plain DataLoader in order.
        criterion: as in training; each image stands with the caption drawn for epoch 0.
        config: ``precision``, ``device`` and ``chunk_size`` are read from it.

    Returns:
        ``loss`` and what :func:`captune.metrics.retrieval_metrics` gives, with ``spread`` and
        ``effective_rank`` of the images' embeddings (:mod:`captune.training.watch`). Images that
        cannot be read are left out with their captions; ``images`` and ``captions`` count what
        was used.

    Raises:
        CaptuneError: no image could be read.
    """
    config = Config.from_mapping(config)
    was_training = model.training
    model.eval()
    if isinstance(criterion, nn.Module):
        criterion.eval()
    loader: Batches = with_bank(val_loader, model)
    precision = choose_precision(config.precision, model.device)
    forward = partial(autocast, model.device, precision)
    embedded, rows, losses = [torch.empty(0, model.dimension)], [torch.empty(0).long()], [0.0]
    for batch in tqdm(loader.batches(0), total=loader.steps, desc="validating", leave=False):
        if len(batch.images) == 0:
            continue
        image, _ = embed(model, batch, None, config.chunk_size, forward)
        text = model.project_text(batch.text.to(model.device))
        losses.append(float(criterion(image, text)) * len(image))
        embedded.append(image.float().cpu())
        rows.append(batch.images)
    model.train(was_training)
    here = processes()
    images, found = here.all_rows(torch.cat(rows)), here.all_rows(torch.cat(embedded))
    if not len(images):
        raise CaptuneError(f"no image of {loader.table.describe()} could be read")
    if here.count > 1:  # each had some of the batches, which come in order
        order = images.argsort()
        images, found = images[order], found[order]
    loss = float(here.all_rows(torch.tensor(losses, dtype=torch.float64)).sum()) / len(images)
    captions, owner = loader.table.captions_among(images.numpy())
    text = model.project_text(loader.bank.lookup(captions).to(model.device)).cpu()
    metrics = retrieval_metrics(
        found, text, torch.from_numpy(owner), device=model.device, here=here
    )
    result = {"loss": loss, "images": len(images), "captions": len(captions), **metrics}
    signs = here.from_main(
        lambda: {"spread": spread(found), "effective_rank": effective_rank(found)}
    )
    return {**result, **signs}
