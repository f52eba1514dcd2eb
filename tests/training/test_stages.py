"""The two stages: what trains, how fast, from when on, and what loss is chance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from captune.bank import CaptionBank
from captune.config import Config
from captune.data.dataset import COCOClipDataset
from captune.data.table import CaptionTable
from captune.errors import CaptuneError
from captune.losses import ContrastiveLoss, SigLIPLoss
from captune.models import CLIPModel
from captune.training.criteria import make_criterion
from captune.training.feature_batches import FeatureBatches
from captune.training.loader import BatchLoader, make_loader
from captune.training.stages import HEAD, WHOLE, Plan, Stage
from captune.training.steps import train_epoch

Tables = tuple[CaptionTable, CaptionTable]
# The tiny ResNet's layers, from input to output (tests/encoders/test_layers.py).
LAYERS = ["model.embedder", *(f"model.encoder.stages.{i}.layers.0" for i in range(3))]


@pytest.fixture
def best(config: Config) -> Config:
    return config.replace(
        recipe="best",
        head_epochs=2,
        num_epochs=4,
        head_batch_size=8,
        bank_negatives=16,
        learning_rate=1e-3,
    )


def planned(tables: Tables, config: Config) -> tuple[Plan, CLIPModel]:
    model = CLIPModel.from_config(config)
    return Plan(model, *tables, config), model


def rates(stage: Stage, model: CLIPModel, criterion: nn.Module) -> dict[str, tuple[float, float]]:
    """Rate and weight decay of each trained parameter, as AdamW has them; each in one group."""
    config = stage.config
    groups = stage.groups(model, criterion)
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, weight_decay=config.weight_decay)
    named = [
        *model.named_parameters(),
        *(("loss." + n, p) for n, p in criterion.named_parameters()),
    ]
    names = {id(parameter): name for name, parameter in named}
    found: dict[str, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    return found


def test_stages_lie_one_after_the_other(tables: Tables, best: Config) -> None:
    plan, _ = planned(tables, best)
    stages = [plan.stage_of(epoch) for epoch in range(6)]
    assert [stage.number for stage in stages] == [HEAD] * 2 + [WHOLE] * 4
    assert stages[0] is stages[1] and stages[2] is stages[5] and len(plan) == 2
    assert [(s.first, s.last, s.steps) for s in (stages[0], stages[2])] == [(0, 2, 6), (2, 6, 12)]
    assert isinstance(stages[0].train_loader, FeatureBatches)
    assert isinstance(stages[2].train_loader, BatchLoader)
    assert [plan.steps_before(epoch) for epoch in range(5)] == [0, 3, 6, 9, 12]


@pytest.mark.parametrize(
    ("changes", "number"), [({"freeze_backbone": True}, HEAD), ({"head_epochs": 0}, WHOLE)]
)
def test_one_stage_alone(
    tables: Tables, best: Config, changes: dict[str, Any], number: int
) -> None:
    plan, _ = planned(tables, best.replace(**changes))
    assert len(plan) == 1 and plan.stage_of(0).number == number
    assert plan.stage_of(5).number == number  # asked for by a run that is done


@pytest.mark.parametrize(
    ("changes", "mirrored"), [({}, True), ({"flip": False}, False), ({"augment": False}, False)]
)
def test_both_stages_mirror_training_photos_or_neither(
    tables: Tables, best: Config, changes: dict[str, Any], mirrored: bool
) -> None:
    plan, _ = planned(tables, best.replace(**{"augment": True, **changes}))
    head, whole = plan.stage_of(0), plan.stage_of(2)
    assert (head.train_loader.store.mirrored is not None) == mirrored
    assert head.train_loader.mirrored == mirrored
    drawn = whole.train_loader.dataset.augment
    assert (drawn is not None and drawn.flip) == mirrored
    assert (drawn is not None) == ("augment" not in changes)


def test_layer_wise_rates_are_those_done_by_hand(tables: Tables, best: Config) -> None:
    config = best.replace(layer_decay=0.5, head_rate_factor=3.0, text_adapter=True)
    plan, model = planned(tables, config)
    criterion = make_criterion(config)
    assert isinstance(criterion, ContrastiveLoss)
    found = rates(plan.stage_of(2), model, criterion)
    by_hand = dict(zip(LAYERS, (1e-3 / 8, 1e-3 / 4, 1e-3 / 2, 1e-3), strict=True))
    for name, (rate, decay) in found.items():
        if name.startswith("image_encoder."):
            (layer,) = [x for x in LAYERS if name.startswith(f"image_encoder.{x}.")]
            assert (rate, decay) == (pytest.approx(by_hand[layer]), 0.01)
        elif name == "loss.log_scale":
            assert (rate, decay) == (pytest.approx(3e-3), 0.0)
        else:
            assert name.startswith(("head.", "text_adapter."))
            assert (rate, decay) == (pytest.approx(3e-3), 0.01)
    assert set(found) == {*(n for n, _ in model.named_parameters()), "loss.log_scale"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"generalised_pooling": True},
        {"use_attention_pooling": True},
        {"text_adapter": True, "use_batch_norm": True},
        {"loss": "siglip", "generalised_pooling": True},
        {"recipe": "plain"},
        {"unfreeze_epochs": 2},
    ],
)
def test_every_trainable_parameter_is_in_exactly_one_group(
    tables: Tables, best: Config, changes: dict[str, Any]
) -> None:
    config = best.replace(**changes)
    plan, model = planned(tables, config)
    criterion: Any = make_criterion(config)
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    expected |= {f"loss.{n}" for n, _ in criterion.named_parameters()}
    found = rates(plan.stage_of(config.head_epochs), model, criterion)
    assert set(found) == expected
    scalars = {"pooling.p", "loss.log_scale", "loss.bias"}
    assert all((decay == 0.0) == (name in scalars) for name, (_, decay) in found.items())
    if config.recipe == "plain":
        assert {rate for rate, _ in found.values()} == {config.learning_rate}


def test_clips_own_projection_is_its_head_and_learns_at_the_heads_rate(
    tables: Tables, best: Config, tiny_clip: Any
) -> None:
    own = {"image_encoder": str(tiny_clip), "text_encoder": str(tiny_clip)}
    config = best.replace(towers="clip-vit-b32", **own, head_epochs=0)
    plan, model = planned(tables, config)
    found = rates(plan.stage_of(0), model, ContrastiveLoss())
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert found["head.weight"][0] == pytest.approx(3e-3)
    assert found["image_encoder.model.vision_model.post_layernorm.weight"][0] == pytest.approx(1e-3)


@pytest.mark.parametrize("adapter", [False, True])
def test_stage_1_trains_head_adapter_and_loss_alone(
    tables: Tables, best: Config, adapter: bool
) -> None:
    config = best.replace(text_adapter=adapter, generalised_pooling=True)
    plan, model = planned(tables, config)
    found = rates(plan.stage_of(0), model, SigLIPLoss())
    expected = {n for n, _ in model.named_parameters() if n.startswith(("head.", "text_adapter."))}
    assert set(found) == {*expected, "loss.log_scale", "loss.bias"}
    assert any(name.startswith("text_adapter.") for name in found) is adapter
    assert {rate for rate, _ in found.values()} == {config.head_learning_rate}


# -- what stays frozen, and for how long ------------------------------------------------------
def open_layers(model: CLIPModel) -> list[bool]:
    found = []
    for layer in LAYERS:
        named = model.image_encoder.named_parameters()
        flags = {p.requires_grad for name, p in named if name.startswith(f"{layer}.")}
        assert len(flags) == 1  # a layer as a whole
        found.append(flags.pop())
    return found


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, "oooo"), (0.25, "xooo"), (0.5, "xxoo"), (0.9, "xxxx")],
)
def test_frozen_layers_are_a_share_from_the_input(
    tables: Tables, best: Config, share: float, expected: str
) -> None:
    plan, model = planned(tables, best.replace(frozen_layers=share))
    plan.stage_of(2).prepare(make_criterion(best), 2)
    assert open_layers(model) == [mark == "o" for mark in expected]


def test_frozen_layers_get_no_gradient_and_do_not_change(tables: Tables, best: Config) -> None:
    config = best.replace(frozen_layers=0.5, weight_decay=0.5)
    plan, model = planned(tables, config)
    stage, criterion = plan.stage_of(2), make_criterion(config)
    stage.prepare(criterion, 5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(stage.groups(model, criterion), lr=1e-2, weight_decay=0.5)
    train_epoch(model, stage.train_loader, criterion, optimizer, config=config, epoch=2)
    for name, parameter in model.named_parameters():
        frozen = any(name.startswith(f"image_encoder.{layer}.") for layer in LAYERS[:2])
        assert torch.equal(before[name], parameter) is frozen
        assert not frozen or parameter.grad is None


def test_the_backbone_comes_in_from_the_top(tables: Tables, best: Config) -> None:
    plan, model = planned(tables, best.replace(unfreeze_epochs=4))
    stage = plan.stage_of(2)
    seen = []
    for epoch in (2, 3, 4, 5, 6, 2):  # back again: a resumed run asks for any epoch
        stage.prepare(make_criterion(best), epoch)
        seen.append("".join(".o"[flag] for flag in open_layers(model)))
    assert seen == ["...o", "..oo", ".ooo", "oooo", "oooo", "...o"]


def test_unfreezing_leaves_frozen_layers_frozen(tables: Tables, best: Config) -> None:
    plan, model = planned(tables, best.replace(unfreeze_epochs=2, frozen_layers=0.5))
    seen = []
    for epoch in (2, 3, 5):
        plan.stage_of(2).prepare(make_criterion(best), epoch)
        seen.append("".join(".o"[flag] for flag in open_layers(model)))
    assert seen == ["...o", "..oo", "..oo"]


def test_hard_negatives_and_the_queue_come_in_after_each_stages_first_epoch(
    tables: Tables, best: Config
) -> None:
    config = best.replace(hard_negatives=0.5, image_queue=8, mixup=0.0, head_mixup=0.0)
    plan, _ = planned(tables, config)
    criterion = make_criterion(config, 16)
    assert isinstance(criterion, ContrastiveLoss)
    seen = []
    for epoch in range(5):
        plan.stage_of(epoch).prepare(criterion, epoch)
        seen.append((criterion.hard_negatives, criterion.queue_rests))
    at_first, later = (0.0, True), (0.5, False)
    assert seen == [at_first, later, at_first, later, later]


# -- chance -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "plain", "head_epochs": 0, "bank_negatives": 0},
        {"captions_per_image": 2, "bank_negatives": 0},
        {"captions_per_image": 0, "bank_negatives": 0},
        {"captions_per_image": 0, "bank_negatives": 500},
        {"captions_per_image": 0, "bank_negatives": 0, "head_batch_size": 256, "batch_size": 128},
    ],
)
def test_chance_is_the_loss_of_embeddings_that_are_all_alike(
    tables: Tables, best: Config, changes: dict[str, Any]
) -> None:
    config = best.replace(duplicate_threshold=0.0, **changes)
    plan, _ = planned(tables, config)
    criterion = ContrastiveLoss()
    for epoch in {0, config.head_epochs}:
        stage = plan.stage_of(epoch)
        batch = next(iter(stage.train_loader.batches(epoch)))
        from captune.matching import match_pairs

        pairs = match_pairs(batch.images, batch.caption_images, batch.text, own=batch.own)
        alike = torch.ones(len(batch.images), 16) / 4
        loss = criterion(alike, torch.ones(len(batch.text), 16) / 4, pairs)
        assert float(loss) == pytest.approx(stage.chance_loss, rel=1e-5)


def test_a_queue_counts_for_chance_and_ones_own_loss_has_none(tables: Tables, best: Config) -> None:
    config = best.replace(bank_negatives=0, captions_per_image=1)

    def chance(**changes: Any) -> float:
        return planned(tables, config.replace(**changes))[0].stage_of(2).chance_loss

    assert chance(image_queue=24, head_mixup=0.0, mixup=0.0) == pytest.approx(
        (math.log(8) + math.log(32)) / 2
    )
    assert chance(criterion="own:loss") == math.inf


# -- the plain recipe is what it was ----------------------------------------------------------
def test_the_plain_recipe_is_a_loop_of_a_dozen_lines(tables: Tables, config: Config) -> None:
    """Epochs of in-batch InfoNCE with AdamW over the whole tower, written out."""
    train, _ = tables
    plan, model = planned(tables, config)
    stage, criterion = plan.stage_of(0), make_criterion(config)
    stage.prepare(criterion, 0)
    optimizer = torch.optim.AdamW(
        stage.groups(model, criterion), lr=stage.learning_rate, weight_decay=0.01
    )
    found = [
        train_epoch(model, stage.train_loader, criterion, optimizer, epoch=epoch, config=config)
        for epoch in range(3)
    ]

    slow = CLIPModel.from_config(config).train()
    by_hand = torch.optim.AdamW(slow.parameters(), lr=config.learning_rate, weight_decay=0.01)
    dataset = COCOClipDataset(table=train, image_size=32)
    bank = CaptionBank.build(train.texts(), slow.text_encoder, precision="fp32")
    keys = make_loader(dataset, bank, config)._keys
    for epoch in range(3):
        losses = []
        keys.begin(epoch)
        for batch in keys:
            items = [dataset[key] for key in batch]
            image = slow(torch.stack([item.pixels for item in items]))
            text = bank.lookup([item.caption_row for item in items])
            logits = image @ text.T / 0.07
            right = torch.arange(len(items))
            loss = (
                nn.functional.cross_entropy(logits, right)
                + nn.functional.cross_entropy(logits.T, right)
            ) / 2
            by_hand.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(slow.parameters(), 1.0)
            by_hand.step()
            losses.append(float(loss.detach()))
        assert found[epoch]["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    assert len({round(row["train_loss"], 3) for row in found}) == 3


def test_a_tower_with_one_side_only_is_told_apart_before_training(
    tables: tuple[CaptionTable, CaptionTable], tiny_clip: Path, config: Config
) -> None:
    own = config.replace(
        image_encoder=str(tiny_clip), text_encoder=str(tiny_clip), train_size_share=1.5
    )
    plan = Plan(CLIPModel.from_config(own), *tables, own)
    with pytest.raises(CaptuneError, match="takes 32-pixel photos only, not 48"):
        plan.stage_of(own.head_epochs)


def test_steps_alike_end_where_another_layer_or_a_larger_crop_comes_in(
    tables: Tables, best: Config
) -> None:
    """Three steps an epoch; stage 2 has the epochs 2 to 9."""
    config = best.replace(num_epochs=8)
    for changes, expected in (
        ({}, [24, 21, 18, 15, 12, 9, 6, 3]),
        ({"unfreeze_epochs": 2}, [3, 21, 18, 15, 12, 9, 6, 3]),
        # Of four layers, numbers 4 (none), 3, 2, 2, 2, 1, 0, 0 are the first to train.
        ({"unfreeze_epochs": 8}, [3, 3, 9, 6, 3, 3, 6, 3]),
        # Sides of 32, 48, 48, then 64.
        ({"progressive_resizing": True, "image_size": 64}, [3, 6, 3, 15, 12, 9, 6, 3]),
    ):
        stage = planned(tables, config.replace(**changes))[0].stage_of(2)
        found = [stage.steps_alike(epoch) for epoch in range(2, 10)]
        assert found == expected, changes
