"""bench: where a training step's time goes on this machine, and what would make it faster."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from captune import __version__
from captune.config import Config
from captune.data.dataset import COCOClipDataset, DrawKey
from captune.data.photos import open_image
from captune.data.pixels import UnreadableImageError
from captune.data.sources import open_source
from captune.data.table import CaptionTable
from captune.data.tabular import TableOptions
from captune.device import autocast, best_device, has_native_bf16, loader_workers, send
from captune.encoders.layers import freeze_batch_norm
from captune.errors import CaptuneError
from captune.models import CLIPModel
from captune.training.criteria import make_criterion
from captune.training.loader import Batch
from captune.training.mixing import step_mix
from captune.training.optimizer import make_optimizer
from captune.training.stages import Plan, Stage
from captune.training.steps import coloured, make_accelerator, train_step
from captune.workflow.stopwatch import Rate, Stopwatch, Watched

VERSION = 3  # 2 had no decode among a step's parts
WARM_UP = 2  # steps that set up buffers, workers and kernels, and are not counted
MEANINGFUL = 2  # images: one alone has nothing to be told apart from
TAKEN_APART = 3  # steps of which each part is timed
DECODED = 64  # photos that one process decodes
ENOUGH = 0.95  # of the speed from memory: from here on nothing waits for photos
UNEXPLAINED = 0.15  # of the time, lost from disk beyond what decoding takes: the machine is busy
PARTS = ("decode", "copy", "forward and loss", "backward", "optimiser")


def bench(
    data: str, *, config: Config, options: TableOptions | None = None, steps: int = 8
) -> dict[str, Any]:
    """Train for some steps of stage 2 from memory and from disk, and time what they are made of.

    The ceiling is the same step on a batch that lies in memory. With ``chunk_size`` a step of one
    chunk is timed. No run is written; some captions are embedded, and kept in the cache as always.

    Args:
        data: as for training; a random part of it is read.
        config: towers, batch size, precision, workers.
        options: columns of a table.
        steps: how many are timed in each way.

    Returns:
        A JSON object: ``images_per_second`` (``from memory``, ``from disk``, ``decoded by the
        loader``, ``decoded by one process``, ``features``: forward alone), ``share_of_ceiling``,
        ``step`` (seconds of each part; where there are workers, ``decode`` is done by them
        meanwhile), ``photo`` (mean width and height), ``advice`` and what
        the machine is.

    Raises:
        CaptuneError: no data there, or too little for the steps.
    """
    if steps < 1:
        raise CaptuneError(f"at least one step must be timed, found steps={steps}")
    config = config.replace(
        freeze_backbone=False,
        log_with="none",
        chunk_size=0,
        batch_size=min(config.batch_size, config.chunk_size or config.batch_size),
    )
    table = _sample(open_source(data, options).table(config.train_split), config, steps)
    torch.manual_seed(config.seed)
    model = CLIPModel.from_config(config, device=best_device(config.device))
    stage = Plan(model, table, table, config).stage_of(config.head_epochs)
    found = _timed(model, stage, config, steps)
    found = {
        "format_version": VERSION,
        "data": table.name,
        "config": config.describe(),
        **found,
        "steps": steps,
        "photo": _mean_size(table),
        "workers": loader_workers(config.num_workers, model.device),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": f"captune {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
    }
    return {**found, "advice": advice(found, model)}


def _timed(model: CLIPModel, stage: Stage, config: Config, steps: int) -> dict[str, Any]:
    """All that is measured, one thing after the other."""
    job = _Job(model, stage, config)
    with tqdm(total=4, desc="measuring", unit="part", leave=False) as bar:
        alone = _decode_alone(stage.train_loader.dataset, config)
        bar.update()
        decoded, batch = job.decode()
        bar.update()
        parts, memory, features = job.from_memory(batch, steps)
        bar.update()
        disk = job.from_disk()
        bar.update()
    return {
        "batch_size": len(batch.images),
        "precision": job.precision,
        "images_per_second": {
            "from memory": memory,
            "from disk": disk,
            "decoded by the loader": decoded,
            "decoded by one process": alone,
            "features": features,
        },
        "share_of_ceiling": disk / memory,
        "step": {"decode": len(batch.images) / decoded, **parts},
    }


def _sample(table: CaptionTable, config: Config, steps: int) -> CaptionTable:
    """Random images for all steps, each read once."""
    wanted = config.batch_size * (steps + WARM_UP)
    if len(table) < 2 * config.batch_size:
        raise CaptuneError(
            f"{table.describe()} has fewer than two batches of {config.batch_size} images: take a "
            "smaller batch_size"
        )
    rows = np.random.default_rng(config.seed).permutation(len(table))[:wanted]
    return table.take_images(rows)


class _Job:
    """The objects of stage 2, as training makes them."""

    def __init__(self, model: CLIPModel, stage: Stage, config: Config) -> None:
        self.model, self.stage, self.config = model, stage, config
        self.accelerator = make_accelerator(config)
        self.precision = {"no": "fp32"}.get(
            self.accelerator.mixed_precision, self.accelerator.mixed_precision
        )
        self.criterion = make_criterion(config, model.dimension)
        if isinstance(self.criterion, torch.nn.Module):
            self.criterion.to(self.accelerator.device)
        self.optimizer = make_optimizer(stage, model, self.criterion, self.accelerator, config)
        model.train()
        if config.freeze_batch_norm:
            freeze_batch_norm(model.image_encoder)

    def _batches(self) -> Iterator[Batch]:
        return self.stage.train_loader.batches(self.config.head_epochs)  # type: ignore[no-any-return]

    def _step(self, batch: Batch, watch: Stopwatch) -> None:
        """As in training, from the pixels' way to the device to the new weights."""
        began = watch.now()
        epoch, device = self.config.head_epochs, self.model.device
        batch = batch._replace(inputs=send(batch.inputs, device))
        watch.seconds["copy"] += watch.now() - began
        batch = coloured(batch, self.stage.train_loader, epoch, self.config, device)
        train_step(
            self.model,
            batch,
            self.criterion,
            Watched(self.optimizer, watch, {"step": "optimiser", "zero_grad": "optimiser"}),  # type: ignore[arg-type]
            Watched(
                self.accelerator, watch, {"backward": "backward", "clip_grad_norm_": "optimiser"}
            ),
            self.config,
            step_mix(batch, self.config, epoch, 0),
        )
        watch.seconds["whole"] += watch.now() - began

    def decode(self) -> tuple[float, Batch]:
        """Images a second that the loader gives, nothing else going on; and a batch."""
        rate, found = Rate(torch.device("cpu")), None
        for batch in self._batches():
            rate.add(len(batch.images))
            found = batch if len(batch.images) >= MEANINGFUL else found
        if found is None:
            raise CaptuneError("no batch of at least two readable images: nothing to measure")
        return rate.value(), found

    def from_memory(self, batch: Batch, steps: int) -> tuple[dict[str, float], float, float]:
        """Seconds of each part of a step, images a second of it, and of forward alone.

        A card is waited for between the parts, but not where the speed is measured: in training
        it is given the next step while it computes this one.
        """
        device, freely = self.model.device, Stopwatch(self.model.device, waits=False)
        for _ in range(WARM_UP):
            self._step(batch, freely)
        rate = Rate(device)
        for _ in range(steps + 1):  # the first one starts the clock
            self._step(batch, freely)
            rate.add(len(batch.images))
        speed = rate.value()
        watch = Stopwatch(device)
        counted = min(steps, TAKEN_APART)
        for _ in range(counted):
            self._step(batch, watch)
        seconds = {name: total / counted for name, total in watch.seconds.items()}
        seconds["forward and loss"] = seconds.pop("whole") - sum(seconds.values())
        forward = Stopwatch(device)
        with torch.no_grad(), autocast(device, self.precision):
            inputs = batch.inputs.to(device)
            for _ in range(counted):
                forward.around("forward", self.model.pooled_features)(inputs)
        features = len(batch.images) * counted / forward.seconds["forward"]
        return {name: seconds[name] for name in PARTS if name in seconds}, speed, features

    def from_disk(self) -> float:
        """Images a second of training as it is."""
        rate, freely = Rate(self.model.device), Stopwatch(self.model.device, waits=False)
        for batch in self._batches():
            if len(batch.images) >= MEANINGFUL:
                self._step(batch, freely)
            rate.add(len(batch.images))
        return rate.value()


