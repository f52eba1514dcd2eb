"""A bank for each shard: the embeddings of one bank over all captions, built once, opened late."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from captune.bank import CaptionBank
from captune.data.stream_table import StreamTable
from captune.training import stream_bank
from captune.training.stream_bank import StreamBank
from shards import write_shards

SIZES = [4, 1, 6]


class Words:
    """Embeds a text by its letters, and counts what it was given."""

    name, dimension, fingerprint = "words", 8, "1"

    def __init__(self) -> None:
        self.embedded: list[str] = []
        self.stop_after = 10**6

    def encode(self, texts: list[str]) -> Tensor:
        self.embedded += texts
        if len(self.embedded) > self.stop_after:
            raise KeyboardInterrupt
        seeds = [sum(place * ord(letter) for place, letter in enumerate(t, 1)) for t in texts]
        rows = [np.random.default_rng(seed).normal(size=8) for seed in seeds]
        return torch.tensor(np.array(rows), dtype=torch.float32)


@pytest.fixture
def table(tmp_path: Path) -> StreamTable:
    return StreamTable.open(write_shards(tmp_path / "s", SIZES, 3))


def test_it_gives_what_one_bank_over_all_captions_gives(
    table: StreamTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = StreamBank.build(table, Words(), precision="fp32")
    texts = [text for shard in table.shards for text in shard.texts()]
    whole = CaptionBank.build(texts, Words(), precision="fp32")
    rows = np.random.default_rng(0).permutation(len(texts))
    assert len(bank) == len(whole) == 33 and bank.dimension == 8
    assert torch.equal(bank.lookup(rows), whole.lookup(rows))
    assert torch.equal(bank.lookup(torch.tensor([7, 7, 32])), whole.lookup([7, 7, 32]))
    monkeypatch.setattr(stream_bank, "BANKS_OPEN", 1)
    few = StreamBank.build(table, Words(), precision="fp32")
    assert torch.equal(few.lookup(rows), whole.lookup(rows)) and len(few._open) == 1


def test_each_shard_has_a_fingerprint_and_is_banked_once(
    table: StreamTable, tmp_path: Path
) -> None:
    encoder = Words()
    first = StreamBank.build(table, encoder, precision="fp32")
    assert len(set(first.fingerprints)) == 3 and len(encoder.embedded) == 33
    again = StreamBank.build(table, encoder, precision="fp32")
    assert again.fingerprints == first.fingerprints
    other = StreamTable.open(f"{tmp_path}/s/squares-{{02,00}}.tar")  # others of the same shards
    StreamBank.build(other, encoder, precision="fp32")
    assert len(encoder.embedded) == 33


def test_a_stopped_one_goes_on_with_the_shard_at_which_it_stopped(table: StreamTable) -> None:
    encoder = Words()
    encoder.stop_after = 12  # the captions of the first shard
    with pytest.raises(KeyboardInterrupt):
        StreamBank.build(table, encoder, precision="fp32")
    encoder.stop_after, encoder.embedded = 10**6, []
    StreamBank.build(table, encoder, precision="fp32")
    assert len(encoder.embedded) == 33 - 12
