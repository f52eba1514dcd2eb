"""FeatureStore: the frozen backbone's features of each photo, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader

from captune.console import say, some
from captune.data.dataset import COCOClipDataset, DrawKey, Sample, SkippingDataset, names_sides
from captune.data.pixels import UnreadableImageError
from captune.data.table import CaptionTable
from captune.device import autocast, choose_precision, keep_freed_memory, loader_workers
from captune.errors import CaptuneError
from captune.files import cache_dir
from captune.preprocess import Preprocess
from captune.rowfile import Halves, RowFile, Rows

VERSION = 1
BATCH = 64
VIEWS = ("plain", "mirrored")


class Backbone(Protocol):
    """What is frozen: pixels to pooled features. :class:`captune.models.CLIPModel` is one."""

    preprocess: Preprocess

    @property
    def device(self) -> torch.device:
        """Where it computes."""
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

    def lookup(self, rows: Rows, mirrored: npt.NDArray[np.bool_] | None = None) -> Tensor:
        """Image rows ``(B,)`` to features ``(B, F)`` fp32, those of ``mirrored (B,)`` mirrored.

        An image with a caption that says left or right is never given mirrored.
        """
        found = self.plain[rows].astype(np.float32)
        if mirrored is not None and self.mirrored is not None:
            chosen = mirrored & self.flippable[rows]
            found[chosen] = self.mirrored[rows[chosen]]
        return torch.from_numpy(found)

    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """``(F,)`` each, fp32, over the readable images."""
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
            backbone: frozen, on its device; it is put into eval mode meanwhile.
            mirrored: also the mirrored photos.
            cache: folder of stores; default ``$CAPTUNE_CACHE/features``.
            precision: ``auto`` computes in bf16 where that is native.
            num_workers: processes that decode; -1 by the machine.

        Raises:
            CaptuneError: no photo can be read, or a feature is not finite in float16.
        """
        keep_freed_memory(backbone.device)
        precision = choose_precision(precision, backbone.device)
        fingerprint = _fingerprint(table, backbone, precision)
        folder = (cache or cache_dir() / "features") / fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        found: list[Halves] = []
        with FileLock(str(folder) + ".lock"):
            for view in VIEWS[: 1 + mirrored]:
                file = RowFile(folder, view, (len(table), backbone.feature_dim), fingerprint)
                if not file.path.is_file():
                    job = _FeatureJob(table, backbone, view, precision, loader_workers(num_workers))
                    job.fill(file, progress)
                try:
                    found.append(file.open("feature store"))
                except CaptuneError:
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
        self._decoded: Iterator[list[Sample | UnreadableImageError]] | None = None

    def fill(self, file: RowFile, progress: bool) -> None:
        """Compute the view that ``file`` lacks."""
        module: Any = self.backbone
        was_training = module.training
        module.eval()
        try:
            file.fill(
                np.arange(len(self.table), dtype=np.int64),
                self._features,
                batch=BATCH,
                words=f"features of photos, {self.view}",
                unit="image",
                progress=progress,
            )
        finally:
            module.train(was_training)
        if self.broken and self.view == VIEWS[0]:  # the mirrored view meets the same ones
            number = len(self.broken)
            say(
                f"{self.table.describe()}: {number} unreadable images left out: {some(self.broken)}"
            )

    @torch.no_grad()
    def _features(self, rows: Rows) -> Halves:
        """Rows come in order, so decoding runs ahead of them from the first that is asked for."""
        if self._decoded is None:
            self._decoded = self._decode(int(rows[0]))
        items = next(self._decoded)
        self.broken += [str(item) for item in items if isinstance(item, UnreadableImageError)]
        good = [place for place, item in enumerate(items) if isinstance(item, Sample)]
        found = np.full((len(rows), self.backbone.feature_dim), np.nan, dtype=np.float16)
        if good:
            pixels = torch.stack([items[place].pixels for place in good])  # type: ignore[union-attr]
            pixels = pixels.flip(-1) if self.view == "mirrored" else pixels
            with autocast(self.backbone.device, self.precision):
                pooled = self.backbone.pooled_features(pixels.to(self.backbone.device))
            halves = pooled.float().cpu().numpy().astype(np.float16)
            if not np.isfinite(halves).all():
                raise CaptuneError(
                    "the image encoder gave features that are not finite in float16: train "
                    "without stage 1 (head_epochs=0, standardise_features=false)"
                )
            found[good] = halves
        return found

    def _decode(self, first: int) -> Iterator[list[Sample | UnreadableImageError]]:
        dataset = COCOClipDataset(table=self.table, image_size=self.backbone.preprocess.image_size)
        keys = [DrawKey(row, 0, 0) for row in range(first, len(self.table))]
        batches = [keys[start : start + BATCH] for start in range(0, len(keys), BATCH)]
        workers = self.workers if len(batches) > 2 else 0  # a few are not worth a process
        return iter(
            DataLoader(
                SkippingDataset(dataset),
                batch_sampler=batches,
                num_workers=workers,
                collate_fn=list,
                generator=torch.Generator(),  # the run's own draws do not depend on this build
            )
        )


def _fingerprint(table: CaptionTable, backbone: Backbone, precision: str) -> str:
    """Backbone, arithmetic, preprocessing, and each photo's name, size and time, in order."""
    made_by = [VERSION, backbone.backbone_fingerprint(), precision, "float16"]
    state = hashlib.blake2b(json.dumps(made_by).encode(), digest_size=16)
    state.update(f"{backbone.preprocess}".encode())
    state.update(table.files_digest().encode())
    return state.hexdigest()
