"""Speed and memory of ranking: python benchmarks/ranking.py [--part coco|faiss] [--repeats N].

coco: all of COCO's val (40,504 images, 202,654 captions, 512 dimensions, random unit vectors; one
caption in five describes its image, so that ranks are not all chance). Counting is timed against
the bare block product, fp32, same threads, in turns in one run; the figure is the median of the
ratios. faiss: 8,000 images and 40,000 captions against a flat index searched once a direction for
the first ten (pip install faiss-cpu).

Each part writes benchmarks/results/ranking-PART.json and prints it.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from record import heading, keep
from torch import Tensor

from captune.metrics import metrics_of_ranks
from captune.ranks import TILE, retrieval_ranks

COCO, FAISS, DIMENSION = (40_504, 202_654), (8_000, 40_000), 512


def vectors(images: int, captions: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors, made row by row in place, and the image of each caption."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, DIMENSION, generator=generator)
    text = torch.randn(captions, DIMENSION, generator=generator)
    owner = torch.arange(captions) * images // captions
    text[::5].add_(image[owner[::5]], alpha=0.3)
    for rows in (image, text):
        rows.div_(rows.norm(dim=1, keepdim=True))
    return image, text, owner


def bare(image: Tensor, text: Tensor, height: int, width: int) -> None:
    """The product alone, block by block into one buffer."""
    out = torch.empty(height * width)
    for top in range(0, len(image), height):
        for left in range(0, len(text), width):
            rows, columns = image[top : top + height], text[left : left + width]
            shape = (len(rows), len(columns))
            torch.mm(rows, columns.T, out=out[: shape[0] * shape[1]].view(shape))


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak_above(work: Callable[[], Any]) -> int:
    """How many bytes the resident size grows by while ``work`` runs, sampled."""
    process, over = psutil.Process(), threading.Event()
    start = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.02):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    work()
    over.set()
    thread.join()
    return peak - start


def coco(repeats: int) -> dict[str, Any]:
    """Counting against the bare product at COCO's size."""
    image, text, owner = vectors(*COCO)
    # First, while nothing has left memory to the allocator, and in a pass of its own: on few cores,
    # who samples memory slows what is timed.
    above = peak_above(lambda: retrieval_ranks(image, text, owner))
    # The product is given its faster shape of two: the tiles of the counting, or long rows.
    shapes = {"tiles": TILE, "rows": (TILE[0], len(text))}
    some = image[: 4 * TILE[0]]
    quick = {name: seconds(lambda s=shape: bare(some, text, *s)) for name, shape in shapes.items()}
    shape = min(quick, key=lambda name: quick[name])
    times: dict[str, list[float]] = {"bare": [], "ranks": [], "with mAP@R": []}
    for _ in range(repeats):
        times["bare"].append(seconds(lambda: bare(image, text, *shapes[shape])))
        times["ranks"].append(seconds(lambda: retrieval_ranks(image, text, owner)))
        began = time.perf_counter()
        ranks = retrieval_ranks(image, text, owner, every_caption=True)
        times["with mAP@R"].append(time.perf_counter() - began)
    return {
        "size": [*COCO, DIMENSION],
        "bare product": shape,
        "seconds": times,
        "ratio": _ratio(times["ranks"], times["bare"]),
        "ratio with mAP@R": _ratio(times["with mAP@R"], times["bare"]),
        "peak bytes above the embeddings": above,
        "metrics": metrics_of_ranks(ranks, owner),
    }


def faiss_search(repeats: int) -> dict[str, Any]:
    """Counting against a flat index searched for the first ten, once a direction."""
    import faiss  # type: ignore[import-not-found]

    faiss.omp_set_num_threads(torch.get_num_threads())
    image, text, owner = vectors(*FAISS)

    def search() -> None:
        for gallery, queries in ((text, image), (image, text)):
            index = faiss.IndexFlatIP(DIMENSION)
            index.add(gallery.numpy())
            index.search(queries.numpy(), 10)

    times: dict[str, list[float]] = {"faiss": [], "ranks": []}
    for _ in range(repeats):
        times["faiss"].append(seconds(search))
        times["ranks"].append(seconds(lambda: retrieval_ranks(image, text, owner)))
    return {
        "size": [*FAISS, DIMENSION],
        "faiss": faiss.__version__,
        "seconds": times,
        "times as fast": _ratio(times["faiss"], times["ranks"]),
    }


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


PARTS = {"coco": coco, "faiss": faiss_search}


def main() -> None:
    """Measure a part, keep it and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=tuple(PARTS), default="coco")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    result = heading()
    keep(f"ranking-{arguments.part}", result | PARTS[arguments.part](arguments.repeats))


if __name__ == "__main__":
    main()
