"""Memory and time of a large batch in chunks: benchmarks/chunks.py [CASE ...], such as 512/128.

A case is a batch size, or a batch size and the chunk_size it is trained with. For each, a fresh
process trains `minilm-lite0` with the recipe `best` for one step of stage 2 at 224 pixels, all
layers of the backbone, on noise with five captions an image. Memory is the peak above that of the
process with its model loaded: pixels, activations, gradients and the optimiser's state.

Writes benchmarks/results/chunks.json and prints it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from typing import Any

import psutil
import torch
from memory import PeakMemory
from record import heading, keep
from torch.nn import functional as F

from captune import CLIPModel, Config, device
from captune.device import best_device
from captune.encoders.layers import freeze_batch_norm
from captune.training.criteria import make_criterion
from captune.training.loader import Batch
from captune.training.mixing import step_mix
from captune.training.steps import make_accelerator, train_step

CASES = ("64", "128", "512/128", "1024/128", "4096/128")
SIDE, CAPTIONS = 224, 5


def noise(config: Config, dimension: int) -> Batch:
    """A step's images, their captions, and those of the bank, which are of other images."""
    images = torch.arange(config.batch_size)
    pixels = torch.randint(0, 256, (len(images), 3, SIDE, SIDE), dtype=torch.uint8)
    own = CAPTIONS * len(images)
    text = F.normalize(torch.randn(own + config.bank_negatives, dimension), dim=-1)
    others = torch.arange(len(images), len(images) + config.bank_negatives)
    return Batch(pixels, text, images, torch.cat([images.repeat(CAPTIONS), others]), own)


def measure(case: str) -> dict[str, Any]:
    """One step, in this process."""
    batch_size, _, chunk_size = case.partition("/")
    config = Config.from_mapping(
        {
            "towers": "minilm-lite0",
            "image_size": SIDE,
            "batch_size": int(batch_size),
            "chunk_size": int(chunk_size or 0),
        }
    )
    device.MEMORY_TO_SPARE = math.inf  # as where memory is short: what is freed is given back
    torch.manual_seed(config.seed)
    accelerator = make_accelerator(config)
    model = CLIPModel.from_config(config, device=accelerator.device).train()
    freeze_batch_norm(model.image_encoder)
    criterion = make_criterion(config, model.dimension)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters()))
    start = psutil.Process().memory_full_info().pss
    with PeakMemory(0.1) as peak:
        batch = noise(config, model.dimension)
        mix = step_mix(batch, config, 0, 0)
        began = time.perf_counter()
        train_step(model, batch, criterion, optimizer, accelerator, config, mix)
        seconds = time.perf_counter() - began
    return {
        "batch_size": config.batch_size,
        "chunk_size": config.chunk_size,
        "precision": device.choose_precision(config.precision, accelerator.device),
        "peak_gb_above_start": round((peak.bytes - start) / 1e9, 2),
        "seconds": round(seconds, 1),
        "images_per_second": round(config.batch_size / seconds, 1),
    }


def main() -> None:
    """Measure the cases one after the other, keep them and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--here", help="one case, in this process, printed alone")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.here)))
        return
    result, rows = heading(device=best_device()), []
    for case in arguments.cases:
        command = [sys.executable, __file__, "--here", case]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout))
    keep("chunks", result | {"rows": rows})


if __name__ == "__main__":
    main()
