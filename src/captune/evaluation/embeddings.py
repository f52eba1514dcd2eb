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
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from captune.console import say, some
from captune.data.dataset import COCOClipDataset, DrawKey, Sample, SkippingDataset
from captune.data.pixels import UnreadableImageError
from captune.data.table import CaptionTable
from captune.device import autocast, choose_precision, keep_freed_memory, loader_workers
from captune.errors import CaptuneError
from captune.files import replacing
from captune.models import CLIPModel, weights_digest

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

    Args:
        model: on its device.
        table: N images.
        cache: a folder to keep the result in, under a name that covers weights, images (name,
            size and time of each file), preprocessing and precision.
        precision: ``auto`` computes in bf16 where that is native.
        num_workers: processes that decode; -1 by the machine.

    Raises:
        CaptuneError: no image could be read.
    """
    keep_freed_memory(model.device)
    precision = choose_precision(precision, model.device)
    path = cache / f"{_key(model, table, precision)}.safetensors" if cache else None
    kept = _read(path) if path else None
    if kept is not None:
        return kept
    embeddings = _embed(model, table, precision, loader_workers(num_workers))
    if path is not None:
        body = {"rows": torch.from_numpy(embeddings.rows), "vectors": embeddings.vectors}
        with replacing(path) as temporary:
            save_file(body, temporary, metadata={"unreadable": str(embeddings.unreadable)})
    return embeddings


@torch.no_grad()
def _embed(model: CLIPModel, table: CaptionTable, precision: str, workers: int) -> ImageEmbeddings:
    dataset = COCOClipDataset(table=table, image_size=model.preprocess.image_size)
    keys = [DrawKey(row, 0, 0) for row in range(len(table))]
    batches = [keys[start : start + BATCH] for start in range(0, len(keys), BATCH)]
    loader = DataLoader(
        SkippingDataset(dataset),
        batch_sampler=batches,
        # Short sets are not worth the start of a process.
        num_workers=workers if len(batches) > 2 else 0,
        collate_fn=list,
    )
    was_training = model.training
    model.eval()
    rows: list[int] = []
    vectors: list[Tensor] = []
    broken: list[str] = []
    bar = tqdm(total=len(table), desc="embedding images", unit="image", leave=False)
    with bar, autocast(model.device, precision):
        for items in loader:
            good = [item for item in items if isinstance(item, Sample)]
            broken += [str(item) for item in items if isinstance(item, UnreadableImageError)]
            if good:
                pixels = torch.stack([sample.pixels for sample in good]).to(model.device)
                vectors.append(model(pixels).float().cpu())
                rows += [sample.image for sample in good]
            bar.update(len(items))
    model.train(was_training)
    if broken:
        say(f"{table.describe()}: {len(broken)} unreadable images left out: {some(broken)}")
    if not rows:
        raise CaptuneError(f"no image of {table.describe()} could be read")
    return ImageEmbeddings(np.array(rows, dtype=np.int64), torch.cat(vectors), len(broken))


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
