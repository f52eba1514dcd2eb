"""train_epoch as a notebook calls it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from captune.bank import CaptionBank
from captune.config import Config
from captune.data.dataset import COCOClipDataset
from captune.data.table import CaptionTable
from captune.errors import CaptuneError
from captune.losses import InfoNCELoss
from captune.models import CLIPModel
from captune.training import steps as steps_module
from captune.training.fit import fit
from captune.training.loader import make_loader
from captune.training.schedule import warmup_cosine
from captune.training.steps import train_epoch
from captune.training.validation import validate

Tables = tuple[CaptionTable, CaptionTable]


@pytest.fixture
def model(config: Config) -> CLIPModel:
    return CLIPModel.from_config(config)


def dataset_of(table: CaptionTable) -> COCOClipDataset:
    return COCOClipDataset(table=table, image_size=32)


def bank_of(table: CaptionTable, model: CLIPModel) -> CaptionBank:
    return CaptionBank.build(table.texts(), model.text_encoder, precision="fp32")


def test_one_epoch_moves_every_layer(tables: Tables, config: Config, model: CLIPModel) -> None:
    train, _ = tables
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = make_loader(dataset_of(train), bank_of(train, model), config)
    stats = train_epoch(
        model, loader, InfoNCELoss(temperature=0.07), optimizer, None, epoch=0, config=config
    )
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert 0 < stats["train_loss"] < 2 * math.log(8)
    assert 0 <= stats["train_accuracy"] <= 100 and stats["images_per_second"] > 0


def test_a_plain_data_loader_gets_a_bank_once_with_a_line(
    tables: Tables, config: Config, model: CLIPModel, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = DataLoader(dataset_of(tables[0]), batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in (0, 1):
        train_epoch(model, loader, InfoNCELoss(), optimizer, epoch=epoch, config=dict(config))
    assert capsys.readouterr().err.count("carries no caption bank: building one") == 1
    val_loader = DataLoader(dataset_of(tables[1]), batch_size=8)
    assert validate(model, val_loader, InfoNCELoss(), config)["images"] == 8


def test_a_plain_loader_draws_captions_anew_each_epoch(
    tables: Tables, config: Config, model: CLIPModel
) -> None:
    dataset = dataset_of(tables[0])
    loader = DataLoader(dataset, batch_size=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    drawn = []
    for epoch in (0, 1):
        train_epoch(model, loader, InfoNCELoss(), optimizer, epoch=epoch, config=config)
        drawn.append([dataset[i].caption_row for i in range(len(dataset))])
    assert drawn[0] != drawn[1]


def test_the_scheduler_steps_once_a_batch(tables: Tables, config: Config, model: CLIPModel) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = warmup_cosine(optimizer, warmup_steps=0, total_steps=3)
    loader = make_loader(dataset_of(tables[0]), bank_of(tables[0], model), config)
    train_epoch(model, loader, InfoNCELoss(), optimizer, scheduler, config=config)
    assert scheduler.last_epoch == 3 == loader.steps
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_gradients_are_clipped(
    tables: Tables, config: Config, model: CLIPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    real = optimizer.step

    def step(*args: object, **options: object) -> None:
        squares = [float(p.grad.square().sum()) for p in model.parameters()]
        norms.append(math.sqrt(sum(squares)))
        real()

    monkeypatch.setattr(optimizer, "step", step)
    loader = make_loader(dataset_of(tables[0]), bank_of(tables[0], model), config)
    train_epoch(model, loader, InfoNCELoss(), optimizer, config=config.replace(max_grad_norm=0.01))
    assert len(norms) == 3 and all(norm <= 0.0101 for norm in norms)


def test_in_batch_accuracy_and_means_are_right(
    tables: Tables, config: Config, model: CLIPModel
) -> None:
    """A model that is not trained (rate 0), against sums done by hand."""
    table = tables[0]
    loader = make_loader(dataset_of(table), bank_of(table, model), config)
    model.image_encoder.requires_grad_(False)
    for module in model.modules():  # the same statistics in both passes
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    losses, hits, images = [], 0.0, 0
    model.train()
    with torch.no_grad():
        for batch in loader.batches(0):
            image = batch.embed(model)
            losses.append(float(InfoNCELoss()(image, batch.text)) * len(image))
            for i in range(len(image)):
                row = image @ batch.text.T
                hits += 0.5 * (int(row[i].argmax()) == i) + 0.5 * (int(row[:, i].argmax()) == i)
            images += len(image)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.0)
    stats = train_epoch(model, loader, InfoNCELoss(), optimizer, config=config)
    assert stats["train_loss"] == pytest.approx(sum(losses) / images, rel=1e-5)
    assert stats["train_accuracy"] == pytest.approx(100 * hits / images)


def test_a_loader_over_something_else_is_refused(config: Config, model: CLIPModel) -> None:
    loader = DataLoader([1, 2, 3])  # type: ignore[arg-type]
    with pytest.raises(CaptuneError, match="COCOClipDataset"):
        train_epoch(
            model, loader, InfoNCELoss(), torch.optim.SGD(model.parameters()), config=config
        )


def test_a_bank_of_other_captions_is_refused(
    tables: Tables, config: Config, model: CLIPModel
) -> None:
    with pytest.raises(CaptuneError, match="40 captions, the dataset 120"):
        make_loader(dataset_of(tables[0]), bank_of(tables[1], model), config)


def test_cards_that_do_not_reach_one_another_are_told_of_in_one_line(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise NotImplementedError("set NCCL_P2P_DISABLE")

    monkeypatch.setattr(steps_module, "Accelerator", refuse)
    with pytest.raises(CaptuneError, match="set NCCL_P2P_DISABLE"):
        steps_module.make_accelerator(config)


def test_fp16_is_refused_on_a_cpu_before_anything_is_written(
    tables: Tables, config: Config, model: CLIPModel, tmp_path: Path
) -> None:
    """And whoever mends it can start the same command again."""
    wrong = config.replace(precision="fp16", device="cpu")
    with pytest.raises(CaptuneError, match="precision=fp16 does not train on a CPU"):
        fit(*tables, out=tmp_path / "run", config=wrong)
    assert fit(*tables, out=tmp_path / "run", config=config.replace(num_epochs=1)).is_complete
