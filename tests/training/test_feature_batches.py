"""Batches of kept features: those of the loader of photos, with features in place of pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captune.bank import CaptionBank
from captune.config import Config
from captune.data.dataset import COCOClipDataset
from captune.data.table import CaptionTable
from captune.errors import CaptuneError
from captune.features import FeatureStore
from captune.models import CLIPModel
from captune.training.feature_batches import FeatureBatches
from captune.training.loader import Batch, make_loader

Tables = tuple[CaptionTable, CaptionTable]


@pytest.fixture
def settings(config: Config) -> Config:
    """As the best recipe draws, with few negatives, in batches of 7 of 24."""
    return config.replace(
        recipe="best", batch_size=7, head_batch_size=7, bank_negatives=12, captions_per_image=3
    )


@pytest.fixture
def model(settings: Config) -> CLIPModel:
    return CLIPModel.from_config(settings)


def bank_of(table: CaptionTable, model: CLIPModel) -> CaptionBank:
    return CaptionBank.build(table.texts(), model.text_encoder, precision="fp32", progress=False)


def kept(
    table: CaptionTable, model: CLIPModel, config: Config, *, shuffle: bool = True
) -> FeatureBatches:
    store = FeatureStore.build(
        table, model, mirrored=config.flips, precision="fp32", num_workers=0, progress=False
    )
    return FeatureBatches(store, table, bank_of(table, model), config, shuffle=shuffle)


def same(one: Batch, other: Batch) -> bool:
    return one.own == other.own and all(
        torch.equal(getattr(one, key), getattr(other, key))
        for key in ("inputs", "text", "images", "caption_images")
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_order_and_captions_are_those_of_the_loader_of_photos(
    tables: Tables, settings: Config, model: CLIPModel, shuffle: bool
) -> None:
    table = tables[0]
    features = kept(table, model, settings, shuffle=shuffle)
    dataset = COCOClipDataset(table=table, image_size=32, augment=shuffle)
    photos = make_loader(dataset, bank_of(table, model), settings, shuffle=shuffle)
    assert features.steps == photos.steps == (3 if shuffle else 4)
    for epoch in (0, 1, 5):
        pairs = list(zip(features.batches(epoch), photos.batches(epoch), strict=True))
        assert len(pairs) == features.steps
        for one, other in pairs:
            assert one.inputs.shape == (len(other.images), model.feature_dim)
            assert torch.equal(one.text, other.text) and one.own == other.own
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.caption_images, other.caption_images)
            assert torch.equal(one.caption_images[: len(one.images)], one.images)


def test_inputs_are_the_features_of_the_batchs_images(
    tables: Tables, settings: Config, model: CLIPModel
) -> None:
    batches = kept(tables[0], model, settings.replace(augment=False))
    for batch in batches.batches(2):
        assert torch.equal(batch.inputs, batches.store.lookup(batch.images.numpy()))
        model.eval()
        with torch.no_grad():
            pixels = torch.stack(
                [
                    COCOClipDataset(table=tables[0], image_size=32)[int(i)].pixels
                    for i in batch.images
                ]
            )
            torch.testing.assert_close(batch.embed(model), model(pixels), atol=2e-3, rtol=2e-3)


def test_about_half_of_the_training_images_are_mirrored_and_none_in_validation(
    tables: Tables, settings: Config, model: CLIPModel
) -> None:
    table = tables[0]
    for row in range(len(table)):
        noise = np.random.default_rng(row).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        from PIL import Image

        Image.fromarray(noise).save(table.path(row))
    training = kept(table, model, settings.replace(augment=True))
    turned = [
        bool((row != plain).any())
        for epoch in range(10)
        for batch in training.batches(epoch)
        for row, plain in zip(
            batch.inputs, training.store.lookup(batch.images.numpy()), strict=True
        )
    ]
    assert 70 < sum(turned) < 140 and len(turned) == 210
    upright = FeatureBatches(  # the mirrored view lies there, and nobody asks for it
        training.store, table, training.bank, settings.replace(flip=False), shuffle=True
    )
    for batch in (batch for epoch in range(3) for batch in upright.batches(epoch)):
        assert torch.equal(batch.inputs, training.store.lookup(batch.images.numpy()))
    for batch in kept(table, model, settings.replace(augment=True), shuffle=False).batches(0):
        assert torch.equal(batch.inputs, training.store.lookup(batch.images.numpy()))


@pytest.mark.parametrize("start", [1, 2])
def test_an_epoch_goes_on_in_its_middle_with_the_very_same_batches(
    tables: Tables, settings: Config, model: CLIPModel, start: int
) -> None:
    batches = kept(tables[0], model, settings)
    whole = list(batches.batches(4))
    list(batches.batches(2))  # whatever came in between
    rest = list(batches.batches(4, start))
    assert len(rest) == len(whole) - start
    assert all(same(one, other) for one, other in zip(rest, whole[start:], strict=True))


def test_unreadable_images_are_left_out_of_every_batch(
    tables: Tables, settings: Config, model: CLIPModel
) -> None:
    table = tables[0]
    for row in (0, 13, 23):
        table.path(row).write_bytes(b"broken")
    training = kept(table, model, settings)
    assert training.steps == 3 and set(training.unreadable) == {
        str(table.path(row)) for row in (0, 13, 23)
    }
    for epoch in range(3):
        images = [int(i) for batch in training.batches(epoch) for i in batch.images]
        assert sorted(images) == [i for i in range(24) if i not in (0, 13, 23)]
        assert all(torch.isfinite(batch.inputs).all() for batch in training.batches(epoch))
    in_order = kept(table, model, settings, shuffle=False)
    seen = [int(i) for batch in in_order.batches(0) for i in batch.images]
    assert seen == [i for i in range(24) if i not in (0, 13, 23)]


def test_fewer_images_than_a_batch_make_one_small_batch(
    tables: Tables, settings: Config, model: CLIPModel
) -> None:
    (batch,) = kept(tables[0], model, settings.replace(head_batch_size=256)).batches(0)
    assert sorted(batch.images.tolist()) == list(range(24))


def test_a_bank_of_other_captions_is_refused(
    tables: Tables, settings: Config, model: CLIPModel, tmp_path: Path
) -> None:
    right = kept(tables[0], model, settings)
    wrong: Any = bank_of(tables[1], model)
    with pytest.raises(CaptuneError, match="40 captions, the dataset 120"):
        FeatureBatches(right.store, tables[0], wrong, settings, shuffle=True)
