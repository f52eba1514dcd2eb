"""FeatureStore: the frozen backbone's features of each photo, computed once and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from captune.console import say, some
from captune.data.dataset import names_sides
from captune.data.decoded import Decoded, decode_batches
from captune.data.table import CaptionTable
from captune.device import (
    autocast,
    choose_precision,
    keep_freed_memory,
    loader_workers,
    send,
)
from captune.errors import CaptuneError
from captune.files import cache_dir
from captune.preprocess import Preprocess
from captune.processes import processes
from captune.rowfile import Halves, RowFile, Rows

VERSION = 1
BATCH = 64
VIEWS = ("plain", "mirrored")
LARGEST = float(np.finfo(np.float16).max)


class Backbone(Protocol):
    """What is frozen: pixels to pooled features. :class:`captune.models.CLIPModel` is one."""

    preprocess: Preprocess

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def backbone_name(self) -> str:
        """How it is called in errors."""
        ...

    @property
    def feature_dim(self) -> int:
        """F."""
        ...

    def pooled_features(self, pixels: Tensor) -> Tensor:
        """``(n, 3, S, S)`` uint8 RGB to ``(n, F)``."""
        ...

    def backbone_fingerprint(self) -> str:
        """A hash of everything that its features depend on, beside the photos."""
        ...


class FeatureStore:
    """Pooled features of the N images of a table, float16 on disk, in one or two views.

    The mirrored view is a file of its own, so a store with it takes over the plain one. A photo
    that cannot be read is a row of NaN: ``readable`` tells. Use :meth:`build`.
    """

    def __init__(self, plain: Halves, mirrored: Halves | None, flippable: npt.NDArray[Any]) -> None:
        self.plain = plain
        self.mirrored = mirrored
        self.flippable = flippable

    def __len__(self) -> int:
        return len(self.plain)

    @cached_property
    def readable(self) -> npt.NDArray[np.bool_]:
        """``(N,)``: whether the photo could be read."""
        return ~np.isnan(np.asarray(self.plain[:, 0]))

    def all(self) -> Tensor:
        """``(N, F)`` fp32 features of all images, not mirrored."""
        return torch.from_numpy(self.plain.astype(np.float32))

    def lookup(self, rows: Rows, mirrored: npt.NDArray[np.bool_] | None = None) -> Tensor:
        """Image rows ``(B,)`` to features ``(B, F)`` fp32, those of ``mirrored (B,)`` mirrored.

        An image with a caption that says left or right is never given mirrored; one that could
        not be read is NaN. A store without the mirrored view gives plain ones.
        """
        found = np.take(self.plain, rows, axis=0)
        if mirrored is not None and self.mirrored is not None:
            chosen = mirrored & self.flippable[rows]
            found[chosen] = self.mirrored[rows[chosen]]
        return torch.from_numpy(found).float()

    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """``(F,)`` each, fp32, over the readable images as they are, not mirrored.

        The deviation of a channel that never moves is 0: what divides by it sets a floor
        (:meth:`captune.encoders.head.ProjectionHead.set_statistics`).
        """
        total, squares, count = np.zeros(self.plain.shape[1]), np.zeros(self.plain.shape[1]), 0
        for start in range(0, len(self), 4096):
            block = self.plain[start : start + 4096].astype(np.float64)
            block = block[~np.isnan(block[:, 0])]
            total, squares = total + block.sum(0), squares + (block**2).sum(0)
            count += len(block)
        mean = total / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()

    @classmethod
    def build(
        cls,
        table: CaptionTable,
        backbone: Backbone,
        *,
        mirrored: bool = False,
        cache: Path | None = None,
        precision: str = "auto",
        num_workers: int = -1,
        progress: bool = True,
    ) -> FeatureStore:
        """The store of ``table``'s photos, from disk where the same one was built before.

        An interrupted build goes on where it was, and only a whole view can be opened.

        Args:
            table: N images.
            backbone: frozen, on its device; meanwhile all of it is in eval mode.
            mirrored: also the mirrored photos.
            cache: folder of stores; default ``$CAPTUNE_CACHE/features``.
            precision: ``auto`` computes in bf16 where that is native.
            num_workers: processes that decode; 0: this one; -1: by the machine.

        Raises:
            CaptuneError: no photo can be read, features that float16 cannot hold, or what lies on
                disk is damaged (it is deleted, so the next build makes it anew).
        """
        keep_freed_memory(backbone.device)
        precision = choose_precision(precision, backbone.device)
        fingerprint = _fingerprint(table, backbone, precision)
        folder = (cache or cache_dir() / "features") / fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        found: list[Halves] = []
        here = processes()
        with here.locked(folder):
            for view in VIEWS[: 1 + mirrored]:
                file = RowFile(folder, view, (len(table), backbone.feature_dim), fingerprint)
                if not here.from_main(file.path.is_file):
                    workers = loader_workers(num_workers, backbone.device)
                    job = _FeatureJob(table, backbone, view, precision, workers)
                    job.fill(file, progress)
                    here.see(file.path)
                try:
                    found.append(here.main_first(partial(file.open, "feature store")))
                except CaptuneError:
                    if here.main:
                        file.path.unlink()  # damaged: the next build makes it anew
                    raise
        store = cls(found[0], found[1] if mirrored else None, ~names_sides(table))
        if not store.readable.any():
            raise CaptuneError(f"no image of {table.describe()} could be read")
        return store


class _FeatureJob:
    """Decodes photos in order and puts them through the backbone."""

    def __init__(
        self, table: CaptionTable, backbone: Backbone, view: str, precision: str, workers: int
    ) -> None:
        self.table = table
        self.backbone = backbone
        self.view = view
        self.precision = precision
        self.workers = workers
        self.broken: list[str] = []
        self._decoded: Iterator[Decoded] | None = None

    def fill(self, file: RowFile, progress: bool) -> None:
        """Compute the view that ``file`` lacks."""
        try:
            with _evaluating(cast(nn.Module, self.backbone)):
                file.fill(
                    np.arange(len(self.table), dtype=np.int64),
                    self._features,
                    batch=BATCH,
                    words=f"features of photos, {self.view}",
                    unit="image",
                    progress=progress,
                )
            self.broken = processes().all_words(self.broken)
        finally:  # what goes on after an interruption reads only the rest, and names only that
            if self.broken and self.view == VIEWS[0]:
                number = len(self.broken)
                say(
                    f"{self.table.describe()}: {number} unreadable images left out: "
                    f"{some(self.broken)}"
                )

    @torch.no_grad()
    def _features(self, rows: Rows) -> Halves:
        """Batches come in order, so decoding runs ahead from the first row that is asked for."""
        if self._decoded is None:
            self._decoded = self._decode(int(rows[0]))
        images, pixels, broken = next(self._decoded)
        self.broken += broken
        found = np.full((len(rows), self.backbone.feature_dim), np.nan, dtype=np.float16)
        if images:
            pixels = send(pixels, self.backbone.device)
            pixels = pixels.flip(-1) if self.view == "mirrored" else pixels
            with autocast(self.backbone.device, self.precision):
                pooled = self.backbone.pooled_features(pixels)
            found[np.array(images) - rows[0]] = self._halves(pooled.float().cpu().numpy())
        return found

    def _halves(self, pooled: npt.NDArray[np.float32]) -> Halves:
        """``(n, F)`` in float16.

        Raises:
            CaptuneError: of another form, or what float16 cannot hold.
        """
        who = f"image encoder {self.backbone.backbone_name}"
        if pooled.ndim != 2 or pooled.shape[1] != self.backbone.feature_dim:
            raise CaptuneError(
                f"{who} gave features of shape {pooled.shape}, stated are "
                f"{self.backbone.feature_dim} for each image"
            )
        largest = float(np.abs(pooled).max())  # NaN where one is
        if not largest <= LARGEST:
            found = f"up to {largest:.3g}" if np.isfinite(largest) else "NaN or infinite"
            raise CaptuneError(
                f"{who} gave features that are not finite in float16, in which they are kept "
                f"({found} in {self.precision}, float16 ends at {LARGEST:.0f}): train without "
                "stage 1 (head_epochs=0, standardise_features=false)"
            )
        return pooled.astype(np.float16)

    def _decode(self, first: int) -> Iterator[Decoded]:
        images = len(self.table)
        apart = BATCH * processes().count  # the batches between are other processes'
        batches = [range(at, min(at + BATCH, images)) for at in range(first, images, apart)]
        size = self.backbone.preprocess.image_size
        return decode_batches(self.table, size, batches, workers=self.workers)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in eval mode; afterwards each part as it was: some may have been frozen so."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _fingerprint(table: CaptionTable, backbone: Backbone, precision: str) -> str:
    """Backbone, arithmetic, preprocessing, and each photo's name, size and time, in order."""
    made_by = [VERSION, backbone.backbone_fingerprint(), precision, "float16"]
    state = hashlib.blake2b(json.dumps(made_by).encode(), digest_size=16)
    state.update(f"{backbone.preprocess}".encode())
    state.update(table.files_digest().encode())
    return state.hexdigest()
