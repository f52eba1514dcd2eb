"""Embeddings of a table's images, kept in the run so that the next query answers at once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from captune.console import say, some
from captune.data.decoded import decode_batches
from captune.data.table import CaptionTable
from captune.device import autocast, choose_precision, keep_freed_memory, loader_workers, send
from captune.errors import CaptuneError
from captune.files import replacing
from captune.models import CLIPModel, weights_digest
from captune.processes import processes

BATCH = 64


@dataclass(frozen=True)
class ImageEmbeddings:
    """``vectors (n, D)`` fp32, unit length, of the image rows ``rows (n,)`` that were readable."""

    rows: npt.NDArray[np.int64]
    vectors: Tensor
    unreadable: int


def embed_images(
    model: CLIPModel,
    table: CaptionTable,
    *,
    cache: Path | None = None,
    precision: str = "auto",
    num_workers: int = -1,
) -> ImageEmbeddings:
    """Embed all images of ``table``; unreadable ones are named, counted and left out.

    Several processes embed a batch each in turn, and all have the result.

    Args:
        model: on its device.
        table: N images.
        cache: a folder to keep the result in, under a name that covers weights, images (name,
            size and time of each file), preprocessing and precision.
        precision: ``auto`` computes in bf16 where that is native.
        num_workers: processes that decode; 0: this one; -1: by the machine.

    Raises:
        CaptuneError: no image could be read.
    """
    keep_freed_memory(model.device)
    precision = choose_precision(precision, model.device)
    path = cache / f"{_key(model, table, precision)}.safetensors" if cache else None
    here = processes()
    kept = _read(path) if path else None
    if not here.any(kept is None):
        assert kept is not None
        return kept
    embeddings = _embed(model, table, precision, loader_workers(num_workers, model.device))
    if path is not None and here.main:
        body = {"rows": torch.from_numpy(embeddings.rows), "vectors": embeddings.vectors}
        with replacing(path) as temporary:
            save_file(body, temporary, metadata={"unreadable": str(embeddings.unreadable)})
    return embeddings


@torch.no_grad()
def _embed(model: CLIPModel, table: CaptionTable, precision: str, workers: int) -> ImageEmbeddings:
    here, images = processes(), len(table)
    starts = range(here.rank * BATCH, images, here.count * BATCH)
    batches = [range(start, min(start + BATCH, images)) for start in starts]
    decoded = decode_batches(table, model.preprocess.image_size, batches, workers=workers)
    was_training = model.training
    model.eval()
    rows: list[int] = []
    vectors: list[Tensor] = [torch.empty(0, model.dimension)]
    broken: list[str] = []
    bar = tqdm(total=sum(map(len, batches)), desc="embedding images", unit="image", leave=False)
    with bar, autocast(model.device, precision):
        for readable, pixels, unreadable in decoded:
            broken += unreadable
            if readable:
                pixels = send(pixels, model.device)
                vectors.append(model(pixels).float().cpu())
                rows += readable
            bar.update(len(readable) + len(unreadable))
    model.train(was_training)
    broken = here.all_words(broken)
    found = here.all_rows(torch.tensor(rows, dtype=torch.int64)).numpy()
    joined = here.all_rows(torch.cat(vectors))
    if broken:
        say(f"{table.describe()}: {len(broken)} unreadable images left out: {some(broken)}")
    if not len(found):
        raise CaptuneError(f"no image of {table.describe()} could be read")
    if here.count > 1:
        order = found.argsort()
        found, joined = found[order], joined[torch.from_numpy(order)]
    return ImageEmbeddings(found, joined, len(broken))


def _key(model: CLIPModel, table: CaptionTable, precision: str) -> str:
    """A hash of everything that the embeddings depend on."""
    state = hashlib.blake2b(digest_size=16)
    stated = [precision, str(model.preprocess), table.digest, table.files_digest()]
    state.update("\0".join([*stated, weights_digest(model)]).encode())
    return state.hexdigest()


def _read(path: Path) -> ImageEmbeddings | None:
    """What an earlier call kept; nothing where it is not there or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            unreadable = int((file.metadata() or {})["unreadable"])
            rows = file.get_tensor("rows").numpy()
            return ImageEmbeddings(rows, file.get_tensor("vectors"), unreadable)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
