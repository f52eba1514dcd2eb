"""The moving average of the weights, against a slow loop of its formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captune.models import CLIPModel
from captune.training.average import MovingAverage


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


def test_what_is_frozen_is_not_touched_until_it_trains(model: CLIPModel) -> None:
    """It would cost a pass over all weights in each step, for the same numbers."""
    model.image_encoder.requires_grad_(False).eval()
    average = MovingAverage(model, decay=0.999)
    everything = [*average.model.image_encoder.parameters(), *average.model.image_encoder.buffers()]
    versions = [tensor._version for tensor in everything]
    for step in range(3):
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter += 1
        average.update(model, step)
    assert [tensor._version for tensor in everything] == versions
    head = zip(average.model.head.parameters(), model.head.parameters(), strict=True)
    assert all(not torch.equal(one, other) for one, other in head)
    model.image_encoder.requires_grad_(True).train()
    average.update(model, 3)
    assert all(t._version > v for t, v in zip(everything, versions, strict=True))


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
