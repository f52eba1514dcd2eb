"""Stage 1 at COCO's size: python benchmarks/stage1.py [--epochs N] [--steps N] [--threads N].

82,783 images with 2,048 features in two views and 414,113 captions in 512 dimensions, on disk as
captune keeps them, drawn at random: captions of one image are alike, some images share what they
show, and all captions have a direction in common, as CLIP's have. Trained by `train_epoch` with
the recipe `best`, all captions of an image and 8,192 of the bank in a step, the moving average
taken in after each, a ResNet-50's weights beside that no step touches. Peak memory is that of the
process, mapped pages of bank and features included.

Writes benchmarks/results/stage1.json and prints it.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from memory import CAPTIONS, IMAGES, PeakMemory
from record import heading, keep, median, timed
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from captune import CLIPModel
from captune.bank import CaptionBank
from captune.config import Config
from captune.data.table import CaptionTable
from captune.device import best_device
from captune.encoders.contract import Features
from captune.features import FeatureStore
from captune.preprocess import Preprocess
from captune.training.average import MovingAverage
from captune.training.criteria import make_criterion
from captune.training.feature_batches import FeatureBatches
from captune.training.optimizer import make_optimizer
from captune.training.progress import EpochMeter
from captune.training.schedule import warmup_cosine
from captune.training.stages import HEAD, Stage
from captune.training.steps import make_accelerator, train_epoch

CHANNELS, DIMENSION, NEGATIVES = 2048, 512, 8192
BLOCK = 20_000  # rows drawn at once


class IdleBackbone(nn.Module):
    """An image tower that is never passed, for stage 1 has its features already; but its weights
    are there, as many as a ResNet-50's, and whatever touches all weights pays for them."""

    name, revision, feature_dim, preprocess = "none", "", CHANNELS, Preprocess()

    def __init__(self) -> None:
        super().__init__()
        shapes = [parameter.shape for parameter in ResNetModel(ResNetConfig()).parameters()]
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)

    def forward(self, pixels: Tensor) -> Features:
        raise AssertionError("stage 1 passes no photo")

    def description(self) -> dict[str, Any]:
        return {"kind": "none"}


class NoText:
    """A text tower whose captions are embedded already."""

    name, dimension, fingerprint = "none", DIMENSION, "none"

    def encode(self, texts: list[str]) -> Tensor:
        raise AssertionError("the bank is there")


def captions_table(images: int, captions: int) -> CaptionTable:
    """Caption ``m`` belongs to image ``m`` modulo ``images``; one word each, no file anywhere."""
    numbers = np.arange(captions)
    names = [f"{number}.jpg" for number in range(images)]
    return CaptionTable.from_columns(
        pa.table({"image_id": np.arange(images), "file_name": names, "path": names}),
        pa.table(
            {
                "caption_id": numbers,
                "caption": numbers.astype(str),
                "image": numbers % images,
            }
        ),
        "synthetic",
        "train",
    )


