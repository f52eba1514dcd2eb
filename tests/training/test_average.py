"""The moving average of the weights, against a slow loop of its formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captune.config import Config
from captune.data.table import CaptionTable
from captune.encoders.layers import freeze_batch_norm
from captune.models import CLIPModel
from captune.training.average import MovingAverage
from captune.training.fit import fit

Tables = tuple[CaptionTable, CaptionTable]


@pytest.fixture
def model(tiny_resnet: Path, tiny_sentence: Path) -> CLIPModel:
    torch.manual_seed(1)
    return CLIPModel(
        str(tiny_sentence), image_encoder=str(tiny_resnet), hidden_dim=8, text_adapter=True
    )


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_equals_a_slow_loop_of_the_formula(model: CLIPModel, decay: float) -> None:
    average = MovingAverage(model, decay=decay)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for step in range(15):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        average.update(model, step)
        now = min(decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            expected[name] = now * expected[name] + (1 - now) * parameter.detach().double()
    for name, parameter in average.model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], atol=1e-5, rtol=1e-5)


def test_buffers_are_the_models_and_weights_that_stay_are_bit_identical(model: CLIPModel) -> None:
    average = MovingAverage(model, decay=0.999)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for buffer in model.buffers():
        buffer += 1
    for step in range(50):
        average.update(model, step)
    assert all(torch.equal(before[n], p) for n, p in average.model.named_parameters())
    buffers = zip(average.model.buffers(), model.buffers(), strict=True)
    assert all(torch.equal(one, other) and one is not other for one, other in buffers)


def test_what_does_not_train_is_not_touched_until_it_does(model: CLIPModel) -> None:
    """It would cost a pass over all weights in each step, for the same numbers."""
    freeze_batch_norm(model.image_encoder)
    average = MovingAverage(model, decay=0.999)
    average.follow(torch.optim.SGD(model.head.parameters(), lr=0.1))
    everything = [*average.model.image_encoder.parameters(), *average.model.image_encoder.buffers()]
    versions = [tensor._version for tensor in everything]
    for step in range(3):
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter += 1
        average.update(model, step)
    assert [tensor._version for tensor in everything] == versions
    head = zip(average.model.head.parameters(), model.head.parameters(), strict=True)
    assert all(not torch.equal(one, other) for one, other in head)
    average.follow(torch.optim.SGD(model.parameters(), lr=0.1))
    next(model.image_encoder.parameters()).requires_grad_(False)
    model.image_encoder.train()
    average.update(model, 3)
    moved = [t._version > v for t, v in zip(everything, versions, strict=True)]
    assert moved == [place > 0 for place in range(len(moved))]


def test_stage_1_passes_over_the_backbone(
    tables: Tables, best: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As training calls it: each step of stage 1 leaves the average's backbone alone."""
    moved: list[tuple[bool, bool]] = []
    real = MovingAverage.update

    def update(self: MovingAverage, model: CLIPModel, step: int) -> None:
        parts = [next(p.parameters()) for p in (self.model.image_encoder, self.model.head)]
        before = [p._version for p in parts]
        real(self, model, step)
        backbone, head = (p._version > v for p, v in zip(parts, before, strict=True))
        moved.append((backbone, head))

    monkeypatch.setattr(MovingAverage, "update", update)
    fit(*tables, out=tmp_path / "run", config=best.replace(frozen_layers=0.0))
    assert moved == [(False, True)] * 6 + [(True, True)] * 6


def test_the_text_tower_is_shared_and_everything_else_is_its_own(model: CLIPModel) -> None:
    average = MovingAverage(model, decay=0.9)
    assert average.model.text_encoder is model.text_encoder
    mine, theirs = ({p.data_ptr() for p in m.parameters()} for m in (model, average.model))
    assert not mine & theirs
    assert not any(p.requires_grad for p in average.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert average.model.state_dict().keys() == model.state_dict().keys()


def test_clips_own_projection_stays_the_towers(tiny_clip: Path) -> None:
    """It is the head and stands in the tower too, outside its registered parts."""
    model = CLIPModel(str(tiny_clip), image_encoder=str(tiny_clip))
    average = MovingAverage(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for step in range(200):
        average.update(model, step)
    pixels = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    assert all(float(p.abs().max()) < 1e-6 for p in average.model.parameters())
    assert average.model(pixels).shape == (2, 16)
