"""Two machines that share a step: python benchmarks/nodes.py [--rates GBIT ...].

Two processes of one thread each, in two network namespaces, which stand for two machines; `tc`
limits what the cable between them carries, each way. Each embeds its half of a batch with a
ResNet-50 of random weights, all of which trains (recipe `plain`), from pixels in memory; the
gradients, 105 MB, are added up in each step. They are compared with two processes that do half a
batch each at the same time and know nothing of one another: what is lost is what sharing costs.
Needs Linux, root and iproute2.

Writes benchmarks/results/nodes.json (nodes-chunks.json with --chunk-size) and prints it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from record import heading, keep, median
from torch import Tensor
from torch.nn import functional as F

from captune.config import Config
from captune.models import CLIPModel
from captune.processes import leave, processes
from captune.training.criteria import make_criterion
from captune.training.loader import Batch
from captune.training.sharing import exchange
from captune.training.steps import make_accelerator, train_step

APART, NO_LIMIT = "apart", "together, no limit"
WARM_UP = 2


def main() -> None:
    """Measure, keep and print; or, started by that, be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rates", type=float, nargs="*", default=[1.0, 0.4], help="Gbit/s")
    parser.add_argument("--half", type=int, default=16, help="images of each process")
    parser.add_argument("--chunk-size", type=int, default=0, help="as captune train's")
    parser.add_argument("--image-encoder", default="standins:resnet50")
    parser.add_argument("--steps", type=int, default=6, help="of a turn, after the first two")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = Config.from_mapping(
        {
            "recipe": "plain",
            "image_encoder": arguments.image_encoder,
            "text_encoder": "standins:text",
            "batch_size": 2 * arguments.half,
            "chunk_size": arguments.chunk_size,
        }
    )
    if arguments.worker:
        print(json.dumps(work(config, arguments.steps)))
        return
    found = measure(config, arguments.steps, arguments.repeats, arguments.rates)
    name = "nodes" + "-chunks" * (arguments.chunk_size > 0)
    keep(name, heading("accelerate") | found, arguments.out)


def measure(config: Config, steps: int, repeats: int, rates: Sequence[float]) -> dict[str, Any]:
    """Seconds of a step of each way, in turns, and the share of the speed apart that is left."""
    ways: dict[str, float | None] = {APART: None, NO_LIMIT: None}
    ways |= {f"together, {rate:g} Gbit/s": rate for rate in rates}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    half = config.batch_size // 2
    words = ["--worker", "--image-encoder", config.image_encoder, "--half", half]
    words += ["--steps", steps, "--chunk-size", config.chunk_size]
    with two_nodes() as nodes:
        for _ in range(repeats):
            for way, rate in ways.items():
                limit(nodes, rate)
                taken[way].append(_turn(nodes, list(map(str, words)), together=way != APART))
    return {
        "image encoder": config.image_encoder,
        "images of each process": half,
        "chunk size": config.chunk_size,
        "steps of a turn": steps,
        "ways": {
            way: {
                "seconds a step": median(seconds),
                "share of the speed apart": median(
                    [apart / own for apart, own in zip(taken[APART], seconds, strict=True)]
                ),
                "turns": [round(one, 4) for one in seconds],
            }
            for way, seconds in taken.items()
        },
    }


def _turn(nodes: Sequence[str], words: Sequence[str], *, together: bool) -> float:
    """Seconds of a step in the slower of the two processes: the median of its steps."""
    begun = []
    for rank, node in enumerate(nodes):
        job = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
        job |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": 29500, "GLOO_SOCKET_IFNAME": CABLE}
        own = {**(job if together else {}), "OMP_NUM_THREADS": 1}
        command = ["ip", "netns", "exec", node, sys.executable, __file__, *words]
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        begun.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    said = [process.communicate()[0] for process in begun]
    if any(process.returncode for process in begun):
        raise SystemExit("a process failed")
    return max(float(json.loads(words)) for words in said)


# -- two nodes ------------------------------------------------------------------------------------
CABLE = "cable"
ADDRESSES = ("10.214.0.1", "10.214.0.2")


@contextlib.contextmanager
def two_nodes() -> Iterator[list[str]]:
    """The names of two network namespaces, with a cable between them."""
    nodes = [f"captune-{os.getpid()}-{end}" for end in "ab"]
    try:
        for node in nodes:
            _ip("netns", "add", node)
        _ip("-n", nodes[0], "link", "add", CABLE, "type", "veth", "peer", CABLE, "netns", nodes[1])
        for node, address in zip(nodes, ADDRESSES, strict=True):
            _ip("-n", node, "address", "add", f"{address}/24", "dev", CABLE)
            for device in (CABLE, "lo"):
                _ip("-n", node, "link", "set", device, "up")
        yield nodes
    finally:
        for node in nodes:
            subprocess.run(["ip", "netns", "delete", node], capture_output=True)


def limit(nodes: Sequence[str], rate: float | None) -> None:
    """Let the cable carry ``rate`` Gbit/s each way; None: whatever it can."""
    for node in nodes:
        inside = ["ip", "netns", "exec", node, "tc", "qdisc"]
        subprocess.run([*inside, "del", "dev", CABLE, "root"], capture_output=True)
        if rate is not None:
            how = ["tbf", "rate", f"{rate}gbit", "burst", "256kb", "latency", "50ms"]
            subprocess.run([*inside, "add", "dev", CABLE, "root", *how], check=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


# -- one of the processes -------------------------------------------------------------------------
def work(config: Config, steps: int) -> float:
    """The median of the seconds of a step, after the first ones."""
    torch.set_num_threads(1)
    here, half = processes(), config.batch_size // 2
    accelerator = make_accelerator(config)
    model = CLIPModel.from_config(config, device=accelerator.device).train()
    criterion = make_criterion(config, model.dimension)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(trained, lr=1e-4, fused=True))
    size = model.preprocess.image_size
    generator = torch.Generator().manual_seed(here.rank)
    pixels = torch.randint(256, (half, 3, size, size), generator=generator, dtype=torch.uint8)
    images = torch.arange(half) + half * here.rank
    taken = []
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        batch = _batch(pixels, images, model.dimension)
        loss, _ = train_step(model, batch, criterion, optimizer, accelerator, config)
        assert bool(loss.isfinite())
        taken.append(time.perf_counter() - began)
    leave()
    return median(taken[WARM_UP:])


def _batch(pixels: Tensor, images: Tensor, dimension: int) -> Batch:
    """As a loader gives it: of several processes with what the others have told of theirs."""
    here, sizes = processes(), None
    if here.count > 1:
        pixels, images, _, sizes, _ = exchange(here, pixels, images, images, [])
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(len(images), dimension, generator=generator), dim=-1)
    return Batch(pixels, text, images, images, len(images), sizes)


if __name__ == "__main__":
    main()
