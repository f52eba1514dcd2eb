"""Heat maps: they peak where the answer is known to lie, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from captune.encoders.image import Features
from captune.errors import CaptuneError
from captune.evaluation.explain import HeatMap, explain_image
from captune.models import CLIPModel
from captune.preprocess import Preprocess

SIDE = 32


class ColourText:
    """“red” is one axis of the space, “green” the next, anything else the third."""

    name, dimension, fingerprint = "colours", 3, "1"

    def encode(self, texts: Sequence[str]) -> Tensor:
        axes = {"red": 0, "green": 1}
        return F.one_hot(torch.tensor([axes.get(text, 2) for text in texts]), 3).float()


class ColourTower(nn.Module):
    """Its map is the picture in squares of 8 pixels: channels are red, green and blue, doubled."""

    name = "colours"
    feature_dim = 8
    preprocess = Preprocess(SIDE, (0.0,) * 3, (1.0,) * 3)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, pixels: Tensor) -> Features:
        small = F.avg_pool2d(pixels, 8) * self.scale  # (N, 3, 4, 4)
        feature_map = torch.cat([small, small, small[:, :2]], 1)  # (N, 8, 4, 4)
        return Features(feature_map.mean((2, 3)), feature_map)

    def description(self) -> dict[str, Any]:
        return {"kind": "own", "name": self.name}


class FirstThree(nn.Module):
    """The head: channels red, green and blue as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(8, 3, bias=False)
        with torch.no_grad():
            self.output.weight.copy_(torch.eye(3, 8))

    def forward(self, pooled: Tensor) -> Tensor:
        return self.output(pooled)  # type: ignore[no-any-return]


def colour_model(*, attention: bool = False) -> CLIPModel:
    tower = ColourTower()
    model = CLIPModel(ColourText(), image_encoder=tower, use_attention_pooling=attention)
    model.head = FirstThree()
    return model.eval()


@pytest.fixture
def corners() -> Image.Image:
    """Black, with red in the upper left corner and green in the lower right one."""
    image = Image.new("RGB", (SIDE, SIDE))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    image.paste((0, 255, 0), (24, 24, 32, 32))
    return image


def peak(heat: HeatMap) -> tuple[int, int]:
    row, column = np.unravel_index(heat.values.argmax(), heat.values.shape)
    return int(row), int(column)


@pytest.mark.parametrize("method", ["occlusion", "gradient"])
def test_the_map_peaks_where_the_query_is(corners: Image.Image, method: str) -> None:
    model = colour_model()
    red, green = (explain_image(model, corners, query, method=method) for query in ("red", "green"))
    assert max(peak(red)) < 8 and min(peak(green)) >= 24
    assert red.values[24:, 24:].max() == 0 == green.values[:8, :8].max()


def test_occlusion_is_the_fall_of_the_similarity_window_by_window(
    tiny_resnet: Path, tiny_sentence: Path
) -> None:
    torch.manual_seed(6)
    model = CLIPModel(str(tiny_sentence), image_encoder=str(tiny_resnet), hidden_dim=24).eval()
    pixels = torch.rand(3, SIDE, SIDE)
    text = model.encode_text("a cat")[0]
    whole = model.encode_image(pixels, precision="fp32")[0] @ text
    falls = torch.zeros(8, 8)
    for row in range(8):
        for column in range(8):
            covered = pixels.clone()
            # Cells of 4 pixels, windows of 8 around them.
            for y in range(4 * row - 2, 4 * row + 6):
                for x in range(4 * column - 2, 4 * column + 6):
                    if 0 <= y < SIDE and 0 <= x < SIDE:
                        covered[:, y, x] = pixels.mean((1, 2))
            falls[row, column] = whole - model.encode_image(covered, precision="fp32")[0] @ text
    wide = F.interpolate(falls.clamp(min=0)[None, None], size=(SIDE, SIDE), mode="bilinear")[0, 0]
    heat = explain_image(model, pixels, "a cat")
    assert heat.method == "occlusion" and falls.max() > 0
    assert np.allclose(heat.values, (wide / wide.max()).numpy(), atol=1e-3)


def test_it_holds_values_score_picture_and_method(corners: Image.Image) -> None:
    heat = explain_image(colour_model(), corners, "red")
    assert heat.values.shape == (SIDE, SIDE) and heat.values.dtype == np.float32
    assert heat.values.min() == 0 and heat.values.max() == 1
    assert heat.picture.dtype == np.uint8
    assert np.array_equal(heat.picture, np.asarray(corners))
    assert heat.score == pytest.approx(2**-0.5, abs=1e-5)
    assert (heat.query, heat.method) == ("red", "occlusion")


def test_where_nothing_speaks_for_the_query_the_map_is_empty(corners: Image.Image) -> None:
    heat = explain_image(colour_model(), corners, "blue", method="gradient")
    assert not heat.values.any() and heat.score == pytest.approx(0, abs=1e-6)


def test_a_path_a_picture_and_a_tensor_give_the_same(corners: Image.Image, tmp_path: Path) -> None:
    corners.save(tmp_path / "corners.png")
    pixels = torch.from_numpy(np.array(corners)).permute(2, 0, 1)
    model = colour_model()
    wanted = explain_image(model, corners, "red")
    for image in (tmp_path / "corners.png", pixels, pixels / 255):
        found = explain_image(model, image, "red")
        assert np.allclose(found.values, wanted.values, atol=1e-6)
        assert np.array_equal(found.picture, wanted.picture)


