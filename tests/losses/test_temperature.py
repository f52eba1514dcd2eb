"""A fixed temperature, a learnt one within its limits."""

from __future__ import annotations

import math

import pytest
import torch

from captune.config import LEARNT_TEMPERATURES, Config
from captune.errors import CaptuneError
from captune.losses import ContrastiveLoss, SigLIPLoss
from slow_losses import batch, slow_contrastive


@pytest.mark.parametrize("kind", [ContrastiveLoss, SigLIPLoss])
def test_a_learnt_temperature_has_a_gradient_and_stays_in_its_limits(
    kind: type[ContrastiveLoss] | type[SigLIPLoss],
) -> None:
    image, text, pairs = batch(0)
    for start, step, end in [(0.02, 50.0, 0.01), (0.3, -50.0, 0.5)]:
        loss = kind(temperature=start, learn_temperature=True)
        assert loss.temperature == pytest.approx(start, rel=1e-6)
        assert loss.log_scale is not None
        loss(image, text, pairs).backward()
        assert loss.log_scale.grad is not None and loss.log_scale.grad != 0
        with torch.no_grad():
            loss.log_scale += step
        assert loss.temperature == pytest.approx(end, rel=1e-6)
        loss.log_scale.grad = None
        found = loss(image, text, pairs)
        assert float(found) == pytest.approx(
            float(kind(temperature=end, learn_temperature=False)(image, text, pairs)), rel=1e-5
        )
        found.backward()  # at the limit too, or there would be no way back
        assert loss.log_scale.grad != 0


def test_the_gradient_of_the_temperature_is_right() -> None:
    image, text, pairs = batch(3)
    loss = ContrastiveLoss(temperature=0.2, learn_temperature=True, soft_targets=0.0)
    loss(image, text, pairs).backward()

    def value(log_scale: float) -> float:
        return float(sum(slow_contrastive(image, text, pairs, math.exp(-log_scale)))) / 2

    at = math.log(5)
    assert loss.log_scale is not None and loss.log_scale.grad is not None
    slope = (value(at + 1e-4) - value(at - 1e-4)) / 2e-4
    assert float(loss.log_scale.grad) == pytest.approx(slope, rel=1e-3)


def test_a_fixed_temperature_leaves_no_state() -> None:
    loss = ContrastiveLoss(temperature=0.1)
    assert not loss.state_dict() and not list(loss.parameters())
    assert loss.temperature == 0.1 and float(loss.logit_scale) == pytest.approx(10)


def test_the_state_brings_the_temperature_back() -> None:
    one, other = (ContrastiveLoss(temperature=t, learn_temperature=True) for t in (0.1, 0.3))
    other.load_state_dict(one.state_dict())
    assert other.temperature == one.temperature == pytest.approx(0.1)


@pytest.mark.parametrize("kind", [ContrastiveLoss, SigLIPLoss])
def test_a_loss_learns_from_just_the_temperatures_that_a_config_takes(
    kind: type[ContrastiveLoss] | type[SigLIPLoss],
) -> None:
    low, high = LEARNT_TEMPERATURES
    for inside in (low, high):
        assert kind(temperature=Config(temperature=inside).temperature, learn_temperature=True)
    for outside in (0.999 * low, 1.001 * high):
        with pytest.raises(CaptuneError, match="where it is learnt"):
            Config(temperature=outside)
        with pytest.raises(ValueError, match="must start between"):
            kind(temperature=outside, learn_temperature=True)
