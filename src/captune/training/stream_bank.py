"""The caption embeddings of a stream: a bank for each shard, opened when a step needs it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from captune.bank import CaptionBank
from captune.data.stream_table import StreamTable
from captune.data.table import Rows
from captune.encoders.text import TextEncoder
from captune.files import cache_dir

BANKS_OPEN = 128  # each holds a file open, and systems allow a process some hundreds


class StreamBank:
    """What :class:`captune.bank.CaptionBank` is for a table, for S shards with M captions.

    Caption rows are those of the stream; each shard's bank has a fingerprint of its own and lies in
    the cache shared by runs. Use :meth:`build`.
    """

    def __init__(self, table: StreamTable, fingerprints: Sequence[str], dimension: int) -> None:
        self.table = table
        self.fingerprints = list(fingerprints)
        self.dimension = dimension
        self._open: OrderedDict[int, CaptionBank] = OrderedDict()

    def __len__(self) -> int:
        return self.table.num_captions

    @classmethod
    def build(
        cls,
        table: StreamTable,
        encoder: TextEncoder,
        *,
        precision: str = "auto",
    ) -> StreamBank:
        """The banks of all shards, one after the other; what is in the cache is not built again.

        Raises:
            CaptuneError: the encoder gives wrong shapes or NaN, or a bank in the cache is damaged.
        """
        fingerprints = []
        for shard in tqdm(table.shards, desc="embedding captions", unit="shard", leave=False):
            bank = CaptionBank.build(shard.texts(), encoder, precision=precision, progress=False)
            fingerprints.append(bank.fingerprint)
        return cls(table, fingerprints, encoder.dimension)

    def lookup(self, caption_rows: Sequence[int] | Rows | Tensor) -> Tensor:
        """``(B,)`` caption rows of the stream to ``(B, D)`` fp32 embeddings of unit length."""
        rows = np.asarray(caption_rows, dtype=np.int64)
        first = self.table.first_caption
        shards = np.searchsorted(first, rows, side="right") - 1
        found = torch.empty(len(rows), self.dimension)
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            found[mine] = self._bank(int(shard)).lookup(rows[mine] - first[shard])
        return found

    def _bank(self, shard: int) -> CaptionBank:
        if shard not in self._open:
            fingerprint = self.fingerprints[shard]
            self._open[shard] = CaptionBank.open(cache_dir() / "banks" / fingerprint, fingerprint)
            if len(self._open) > BANKS_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]
