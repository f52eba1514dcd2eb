"""Chance: what the real losses give for embeddings that are all alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captune.config import Config
from captune.data.stream_table import StreamTable
from captune.data.table import CaptionTable
from captune.losses import ContrastiveLoss, SigLIPLoss
from captune.matching import Pairs, match_pairs, mix_pairs
from captune.models import CLIPModel
from captune.training.chance import chance_loss
from captune.training.mixing import draw_mix
from captune.training.stages import Plan, Stage
from captune.training.watch import EpochSigns, Watchdog
from shards import write_shards

Tables = tuple[CaptionTable, CaptionTable]
EXACT = [
    {"captions_per_image": 1, "bank_negatives": 0},
    {"captions_per_image": 2, "bank_negatives": 0},
    {"captions_per_image": 0, "bank_negatives": 0},
    {"captions_per_image": 9, "bank_negatives": 0},  # than there are
    {"captions_per_image": 0, "bank_negatives": 500},
    {"captions_per_image": 2, "bank_negatives": 500},  # of its own images, too
    {"captions_per_image": 0, "bank_negatives": 0, "batch_size": 256},
]
DRAWN = [{"captions_per_image": each, "bank_negatives": 30} for each in (0, 1, 2)]


def stage_of(tables: Tables, config: Config, **changes: Any) -> Stage:
    values = {"recipe": "plain", "duplicate_threshold": 0.0, "loss": "siglip", **changes}
    config = config.replace(**values)
    return Plan(CLIPModel.from_config(config), *tables, config).stage_of(0)


def pairs_of(stage: Stage, epochs: int) -> list[Pairs]:
    return [
        match_pairs(batch.images, batch.caption_images, batch.text, own=batch.own)
        for epoch in range(epochs)
        for batch in stage.train_loader.batches(epoch)
    ]


def sigmoid_loss(pairs: Pairs, logit: float) -> float:
    """Of embeddings that are all alike, with the bias that makes ``logit`` of their cosine."""
    rows, captions = pairs.positive.shape
    loss = SigLIPLoss(temperature=0.1, bias=logit - 10)
    return loss(torch.ones(rows, 4) / 2, torch.ones(captions, 4) / 2, pairs).item()


def best_logit(several: list[Pairs]) -> float:
    """Of the share of pairs that are true."""
    true = sum(float(p.positive.sum() if p.share is None else p.share.sum()) for p in several)
    share = true / sum(p.positive.numel() for p in several)
    return math.log(share / (1 - share))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("changes", EXACT)
def test_chance_of_the_sigmoid_loss_is_that_of_the_best_constant_logit(
    tables: Tables, config: Config, changes: dict[str, Any], mixed: bool
) -> None:
    stage = stage_of(tables, config, **changes)
    pairs = pairs_of(stage, 1)[0]
    if mixed:
        mix = draw_mix(len(pairs.images), 1.0, seed=0, epoch=0, step=0)
        assert mix is not None
        pairs = mix_pairs(pairs, mix.partner, mix.weight)
    best = best_logit([pairs])
    assert sigmoid_loss(pairs, best) == pytest.approx(stage.chance_loss, rel=1e-5)
    for other in (best - 0.3, best + 0.3):
        assert sigmoid_loss(pairs, other) > stage.chance_loss


@pytest.mark.parametrize("changes", DRAWN)
@pytest.mark.parametrize("loss", ["siglip", "infonce"])
def test_what_the_bank_draws_is_counted_on_average(
    tables: Tables, config: Config, changes: dict[str, Any], loss: str
) -> None:
    """Some of the captions drawn stand in the step already, some are further ones of its images."""
    stage = stage_of(tables, config, loss=loss, **changes)
    steps = pairs_of(stage, 12)
    if loss == "siglip":
        best = best_logit(steps)
        found = [sigmoid_loss(pairs, best) for pairs in steps]
    else:
        alike = ContrastiveLoss()
        found = [
            float(alike(*(torch.ones(n, 4) / 2 for n in pairs.positive.shape), pairs))
            for pairs in steps
        ]
    assert np.mean(found) == pytest.approx(stage.chance_loss, rel=0.01)


def test_where_chance_is_not_known(tables: Tables, config: Config) -> None:
    def chance(**changes: Any) -> float:
        return stage_of(tables, config, **changes).chance_loss

    assert chance(criterion="own:loss") == math.inf
    near = {"duplicate_threshold": 0.9, "duplicates": "positive"}
    assert chance(**near) == math.inf > chance(**near, loss="infonce")
    assert chance(**{**near, "duplicates": "ignore"}) == chance()


def test_a_stream_does_not_tell_how_many_captions_are_drawn_again(
    config: Config, tmp_path: Path
) -> None:
    """Negatives come from the shards at hand, in which a step's own images lie thicker."""
    table = StreamTable.open(write_shards(tmp_path / "s", [9, 14], captions=2))
    one = {"loss": "siglip", "captions_per_image": 1, "bank_negatives": 8}
    assert chance_loss(config.replace(**one), table, 8) == math.inf
    for change in ({"captions_per_image": 0}, {"bank_negatives": 0}, {"loss": "infonce"}):
        assert 0 < chance_loss(config.replace(**{**one, **change}), table, 8) < 40


def test_one_image_alone_has_no_chance_to_be_below(tables: Tables, config: Config) -> None:
    one = tables[0].take_images([3])
    values = config.replace(loss="siglip", captions_per_image=0, bank_negatives=0)
    assert chance_loss(values, one, 8) == 0.0


def signs(stage: Stage, shares: list[float]) -> list[EpochSigns]:
    """Epochs whose training loss is these shares of chance, while recall stays where it was."""
    return [
        EpochSigns(
            epoch=epoch,
            train_loss=share * stage.chance_loss,
            chance_loss=stage.chance_loss,
            val_loss=3.0,
            rsum=4.0,
            temperature=0.1,
            spread=0.7,
            effective_rank=90.0,
            dimension=384,
            images=1000,
        )
        for epoch, share in enumerate(shares, 1)
    ]


def test_a_sigmoid_training_at_chance_is_stuck(tables: Tables, config: Config) -> None:
    stage = stage_of(tables, config, captions_per_image=0, bank_negatives=500)
    dog = Watchdog()
    said = [dog.look(epoch) for epoch in signs(stage, [1.02, 1.0, 0.99])]
    assert [len(found) for found in said] == [0, 1, 0]
    assert "no better than guessing" in said[1][0]
    dog = Watchdog()
    assert [dog.look(epoch) for epoch in signs(stage, [1.02, 0.9])] == [[], []]
