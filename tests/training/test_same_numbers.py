"""Stage 1 gives the numbers that the plain formulas give: what is fast changes no result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captune.bank import CaptionBank
from captune.config import Config
from captune.data.table import CaptionTable
from captune.losses import ContrastiveLoss
from captune.matching import Block, Pairs, PairsPart, block, duplicates
from captune.training import steps
from captune.training.fit import fit


def plain_lookup(bank: CaptionBank, rows: Any) -> Tensor:
    found = bank.embeddings[bank.row_of_caption[np.asarray(rows)]].astype(np.float32)
    return F.normalize(torch.from_numpy(found), dim=-1)


def plain_near(images: Tensor, writers: Tensor, alike: duplicates.Likeness) -> Tensor:
    near = alike.written @ alike.candidates.T >= alike.threshold - 1e-6  # (W, K)
    return (images[:, None] == writers).float() @ near.float() > 0


def plain_mix(pairs: Pairs, partner: Tensor, weight: Tensor) -> Pairs:
    positive = pairs.positive.float()
    share = weight[:, None] * positive + (1 - weight[:, None]) * positive[partner]
    ignored = (pairs.ignored | pairs.ignored[partner]) & (share == 0)
    return pairs._replace(positive=share > 0, ignored=ignored, share=share)


def plain_direction(
    loss: ContrastiveLoss, cosine: Tensor, block: Block, soft: Tensor | None, part: PairsPart
) -> Tensor:
    assert soft is None and not loss.hard_negatives
    share, ignored = block.shares, block.ignored
    logits = loss.logits(cosine).masked_fill(ignored, torch.finfo(cosine.dtype).min)
    target = share / share.sum(1, keepdim=True).clamp(min=1e-30)
    answered = share.sum(1) > 0
    each = -(target * logits.log_softmax(1).masked_fill(ignored, 0.0)).sum(1)
    return each[answered].mean()


def test_a_training_gives_the_numbers_of_the_plain_formulas(
    tables: tuple[CaptionTable, CaptionTable],
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config.replace(
        recipe="best",
        head_epochs=3,
        freeze_backbone=True,
        head_batch_size=8,
        bank_negatives=40,
        duplicate_threshold=0.8,
        precision="fp32",
    )
    monkeypatch.setattr(duplicates, "WORTH_A_SIEVE", 0)
    monkeypatch.setattr(duplicates, "has_native_bf16", lambda device: True)
    fast = fit(*tables, out=tmp_path / "fast", config=config)
    monkeypatch.setattr(CaptionBank, "lookup", plain_lookup)
    monkeypatch.setattr(block, "near_duplicates", plain_near)
    monkeypatch.setattr(steps, "mix_pairs", plain_mix)
    monkeypatch.setattr(ContrastiveLoss, "_direction", plain_direction)
    plain = fit(*tables, out=tmp_path / "plain", config=config)
    for one, other in zip(fast.history(), plain.history(), strict=True):
        for key in ("train_loss", "val_loss", "rsum", "temperature"):
            assert one[key] == pytest.approx(other[key], rel=1e-6), key
