"""One epoch of training. `train_step` is the whole of the method."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from captune.config import DEFAULT_CONFIG, Config
from captune.data.augment import colour_factors, jitter_colours
from captune.device import (
    best_device,
    compute_repeatably,
    keep_freed_memory,
    send,
    training_precision,
)
from captune.encoders.layers import freeze_batch_norm
from captune.errors import CaptuneError
from captune.losses import Criterion
from captune.matching import Pairs, PairsPart, match_pairs, match_part, mix_pairs
from captune.models import CLIPModel
from captune.processes import processes
from captune.training.ahead import ahead
from captune.training.chunks import embed, parameters_of_backbone
from captune.training.compiling import BackboneCompiler
from captune.training.feature_batches import FeatureBatches
from captune.training.gradients import summed_gradients
from captune.training.loader import Batch, Batches, with_bank
from captune.training.memory import StepMemory, head_memory
from captune.training.mixing import Mix, step_mix
from captune.training.progress import EpochMeter, EpochProgress
from captune.training.sharing import average_statistics, own_rows, total

STEPS_BETWEEN_READINGS = 10


def make_accelerator(config: Config, **options: Any) -> Accelerator:
    """accelerate, with the device and precision that ``config`` asks for.

    Raises:
        CaptuneError: fp16 on a CPU, or cards that cannot work together as they are set up.
    """
    device = best_device(config.device)
    keep_freed_memory(device)
    compute_repeatably(device)
    precision = training_precision(config.precision, device)
    # Its state is one for the process; without this a second run could not change precision. Under
    # a launcher the process group is part of it and stays.
    AcceleratorState._reset_state(reset_partial_state=processes().count == 1)
    try:
        return Accelerator(
            mixed_precision={"fp32": "no"}.get(precision, precision),
            cpu=config.device == "cpu",
            **options,
        )
    except NotImplementedError as error:  # cards that do not reach one another (some RTX 40)
        raise CaptuneError(str(error)) from None


def train_step(
    model: CLIPModel,
    batch: Batch,
    criterion: Criterion,
    optimizer: Optimizer,
    accelerator: Accelerator,
    config: Config,
    mix: Mix | None = None,
    pairs: Pairs | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of contrastive training; returns the loss and the in-batch accuracy (0 to 1).

    Both are scalars on the device, not yet synchronised. Accuracy is the mean over both
    directions of how often the own partner scores best among the batch's images and one caption
    of each. ``pairs``: of the batch, mixed where there is a ``mix``, if they are known already.
    """
    frozen = send(batch.text, accelerator.device)  # (C, D)
    paired = getattr(criterion, "takes_pairs", False)
    mix = mix if paired else None  # a loss that knows no pairs cannot be told of two images in one
    # Embeddings (B, D), and what of the backbone is left to do when their gradient is known.
    image, chunks = embed(model, batch, mix, config.chunk_size, accelerator.autocast)
    text = model.project_text(frozen)  # (C, D)
    if paired:
        partial = batch.sizes is not None and getattr(criterion, "takes_parts", False)
        known = pairs or (_part if partial else _pairs)(batch, frozen, config, mix)
        loss = criterion(image, text, known)  # type: ignore[call-arg]
        del known  # images by captions, which the chunks' passes would carry along
    else:
        partial = False
        loss = criterion(image, text[: len(image)])
    if batch.sizes is not None and not partial:  # each process has all of it
        loss = loss / len(batch.sizes)
    with _shared_gradients(model, optimizer, batch, chunks is not None) as before_last:
        accelerator.backward(loss)
        if chunks is not None:
            chunks.backward(before_last)
    if batch.sizes is not None:
        average_statistics(model.image_encoder)
    accelerator.clip_grad_norm_(_trained(optimizer), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    rows = slice(None) if batch.sizes is None else own_rows(batch.sizes)
    hits = _hits(image.detach(), text[: len(image)].detach(), rows)
    if batch.sizes is not None:
        loss, hits = total(torch.stack((loss.detach(), hits)))
    return loss.detach(), hits / (2 * len(image))


def _shared_gradients(
    model: CLIPModel, optimizer: Optimizer, batch: Batch, in_chunks: bool
) -> AbstractContextManager[Callable[[], None]]:
    """Where processes share the batch, what is done inside gives all of them the whole gradient;
    what it gives back is to be called before the last of several passes."""
    if batch.sizes is None:
        return nullcontext(lambda: None)
    trained = [p for p in _trained(optimizer) if p.requires_grad]
    known, before = set(trained), dict.fromkeys(parameters_of_backbone(model))
    backbone = [p for p in before if p in known]
    others = [p for p in trained if p not in before]
    return summed_gradients(backbone, others, batch.sizes, in_chunks=in_chunks)


def _hits(image: Tensor, text: Tensor, rows: slice) -> Tensor:
    """How often the own partner scores best, both ways, for ``rows`` of ``(B, D)`` each."""
    own = torch.arange(len(image), device=image.device)[rows]
    one = image[rows] @ text.T  # (b, B)
    other = one.T if len(one) == len(image) else text[rows] @ image.T
    return (one.argmax(1) == own).float().sum() + (other.argmax(1) == own).float().sum()


def _pairs(batch: Batch, frozen: Tensor, config: Config, mix: Mix | None) -> Pairs:
    """Which captions of the step belong to which image; likeness is the frozen tower's."""
    device = frozen.device
    pairs = match_pairs(
        send(batch.images, device),
        send(batch.caption_images, device),
        frozen,
        own=batch.own,
        duplicate_threshold=config.duplicate_threshold,
        duplicates=config.duplicates,
    )
    if mix is None:
        return pairs
    mix = mix.to(device)
    return mix_pairs(pairs, mix.partner, mix.weight)


def _part(batch: Batch, frozen: Tensor, config: Config, mix: Mix | None) -> PairsPart:
    """The same for the images that this process holds and their captions."""
    assert batch.sizes is not None
    return match_part(
        (batch.images, batch.caption_images, batch.own),
        frozen,
        rows=own_rows(batch.sizes),
        total=total,
        mix=mix and (mix.partner, mix.weight),
        duplicate_threshold=config.duplicate_threshold,
        duplicates=config.duplicates,
    )


class _Step(NamedTuple):
    """A batch, and what else of its step no weight decides: the mix, and the pairs where they were
    found ahead of it."""

    batch: Batch
    mix: Mix | None
    pairs: Pairs | None


def _steps(
    loader: Batches,
    criterion: Criterion,
    config: Config,
    progress: EpochProgress,
    device: torch.device,
) -> Generator[_Step]:
    """The steps of an epoch that remain.

    On kept features finding the captions and pairs of a step takes nearly as long as computing it,
    so it is done meanwhile where a core is free for that. A GPU finds pairs faster than a core; and
    processes that share a batch talk of it, in one order only. Photos are decoded meanwhile anyway.
    """
    at_once = device.type == "cpu" and torch.get_num_threads() > 1 and processes().count == 1
    at_once = at_once and isinstance(loader, FeatureBatches)
    steps = _made(loader, config, progress, at_once and getattr(criterion, "takes_pairs", False))
    return ahead(steps) if at_once else steps


def _made(
    loader: Batches, config: Config, progress: EpochProgress, paired: bool
) -> Generator[_Step]:
    epoch, start = progress.epoch, progress.step
    for step, batch in enumerate(loader.batches(epoch, start), start):
        mix = step_mix(batch, config, epoch, step)
        pairs = None
        if paired:
            with head_memory(len(batch.images)):
                pairs = _pairs(batch, batch.text, config, mix)
        yield _Step(batch, mix, pairs)


def coloured(
    batch: Batch, loader: Batches, epoch: int, config: Config, device: torch.device
) -> Batch:
    """The batch on ``device`` with its photos' colours varied; kept features as they are."""
    if not config.augment or config.colour_jitter == 0 or batch.inputs.dim() == 2:
        return batch
    if len(batch.inputs) == 0:  # of several processes one may hold none
        return batch
    own = batch.images if batch.sizes is None else batch.images[own_rows(batch.sizes)]
    ids = loader.table.ids_of(own.numpy())
    factors = colour_factors(ids, config.seed, epoch, config.colour_jitter)
    pixels = send(batch.inputs, device)
    size = config.chunk_size or len(pixels)  # its floats take four times the memory of the bytes
    parts = zip(torch.split(pixels, size), torch.split(factors, size), strict=True)
    return batch._replace(inputs=torch.cat([jitter_colours(*part) for part in parts]))


def _trained(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def train_epoch(
    model: CLIPModel,
    train_loader: Any,
    criterion: Criterion,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    epoch: int = 0,
    config: Config | Mapping[str, Any] = DEFAULT_CONFIG,
    *,
    accelerator: Accelerator | None = None,
    progress: EpochProgress | None = None,
    on_step: Callable[[EpochMeter], None] | None = None,
    compiler: BackboneCompiler | None = None,
) -> dict[str, float]:
    """Train for one epoch.

    Args:
        model: its image tower and head are trained.
        train_loader: from :func:`make_loader`, or a plain DataLoader over a
            :class:`COCOClipDataset` (a caption bank is then built once).
        criterion: ``(image (B, D), text (B, D)) -> scalar``.
        optimizer, scheduler: stepped once a batch.
        epoch: decides order, captions, crops and colours, with the seed.
        config: ``max_grad_norm``, ``colour_jitter``, ``chunk_size``, and what
            :func:`make_accelerator` reads.
        accelerator: one at hand; its optimiser must be prepared.
        progress: where a resumed epoch goes on.
        on_step: called after every step; ``meter.settle()`` brings its sums up to date.
        compiler: does the steps with the backbone compiled, or not; None: as it is.

    Returns:
        ``train_loss``, ``train_accuracy`` (percent), ``images_per_second``.

    Raises:
        CaptuneError: the loss is no longer a finite number, there is no full batch, or a step does
            not fit the memory in chunks of any size (:mod:`captune.training.memory`).
    """
    config = Config.from_mapping(config)
    if accelerator is None:
        accelerator = make_accelerator(config)
        optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
    _make_ready(model, criterion, accelerator.device, config)
    loader = with_bank(train_loader, model)
    progress = progress or EpochProgress(epoch)
    bar = tqdm(total=loader.steps, initial=progress.step, desc=f"epoch {epoch + 1}", unit="step")
    if progress.chunk_size:
        config = config.replace(chunk_size=progress.chunk_size)
    memory = StepMemory(model, criterion, optimizer, config)
    steps = _steps(loader, criterion, config, progress, accelerator.device)
    with bar, closing(memory), closing(steps):
        meter = EpochMeter(progress)
        for batch, mix, pairs in steps:
            if len(batch.images) >= 2:  # one image alone has nothing to be told apart from
                batch = coloured(batch, loader, epoch, memory.config, accelerator.device)
                step = partial(train_step, model, batch, criterion, optimizer, accelerator)
                step = partial(step, mix=mix, pairs=pairs)
                if compiler is not None:
                    step = partial(compiler.run, batch, step)
                loss, accuracy = memory.run(batch, step)
                progress.compiled_steps += compiler is not None and compiler.compiled
                progress.chunk_size = memory.config.chunk_size
                if scheduler is not None and not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                meter.add(loss, accuracy, len(batch.images))
            progress.step += 1
            bar.update()
            if progress.step % STEPS_BETWEEN_READINGS == 0 or progress.step == loader.steps:
                bar.set_postfix(meter.read(_rate(optimizer)), refresh=False)
            if on_step is not None:
                on_step(meter)
        meter.settle()
    if progress.images == 0:
        raise CaptuneError("no batch of at least two readable images: nothing could be trained")
    return progress.summary()


def _make_ready(
    model: CLIPModel, criterion: Criterion, device: torch.device, config: Config
) -> None:
    """Model and loss on the device, in the state in which they train."""
    model.to(device).train()
    if config.freeze_batch_norm:
        freeze_batch_norm(model.image_encoder)
    if isinstance(criterion, nn.Module):
        criterion.to(device).train()


def _rate(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])
