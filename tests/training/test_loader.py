"""The loader gives each epoch its side of the crops; the training step varies its colours."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from captune.bank import CaptionBank
from captune.config import Config
from captune.data.augment import Augmentation, colour_factors, jitter_colours
from captune.data.dataset import COCOClipDataset
from captune.data.table import CaptionTable
from captune.losses import InfoNCELoss
from captune.models import CLIPModel
from captune.training.loader import BatchLoader, crop_side, make_loader
from captune.training.schedule import training_side
from captune.training.stages import Plan
from captune.training.steps import train_epoch

Tables = tuple[CaptionTable, CaptionTable]


@pytest.fixture
def growing(config: Config) -> Config:
    return config.replace(progressive_resizing=True, train_size_share=1.25, num_epochs=6)


def loader_of(table: CaptionTable, config: Config, *, shuffle: bool = True) -> BatchLoader:
    rows = table.captions.num_rows
    bank = CaptionBank(np.zeros((rows, 8), dtype=np.float16), np.arange(rows), "")
    dataset = COCOClipDataset(table=table, image_size=64, augment=Augmentation(0.4, 5))
    return make_loader(dataset, bank, config, shuffle=shuffle)


def sides(loader: BatchLoader, epoch: int) -> set[tuple[int, ...]]:
    return {tuple(batch.inputs.shape[1:]) for batch in loader.batches(epoch)}


# -- which side ---------------------------------------------------------------------------------
def test_sides_grow_from_half_to_full_by_the_middle() -> None:
    assert [training_side(e, 8, 224) for e in range(8)] == [112, 144, 176, 192] + [224] * 4
    assert [training_side(e, 3, 128) for e in range(3)] == [64, 128, 128]
    assert training_side(0, 1, 224) == 224  # the only epoch sees what is wanted in the end
    assert training_side(-40, 8, 224) == 112


@pytest.mark.parametrize("full", [16, 32, 40, 50, 224, 378])
@pytest.mark.parametrize("epochs", [1, 2, 5, 30])
def test_sides_are_multiples_of_16_within_their_bounds(full: int, epochs: int) -> None:
    found = [training_side(epoch, epochs, full) for epoch in range(epochs)]
    assert all(side == full or side % 16 == 0 for side in found)
    assert all(min(32, full) <= side <= full for side in found)
    assert all(a <= b for a, b in pairwise(found))
    assert set(found[epochs // 2 :]) == {full}


def test_the_side_is_counted_from_where_stage_2_begins(growing: Config) -> None:
    config = growing.replace(head_epochs=10)
    assert [crop_side(epoch, config, 64) for epoch in range(10, 16)] == [48, 48, 64, 80, 80, 80]
    fixed = config.replace(progressive_resizing=False)
    assert {crop_side(epoch, fixed, 64) for epoch in range(16)} == {80}
    assert crop_side(3, fixed.replace(train_size_share=1.0), 64) == 64


# -- what the loader gives ----------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_has_its_side_whatever_the_workers(
    tables: Tables, growing: Config, workers: int
) -> None:
    config = growing.replace(num_workers=workers, head_epochs=2)
    loader = loader_of(tables[0], config)
    for epoch in (2, 4, 5, 3):  # one worker lives over all of them
        side = training_side(epoch - 2, 6, 80)
        assert sides(loader, epoch) == {(3, side, side)}


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_keeps_the_side_of_the_dataset(
    tables: Tables, growing: Config, workers: int
) -> None:
    config = growing.replace(num_workers=workers)
    loader = loader_of(tables[1], config, shuffle=False)
    assert sides(loader, 0) == sides(loader, 5) == {(3, 64, 64)}


def test_by_default_training_keeps_the_side_of_the_dataset(tables: Tables, config: Config) -> None:
    assert sides(loader_of(tables[0], config), 1) == {(3, 64, 64)}
    assert sides(loader_of(tables[0], config.replace(train_size_share=0.75)), 1) == {(3, 48, 48)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_epoch_goes_on_with_the_same_batches(
    tables: Tables, growing: Config, workers: int
) -> None:
    config = growing.replace(head_epochs=0)
    whole = list(loader_of(tables[0], config).batches(1))
    rest = list(loader_of(tables[0], config.replace(num_workers=workers)).batches(1, start=1))
    assert len(rest) == len(whole) - 1 > 0
    assert rest[0].inputs.shape[-1] == training_side(1, 6, 80) < 80  # an epoch that still grows
    for a, b in zip(whole[1:], rest, strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.images, b.images)


# -- wired in -----------------------------------------------------------------------------------
def test_the_plan_hands_the_keys_to_the_training_photos_only(
    tables: Tables, config: Config
) -> None:
    config = config.replace(augment=True, crop_scale=0.25, rand_augment=6)
    plan = Plan(CLIPModel.from_config(config), *tables, config)
    stage = plan.stage_of(0)
    assert stage.train_loader.dataset.augment == Augmentation(0.25, 6)
    assert stage.val_loader.dataset.augment is None  # type: ignore[attr-defined]
    upright = Plan(plan.model, *tables, config.replace(flip=False))
    assert upright.stage_of(0).train_loader.dataset.augment == Augmentation(0.25, 6, flip=False)
    plain = Plan(plan.model, *tables, config.replace(augment=False))
    assert plain.stage_of(0).train_loader.dataset.augment is None


@pytest.mark.parametrize(("strength", "augment"), [(0.4, True), (0.0, True), (0.4, False)])
def test_the_model_sees_colours_of_seed_epoch_and_image(
    tables: Tables, config: Config, strength: float, augment: bool
) -> None:
    config = config.replace(colour_jitter=strength, augment=augment, seed=3)
    model = CLIPModel.from_config(config)
    bank = CaptionBank.build(tables[0].texts(), model.text_encoder, precision="fp32")
    loader = make_loader(COCOClipDataset(table=tables[0], image_size=32, seed=3), bank, config)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].cpu().clone()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_epoch(model, loader, InfoNCELoss(), optimizer, epoch=2, config=config)
    for pixels, batch in zip(seen, loader.batches(2), strict=True):
        ids = tables[0].image_ids[np.asarray(batch.images)]
        varied = jitter_colours(batch.inputs, colour_factors(ids, 3, 2, strength))
        expected = varied if augment and strength else batch.inputs
        assert torch.equal(pixels, expected)
        assert torch.equal(varied, batch.inputs) == (strength == 0)


def test_crops_are_a_share_of_the_side_in_multiples_of_16(config: Config) -> None:
    smaller = config.replace(train_size_share=0.86)
    for side, expected in ((224, 192), (240, 208), (260, 224), (128, 112), (32, 32)):
        assert crop_side(0, smaller, side) == expected
        assert crop_side(0, config, side) == side