def slow_grad_cam(model: CLIPModel, pixels: Tensor, text: Tensor) -> Tensor:
    """Grad-CAM by finite differences, a place and a channel at a time."""

    def score(feature_map: Tensor) -> float:
        pooled = feature_map.mean((2, 3)) if model.pooling is None else model.pooling(feature_map)
        return float(model.head(pooled)[0] @ text)

    step = 1e-4
    with torch.no_grad():
        seen = model.image_encoder((pixels - model.mean) / model.std).map  # (1, C, h, w)
        _, channels, h, w = seen.shape
        heat = torch.zeros(h, w, dtype=seen.dtype)
        for channel in range(channels):
            slope = 0.0
            for row in range(h):
                for column in range(w):
                    shifted = seen.clone()
                    shifted[0, channel, row, column] += step
                    up = score(shifted)
                    shifted[0, channel, row, column] -= 2 * step
                    slope += (up - score(shifted)) / (2 * step)
            heat += slope / (h * w) * seen[0, channel]
    return heat.clamp(min=0)


@pytest.mark.parametrize("attention", [False, True])
def test_gradients_agree_with_finite_differences(
    tiny_resnet: Path, tiny_sentence: Path, attention: bool
) -> None:
    torch.manual_seed(5)
    model = CLIPModel(
        str(tiny_sentence),
        image_encoder=str(tiny_resnet),
        use_attention_pooling=attention,
        hidden_dim=24,
    ).eval()
    if model.pooling is not None:
        nn.init.normal_(model.pooling.score.weight)
    pixels = torch.rand(1, 3, SIDE, SIDE)
    heat = explain_image(model, pixels[0], "a cat", method="gradient")
    text = model.encode_text("a cat")[0].double()
    slow = slow_grad_cam(model.double(), pixels.double(), text)
    assert slow.max() > 0
    wide = F.interpolate(slow[None, None], size=(SIDE, SIDE), mode="bilinear")[0, 0]
    assert np.allclose(heat.values, (wide / wide.max()).numpy(), atol=2e-3)


def test_a_class_token_is_explained_by_the_last_patches_that_reach_it(tiny_clip: Path) -> None:
    model = CLIPModel.zero_shot(str(tiny_clip))
    torch.manual_seed(3)
    pixels = torch.rand(3, SIDE, SIDE)
    cat, dog = (explain_image(model, pixels, q, method="gradient") for q in ("a cat", "a dog"))
    assert cat.values.max() == 1 == dog.values.max()
    assert not np.allclose(cat.values, dog.values)
    similarity = model.encode_image(pixels, precision="fp32") @ model.encode_text("a cat").T
    assert cat.score == pytest.approx(float(similarity), abs=1e-5)


def test_attention_shows_where_the_heads_that_speak_for_the_query_look(
    corners: Image.Image,
) -> None:
    model = colour_model(attention=True)
    assert model.pooling is not None
    with torch.no_grad():
        # Heads have a channel each: the red one looks for red, the green one for green.
        model.pooling.score.weight[0, 0] = 20
        model.pooling.score.weight[1, 1] = 20
    red, green = (explain_image(model, corners, q, method="attention") for q in ("red", "green"))
    assert max(peak(red)) < 8 and min(peak(green)) >= 24
    assert red.method == "attention"


def test_untrained_attention_looks_everywhere_alike(corners: Image.Image) -> None:
    heat = explain_image(colour_model(attention=True), corners, "red", method="attention")
    assert heat.values.min() == pytest.approx(1)


@pytest.mark.parametrize("method", ["occlusion", "gradient"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(
    tiny_resnet: Path, tiny_sentence: Path, training: bool, method: str, corners: Image.Image
) -> None:
    model = CLIPModel(str(tiny_sentence), image_encoder=str(tiny_resnet), use_batch_norm=True)
    model.train(training)
    model.head.eval()  # a part in a mode of its own
    marked = next(model.parameters())
    marked.grad = torch.full_like(marked, 7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    with torch.no_grad():
        explain_image(model, corners, "a cat", method=method)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert marked.grad is not None and bool((marked.grad == 7).all())
    assert all(p.grad is None for p in model.parameters() if p is not marked)
    assert not any(part._forward_hooks for part in model.modules())


def test_a_frozen_model_is_explained_too(corners: Image.Image) -> None:
    model = colour_model().requires_grad_(False)
    assert max(peak(explain_image(model, corners, "red", method="gradient"))) < 8


def test_a_tower_whose_map_reaches_nothing_says_so(corners: Image.Image) -> None:
    class Blind(ColourTower):
        def forward(self, pixels: Tensor) -> Features:
            pooled, feature_map = super().forward(pixels)
            return Features(pooled, feature_map.clone())

    model = CLIPModel(ColourText(), image_encoder=Blind()).eval()
    with pytest.raises(CaptuneError, match="no map of 4x4 places"):
        explain_image(model, corners, "red", method="gradient")


def test_wrong_questions_are_one_clear_line(corners: Image.Image) -> None:
    model = colour_model()
    with pytest.raises(CaptuneError, match="empty query"):
        explain_image(model, corners, "  ")
    with pytest.raises(CaptuneError, match="did you mean 'gradient'"):
        explain_image(model, corners, "red", method="gradients")
    with pytest.raises(CaptuneError, match="use_attention_pooling"):
        explain_image(model, corners, "red", method="attention")