def _decode_alone(dataset: COCOClipDataset, config: Config) -> float:
    """Images a second that one process decodes, crops and resizes."""
    began = time.perf_counter()
    done = 0
    for row in range(min(DECODED, len(dataset))):
        try:
            dataset[DrawKey(row, 0, config.seed)]
        except UnreadableImageError:
            continue
        done += 1
    return done / (time.perf_counter() - began)


def _mean_size(table: CaptionTable) -> list[float]:
    """Mean width and height of some photos, from their heads."""
    sizes = []
    for row in range(min(DECODED, len(table))):
        try:
            with open_image(table.path(row)) as image:
                sizes.append(image.size)
        except Exception:  # whatever Pillow raises on what is no photo
            continue
    return [float(side) for side in np.mean(sizes, axis=0)] if sizes else [0.0, 0.0]


def _decoding_costs(found: Mapping[str, Any]) -> float:
    """The share of the time that decoding takes from steps; with workers it may be all of it."""
    if found["workers"]:
        return 1.0
    decode = float(found["step"]["decode"])
    step = float(found["batch_size"]) / float(found["images_per_second"]["from memory"])
    return decode / (decode + step)


def advice(found: Mapping[str, Any], model: CLIPModel) -> list[str]:
    """What would make training faster, in plain words."""
    speed, share = found["images_per_second"], found["share_of_ceiling"]
    said = []
    explained = _decoding_costs(found)
    if share < ENOUGH and 1 - share > explained + UNEXPLAINED:
        said.append(
            f"{100 * (1 - share):.0f} % of the time is lost and decoding explains "
            f"{100 * explained:.0f} %: other work keeps this machine busy, measure again"
        )
    elif share < ENOUGH:
        lost = f"{100 * (1 - share):.0f} % of the time goes into waiting for photos"
        side = model.preprocess.image_size
        if min(found["photo"]) > 1.5 * side:
            said.append(
                f"{lost}, which are {found['photo'][0]:.0f} x {found['photo'][1]:.0f} where the "
                f"model sees {side}: store them smaller once, by captune data pack"
            )
        elif found["workers"] and speed["decoded by the loader"] < speed["from memory"]:
            said.append(f"{lost}: {found['workers']} workers decode too slowly, take more of them")
        else:
            said.append(f"{lost}: decoding takes the cores of the step")
    if found["precision"] == "fp32" and has_native_bf16(model.device):
        said.append("this machine computes in bf16, which is faster: precision=auto")
    if found["precision"] == "fp32" and model.device.type == "cuda":
        said.append("this card computes faster in half precision: precision=auto")
    return said or ["nothing waits for photos: the model's own arithmetic is the limit"]
