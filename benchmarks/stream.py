"""A stream against the same photos as files: python benchmarks/stream.py DATA [--images N].

N photos (200) of a COCO 2014 folder are put into WebDataset shards of 100. Timed in one process:
the pass that indexes the shards; an epoch's pixels (augmented, 224 pixels) from the files and from
the shards, in turns. Then, on ten shards of 10,000 captions made of the folder's own beside
pictures of a few bytes: the index, what a start has to do where all is in the cache, and a step's
look-up of embeddings. Results lie in benchmarks/results/stream.json.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from record import heading, keep
from torch import Tensor

from captune import open_source
from captune.bank import CaptionBank
from captune.config import Config
from captune.data.dataset import COCOClipDataset
from captune.data.stream_table import StreamTable
from captune.data.table import CaptionTable
from captune.training.loader import make_loader
from captune.training.stream_bank import StreamBank
from captune.training.stream_loader import StreamLoader

IN_A_SHARD = 100
TURNS = 3
BANKED = (10, 10_000)  # shards, and captions in each


class StandIn:
    """Embeddings of 384 numbers that cost nothing: what is timed is all the rest."""

    name, dimension, fingerprint = "stand-in", 384, "1"

    def encode(self, texts: Sequence[str]) -> Tensor:
        return torch.ones(len(texts), 384)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    """A tar file of names and contents."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def write_photos(folder: Path, table: CaptionTable) -> str:
    """The table's photos, each with its first caption; the pattern."""
    for first in range(0, len(table), IN_A_SHARD):
        members: list[tuple[str, bytes]] = []
        for row in range(first, min(first + IN_A_SHARD, len(table))):
            text = table.caption(int(table.captions_of(row)[0]))
            members += [(f"{row:06d}.jpg", table.path(row).read_bytes())]
            members += [(f"{row:06d}.txt", text.encode())]
        write_tar(folder / f"photos-{first:06d}.tar", members)
    return f"{folder}/photos-*.tar"


def write_captions(folder: Path, texts: Sequence[str]) -> str:
    """Shards of many captions, each told apart by a number; the pattern."""
    shards, count = BANKED
    for shard in range(shards):
        members: list[tuple[str, bytes]] = []
        for row in range(count):
            number = shard * count + row
            members += [(f"{row:06d}.jpg", b"never decoded")]
            members += [(f"{row:06d}.txt", f"{texts[number % len(texts)]} {number}".encode())]
        write_tar(folder / f"captions-{shard:02d}.tar", members)
    return f"{folder}/captions-*.tar"


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def photos_a_second(folder: Path, table: CaptionTable, found: dict[str, object]) -> None:
    """The captions' pass, and pixels from shards and from files."""
    pattern = write_photos(folder, table)
    size = sum(path.stat().st_size for path in folder.glob("photos-*.tar"))
    found |= {"images": len(table), "shard_bytes_per_image": size / len(table)}
    found["photos_indexed_per_second"] = len(table) / seconds(lambda: StreamTable.open(pattern))
    config = Config(num_workers=0, batch_size=50, captions_per_image=1, bank_negatives=0)
    stream = StreamTable.open(pattern)
    dataset = COCOClipDataset(table=table, image_size=224, augment=True)
    bank = StreamBank.build(stream, StandIn())
    files_bank = CaptionBank.build(table.texts(), StandIn(), progress=False)
    from_shards = StreamLoader(stream, bank, config, image_size=224)
    from_files = make_loader(dataset, files_bank, config)
    ways = {"shards": from_shards, "files": from_files}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, loader in ways.items():
            took = seconds(lambda loader=loader, turn=turn: list(loader.batches(turn)))
            times[name] += [took] if turn else []  # the first one warms the disk's cache
    for name, taken in times.items():
        found[f"photos_per_second_from_{name}"] = len(table) / statistics.median(taken)


def start(folder: Path, texts: Sequence[str], found: dict[str, object]) -> None:
    """What a run does before its first step where everything is in the cache, and a look-up."""
    pattern = write_captions(folder, texts)
    captions = BANKED[0] * BANKED[1]
    found["samples_indexed_per_second"] = captions / seconds(lambda: StreamTable.open(pattern))
    stream = StreamTable.open(pattern)
    StreamBank.build(stream, StandIn())
    found["captions_opened_per_second"] = captions / seconds(
        lambda: StreamBank.build(StreamTable.open(pattern), StandIn())
    )
    kept = sum(
        path.stat().st_size for path in Path(os.environ["CAPTUNE_CACHE"], "shards").rglob("*.*")
    )
    found["index_bytes_per_caption"] = kept / (captions + int(str(found["images"])))
    bank = StreamBank.build(stream, StandIn())
    rows = np.random.default_rng(0).integers(0, captions, 2048 + 128)
    bank.lookup(rows)
    taken = [seconds(lambda: bank.lookup(rows)) for _ in range(20)]
    found["lookup_milliseconds"] = 1000 * statistics.median(taken)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=200)
    arguments = parser.parse_args()
    table = open_source(arguments.data).table("train")
    table = table.take_images(np.arange(min(arguments.images, len(table))))
    found = heading("webdataset")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["CAPTUNE_CACHE"] = str(Path(scratch) / "cache")
        photos_a_second(Path(scratch), table, found)
        start(Path(scratch), table.texts(), found)
    keep("stream", found)


if __name__ == "__main__":
    main()
