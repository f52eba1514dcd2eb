"""Memory of training at COCO's size: python benchmarks/memory.py [FOLDER] prints one JSON object.

82,783 images with 414,113 synthetic captions, ResNet-50 at 224 pixels in batches of 128, weights
random: memory does not depend on what training would learn. All image files are hard links to a
few JPEGs. The text tower is a stand-in as large as CLIP's that draws random vectors: the real one
would embed for hours on a CPU. Peak memory is that of the process and its workers together.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from captune import CLIPModel, InfoNCELoss, device, fit, open_source
from captune.config import Config
from captune.encoders.image import TransformersImageEncoder
from captune.preprocess import Preprocess
from captune.training.stop import TrainingStopped

IMAGES, CAPTIONS = 82_783, 414_113
CLIP_TEXT_PARAMETERS = 63_428_096
STEPS = 2  # the optimiser's state is there from the first
LINKS = 4  # source files: a file system may allow no more than 65,000 links to one


class StandInText:
    """512 dimensions drawn by a seeded generator, and as many weights as CLIP's text tower."""

    name, dimension, fingerprint = "stand-in", 512, "stand-in v1"

    def __init__(self) -> None:
        self.weights = torch.ones(CLIP_TEXT_PARAMETERS)

    def encode(self, texts: Sequence[str]) -> Tensor:
        generator = torch.Generator().manual_seed(len(texts[0]))
        return F.normalize(torch.randn(len(texts), 512, generator=generator), dim=-1)


class StopAfter(InfoNCELoss):
    """InfoNCE that presses Ctrl-C at its last call."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(image, text)


class PeakMemory:
    """The largest proportional set size of this process and its children, sampled."""

    def __init__(self, seconds: float = 0.25) -> None:
        self.bytes = 0
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        """What lasts less than one interval is sampled, too: at its beginning and at its end."""
        own = psutil.Process()
        over = False
        while True:
            self.bytes = max(self.bytes, self._sample(own))
            if over:
                return
            over = self._over.wait(self._seconds)

    def _sample(self, own: psutil.Process) -> int:
        total = 0
        for process in (own, *own.children(recursive=True)):
            try:
                total += self._bytes_of(process)
            except (psutil.NoSuchProcess, OSError, IndexError):
                continue  # it ended meanwhile
        return total

    def _bytes_of(self, process: psutil.Process) -> int:
        """What counts of one process: its share of all memory that it uses."""
        return int(process.memory_full_info().pss)


def write_coco(
    folder: Path,
    *,
    images: int = IMAGES,
    captions: int = CAPTIONS,
    size: tuple[int, int] = (640, 480),
    split: str = "train",
    first: int = 0,
) -> None:
    """Annotations of COCO's size; every image is one of a few files. Ids begin with ``first``."""
    rng = np.random.default_rng(first)
    photos = folder / f"{split}2014"
    photos.mkdir(parents=True)
    for number in range(LINKS):
        noise = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"{split}{number}.jpg", quality=90)
    numbers = range(first, first + images)
    names = [f"COCO_{split}2014_{number:012d}.jpg" for number in numbers]
    for number, name in enumerate(names):
        os.link(folder / f"{split}{number % LINKS}.jpg", photos / name)
    listed = [
        {"id": number, "file_name": name} for number, name in zip(numbers, names, strict=True)
    ]
    words = ["a", "man", "woman", "dog", "on", "the", "with", "street", "red", "two", "near"]
    drawn = rng.integers(0, len(words), (captions, 10))
    annotated = [
        {
            "id": first + number,
            "image_id": first + number % images,
            "caption": " ".join(words[word] for word in drawn[number]),
        }
        for number in range(captions)
    ]
    (folder / "annotations").mkdir(exist_ok=True)
    path = folder / "annotations" / f"captions_{split}2014.json"
    path.write_text(json.dumps({"images": listed, "annotations": annotated}), encoding="utf-8")


def measure(folder: Path) -> dict[str, Any]:
    """Train for a few steps as ``captune train`` would, and stop as Ctrl-C does."""
    os.environ["CAPTUNE_CACHE"] = str(folder / "cache")
    write_coco(folder / "coco")
    # The whole image tower: stage 1 before it reads rows of a file and holds far less.
    config = Config(log_with="none", head_epochs=0)
    device.MEMORY_TO_SPARE = math.inf  # this machine may have memory to spare; a Colab has not
    with PeakMemory() as peak:
        table = open_source(folder / "coco").table("train")
        tower = TransformersImageEncoder(
            ResNetModel(ResNetConfig()), name="resnet-50", revision="", preprocess=Preprocess()
        )
        model = CLIPModel(StandInText(), image_encoder=tower)
        few = table.take_images(range(512))
        with contextlib.suppress(TrainingStopped):
            stop = StopAfter(STEPS)
            fit(table, few, out=folder / "run", config=config, model=model, criterion=stop)
        cuda = torch.cuda.is_available()
        device_bytes = torch.cuda.max_memory_allocated() if cuda else None
    return {
        "images": len(table),
        "captions": table.captions.num_rows,
        "batch_size": config.batch_size,
        "image_size": 224,
        "trainable_parameters": sum(p.numel() for p in model.parameters()),
        "device": str(model.device),
        "precision": device.choose_precision(config.precision, model.device),
        "peak_memory_gb": round(peak.bytes / 1e9, 2),
        "peak_device_memory_gb": None if device_bytes is None else round(device_bytes / 1e9, 2),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(Path(sys.argv[1]))))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            print(json.dumps(measure(Path(temporary))))
