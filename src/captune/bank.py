"""CaptionBank: each distinct caption embedded once by the frozen text tower, kept on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from captune.device import autocast, choose_precision, keep_freed_memory
from captune.encoders.text import TextEncoder
from captune.errors import CaptuneError
from captune.files import cache_dir, read_versioned, write_json
from captune.processes import processes
from captune.rowfile import Halves, RowFile, Rows

VERSION = 1
BATCH = 128
HASHED_AT_ONCE = 65_536  # captions that are Python strings
COUNTED_AT_ONCE = 10_000


class CaptionBank:
    """``embeddings (U, D)`` float16, memory-mapped, and ``row_of_caption (M,)``.

    Caption ``m`` has the embedding ``embeddings[row_of_caption[m]]``; equal captions share a row.

    Use :meth:`build`, which reuses what is on disk when the fingerprint is the same.
    """

    def __init__(self, embeddings: Halves, row_of_caption: Rows, fingerprint: str) -> None:
        self.embeddings = embeddings
        self.row_of_caption = row_of_caption
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.row_of_caption)

    @property
    def dimension(self) -> int:
        """D."""
        return int(self.embeddings.shape[1])

    def lookup(self, caption_rows: Sequence[int] | Rows | Tensor) -> Tensor:
        """``(B,)`` caption rows to ``(B, D)`` fp32 embeddings of unit length."""
        rows = self.row_of_caption[np.asarray(caption_rows, dtype=np.int64)]
        found = torch.from_numpy(np.take(self.embeddings, rows, axis=0)).float()
        # float16 keeps three digits of the length; normalising gives the rest back.
        return F.normalize(found, dim=-1, out=found)

    def all(self) -> Tensor:
        """``(M, D)`` fp32 embeddings of all captions, in caption order."""
        return self.lookup(np.arange(len(self)))

    @classmethod
    def build(
        cls,
        captions: Sequence[str] | pa.ChunkedArray,
        encoder: TextEncoder,
        *,
        cache: Path | None = None,
        precision: str = "auto",
        progress: bool = True,
    ) -> CaptionBank:
        """The bank of ``captions``, from disk where the same one was built before.

        Distinct captions are sorted by length, embedded in batches and written as they come; an
        interrupted build goes on where it was, and only a whole bank can be opened.

        Args:
            captions: M strings; a column of them is never all Python strings at once.
            encoder: the frozen text tower.
            cache: folder of banks; default ``$CAPTUNE_CACHE/banks``.
            precision: ``auto`` computes in bf16 where that is native.
            progress: show a bar.

        Raises:
            CaptuneError: no captions, or the encoder gives wrong shapes or NaN.
        """
        if not len(captions):
            raise CaptuneError("a caption bank needs at least one caption")
        device = torch.device(getattr(encoder, "device", "cpu"))
        keep_freed_memory(device)
        precision = choose_precision(precision, device)
        distinct, rows = _distinct(captions)
        fingerprint = _fingerprint(encoder, precision, distinct, rows)
        folder = (cache or cache_dir() / "banks") / fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        here = processes()
        with here.locked(folder):
            if not here.from_main((folder / "bank.json").is_file):
                job = _EmbeddingJob(encoder, distinct, device, precision, progress)
                job.fill(folder, fingerprint)
                stated = {
                    "format_version": VERSION,
                    "fingerprint": fingerprint,
                    "text_encoder": encoder.name,
                    "precision": precision,
                    "captions": len(rows),
                    "distinct": len(distinct),
                    "dimension": encoder.dimension,
                }
                if here.main:
                    np.save(folder / "rows.npy", rows, allow_pickle=False)
                    write_json(folder / "bank.json", stated)
                here.see(folder / "bank.json")
            try:
                return here.main_first(lambda: cls.open(folder, fingerprint))
            except CaptuneError:
                if here.main:
                    shutil.rmtree(folder)  # damaged: the next build makes it anew
                raise

    @classmethod
    def open(cls, folder: Path, fingerprint: str) -> CaptionBank:
        """The bank in ``folder``, if it is whole and the one that is meant.

        Raises:
            CaptuneError: unfinished, damaged, of another version or with another fingerprint.
        """
        stated = read_versioned(folder / "bank.json", what="caption bank", version=VERSION)
        if stated["fingerprint"] != fingerprint:
            raise CaptuneError(
                f"the caption bank in {folder} was built from other captions or another text "
                "encoder: delete the folder to build it anew"
            )
        shape = (stated["distinct"], stated["dimension"])
        embeddings = RowFile(folder, "embeddings", shape, fingerprint).open("caption bank")
        try:
            rows = np.load(folder / "rows.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CaptuneError(f"the caption bank in {folder} is damaged ({error})") from None
        if len(rows) != stated["captions"]:
            raise CaptuneError(f"the caption bank in {folder} is damaged: wrong shape")
        return cls(embeddings, rows, fingerprint)


class _EmbeddingJob:
    """Embeds distinct captions, longest first, into a file that can be continued."""

    def __init__(
        self,
        encoder: TextEncoder,
        distinct: pa.LargeStringArray,
        device: torch.device,
        precision: str,
        progress: bool,
    ) -> None:
        self.encoder = encoder
        self.distinct = distinct
        self.device = device
        self.precision = precision
        self.progress = progress

    def fill(self, folder: Path, fingerprint: str) -> None:
        """Embed what the file in ``folder`` lacks."""
        order = self._order()
        # What was left by an interrupted build can be kept where it went in the same order.
        begun = hashlib.blake2b(order.tobytes(), key=fingerprint.encode()).hexdigest()
        file = RowFile(folder, "embeddings", (len(self.distinct), self.encoder.dimension), begun)
        file.fill(
            order,
            lambda rows: self._embed(self.distinct.take(pa.array(rows)).to_pylist()),
            batch=BATCH,
            words="embedding captions",
            unit="caption",
            progress=self.progress,
        )

    def _order(self) -> Rows:
        """The longest first, which shows at once if memory fits; batches of like length waste no
        padding, least where the encoder tells how many tokens it makes of a text."""
        count = getattr(self.encoder, "token_counts", None)
        if count is None:
            return np.argsort(-pc.utf8_length(self.distinct).to_numpy(), kind="stable")
        counts: list[int] = []
        bar = tqdm(
            total=len(self.distinct),
            desc="counting tokens",
            unit="caption",
            disable=not self.progress,
            leave=False,
        )
        with bar:
            for start in range(0, len(self.distinct), COUNTED_AT_ONCE):
                counts += count(self.distinct.slice(start, COUNTED_AT_ONCE).to_pylist())
                bar.update(len(counts) - bar.n)
        return np.argsort(-np.asarray(counts), kind="stable")

    def _embed(self, texts: list[str]) -> Halves:
        with autocast(self.device, self.precision):
            embedded = self.encoder.encode(texts).float().cpu()
        if embedded.shape != (len(texts), self.encoder.dimension):
            raise CaptuneError(
                f"text encoder {self.encoder.name} gave {tuple(embedded.shape)} for {len(texts)} "
                f"texts and dimension {self.encoder.dimension}"
            )
        if not bool(embedded.isfinite().all()):
            raise CaptuneError(f"text encoder {self.encoder.name} gave NaN or infinite values")
        halves: Halves = F.normalize(embedded, dim=-1).numpy().astype(np.float16)
        return halves


def _distinct(captions: Sequence[str] | pa.ChunkedArray) -> tuple[pa.LargeStringArray, Rows]:
    """The distinct captions in order of first appearance, and each caption's row in them."""
    if not isinstance(captions, pa.ChunkedArray):
        captions = pa.chunked_array([pa.array(captions, pa.large_string())])
    # All chunks have the same dictionary. Large: of 2 GB of captions, too.
    coded = captions.cast(pa.large_string()).dictionary_encode()
    distinct = coded.chunk(0).dictionary
    rows = np.concatenate([chunk.indices.to_numpy() for chunk in coded.chunks]).astype(np.int64)
    del coded
    pa.default_memory_pool().release_unused()  # what the captions were looked up in
    return distinct, rows


def _fingerprint(
    encoder: TextEncoder, precision: str, distinct: pa.LargeStringArray, rows: Rows
) -> str:
    """Encoder name and revision, its own fingerprint, arithmetic, captions and their order."""
    made_by = [
        VERSION,
        encoder.name,
        getattr(encoder, "revision", ""),
        encoder.fingerprint,
        encoder.dimension,
        precision,
        "float16",
    ]
    state = hashlib.blake2b(json.dumps(made_by).encode(), digest_size=16)
    for start in range(0, len(distinct), HASHED_AT_ONCE):
        texts = distinct.slice(start, HASHED_AT_ONCE).to_pylist()
        state.update("".join(f"{text}\0" for text in texts).encode("utf-8"))
    state.update(rows.astype("<i8").tobytes())
    return state.hexdigest()