def write_rows(path: Path, shape: tuple[int, int], draw: Callable[[int, int], Tensor]) -> Any:
    """A float16 array on disk, drawn in blocks; opened as captune opens it."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    for start in range(0, shape[0], BLOCK):
        end = min(start + BLOCK, shape[0])
        array[start:end] = draw(start, end).numpy().astype(np.float16)
    array.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def write_bank(path: Path, images: int, captions: int) -> CaptionBank:
    """Captions: what all have in common, what their image shows (every fourth image shares it with
    others), and what is their own."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(DIMENSION, generator=generator)
    shown = torch.randn(max(1, images // 40), DIMENSION, generator=generator)

    def draw(start: int, end: int) -> Tensor:
        image = torch.arange(start, end) % images
        own = torch.randn(images, DIMENSION, generator=torch.Generator().manual_seed(1))[image]
        shared = (image % 4 == 0)[:, None]
        theme = torch.where(shared, shown[image % len(shown)], own)
        noise = torch.randn(end - start, DIMENSION, generator=generator)
        return F.normalize(common + theme + 0.6 * noise, dim=-1)

    return CaptionBank(
        write_rows(path, (captions, DIMENSION), draw), np.arange(captions), "synthetic"
    )


def write_features(folder: Path, images: int) -> FeatureStore:
    """Features above 0, as after a ReLU and an average."""
    generator = torch.Generator().manual_seed(2)

    def draw(start: int, end: int) -> Tensor:
        return torch.randn(end - start, CHANNELS, generator=generator).abs()

    views = [write_rows(folder / f"{view}.npy", (images, CHANNELS), draw) for view in ("a", "b")]
    return FeatureStore(*views, np.ones(images, dtype=bool))


class Enough(Exception):
    """So many steps are done."""


class Job:
    """The objects of stage 1, as training makes them."""

    def __init__(self, folder: Path, images: int, captions: int, **values: Any) -> None:
        self.config = Config(log_with="none", bank_negatives=NEGATIVES, **values)
        table = captions_table(images, captions)
        bank = write_bank(folder / "bank.npy", images, captions)
        store = write_features(folder, images)
        torch.manual_seed(0)
        config = self.config
        self.accelerator = make_accelerator(config)
        self.model = CLIPModel(
            NoText(),
            image_encoder=IdleBackbone(),  # type: ignore[arg-type]
            hidden_dim=config.hidden_dim,
            dropout=config.dropout,
            feature_dropout=config.feature_dropout,
        )
        self.criterion = make_criterion(config, DIMENSION)
        self.loader = FeatureBatches(store, table, bank, config, shuffle=True)
        stage = Stage(HEAD, 0, config.head_epochs, self.loader, self.loader, [], config)
        self.optimizer = make_optimizer(stage, self.model, self.criterion, self.accelerator, config)
        self.scheduler = warmup_cosine(
            self.optimizer.optimizer, warmup_steps=config.warmup_steps, total_steps=stage.steps
        )
        self.average = MovingAverage(self.model, decay=config.ema_decay)
        self.average.follow(self.optimizer)
        self.losses: list[float] = []
        self.done = 0

    def epoch(self, number: int, steps: int = 0) -> None:
        """Train for an epoch, or for so many steps of it."""
        last = self.done + steps if steps else 0

        def after_step(meter: EpochMeter) -> None:
            self.average.update(self.model, self.done)
            self.done += 1
            if self.done == last:
                meter.settle()
                self.losses.append(meter.last_loss)
                raise Enough

        with contextlib.suppress(Enough):
            found = train_epoch(
                self.model,
                self.loader,
                self.criterion,
                self.optimizer,
                self.scheduler,
                number,
                self.config,
                accelerator=self.accelerator,
                on_step=after_step,
            )
            self.losses.append(found["train_loss"])


def measure(folder: Path, images: int, captions: int, epochs: int, steps: int) -> dict[str, Any]:
    """The first epoch's buffers and pages are part of it: an epoch of few steps warms up first."""
    with PeakMemory() as peak:
        job = Job(folder, images, captions)
        if steps:
            job.epoch(0, 3)
        taken = [timed(lambda number=number: job.epoch(number, steps)) for number in range(epochs)]
    whole = job.loader.steps
    share = whole / (steps or whole)
    return {
        "images": images,
        "captions": captions,
        "features": CHANNELS,
        "dimension": DIMENSION,
        "bank_negatives": NEGATIVES,
        "batch_size": job.config.head_batch_size,
        "precision": job.accelerator.mixed_precision,
        "steps of an epoch": whole,
        "steps measured": steps or whole,
        "epoch, seconds": median([share * one.seconds for one in taken]),
        "epoch, processor seconds": median([share * one.processor for one in taken]),
        "step, milliseconds": median([1e3 * share * one.seconds / whole for one in taken]),
        "step, processor milliseconds": median(
            [1e3 * share * one.processor / whole for one in taken]
        ),
        "peak memory, GB": round(peak.bytes / 1e9, 2),
        "losses": job.losses,
    }


def main() -> None:
    """Measure, keep and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=3, help="that are measured (default 3)")
    parser.add_argument("--steps", type=int, default=0, help="of an epoch; 0 = all")
    parser.add_argument("--threads", type=int, default=0, help="0 = as torch has it")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = heading(device=best_device())
    with tempfile.TemporaryDirectory() as scratch:
        size = (arguments.images, arguments.captions)
        result |= measure(Path(scratch), *size, arguments.epochs, arguments.steps)
    keep("stage1", result, arguments.out)


if __name__ == "__main__":
    main()
