"""Crop share, RandAugment and colours: each a function of its generator alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captune.data.augment import (
    OPERATIONS,
    Augmentation,
    colour_factors,
    jitter_colours,
    rand_augment,
)
from captune.data.dataset import COCOClipDataset, DrawKey, draw_caption, draw_generator
from captune.data.pixels import Pixels, load_image, random_crop, resize_and_crop
from captune.data.table import CaptionTable
from captune.errors import CaptuneError


def picture(side: int = 40) -> Image.Image:
    noise = np.random.default_rng(0).integers(30, 200, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 0 * down], -1).round().astype(np.uint8))


def crop_and_flip_of_before(image: Image.Image, size: int, rng: np.random.Generator) -> Pixels:
    """What the dataset did before its augmentation had values, resized by Pillow."""
    width, height = image.size
    pixels = None
    for _ in range(10):
        area = width * height * rng.uniform(0.5, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            box = (int(left), int(top), int(left) + w, int(top) + h)
            resized = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
            pixels = np.asarray(resized).transpose(2, 0, 1)
            break
    if pixels is None:
        pixels = resize_and_crop(image, size)
    return pixels[:, :, ::-1] if rng.random() < 0.5 else pixels


@pytest.mark.parametrize("size", [31, 112, 224])
@pytest.mark.parametrize("shape", [(640, 480), (333, 500), (91, 60)])
def test_crops_are_resized_as_pillow_resizes(shape: tuple[int, int], size: int) -> None:
    width, height = shape
    noise = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    photo = Image.fromarray(noise).resize(shape, Image.Resampling.BICUBIC)
    for seed in range(8):
        found = Augmentation().apply(photo, size, np.random.default_rng(seed), flip_allowed=True)
        pillow = crop_and_flip_of_before(photo, size, np.random.default_rng(seed))
        off = np.abs(found.astype(int) - pillow)
        assert off.mean() < 0.3 and np.mean(off <= 1) > 0.999


@pytest.mark.parametrize("augment", [True, Augmentation(), Augmentation(0.5, 0)])
def test_the_defaults_draw_the_crops_of_before(coco: Path, augment: bool | Augmentation) -> None:
    dataset = COCOClipDataset("train", coco, image_size=16, augment=augment)
    for row in range(len(dataset)):
        key = DrawKey(row, 3, 7)
        rng = draw_generator(dataset.table, key)
        caption_row = draw_caption(dataset.table, row, rng)
        image = load_image(dataset.table.path(row), least_side=16)
        expected = crop_and_flip_of_before(image, 16, rng)
        sample = dataset[key]
        assert sample.caption_row == caption_row
        off = np.abs(sample.pixels.numpy().astype(int) - expected)
        assert off.max() <= 2 and off.mean() < 0.1


@pytest.mark.parametrize("least", [0.1, 0.5, 0.9])
def test_crops_keep_at_least_the_share_asked_for(least: float) -> None:
    image = ramp(200, 200)
    shares = []
    for seed in range(200):
        crop = random_crop(image, 64, np.random.default_rng(seed), scale=(least, 1.0)) / 255
        # The ramp's slope inside the crop tells its width and height.
        across = (crop[0, :, -1].mean() - crop[0, :, 0].mean()) * 64 / 63
        down = (crop[1, -1].mean() - crop[1, 0].mean()) * 64 / 63
        shares.append(across * down)
    assert least - 0.04 < min(shares) < least + 0.1
    assert max(shares) <= 1.05


def test_the_share_reaches_the_crop_and_small_crops_are_decoded_larger() -> None:
    image = ramp(200, 150)
    pixels = Augmentation(0.08).apply(image, 32, np.random.default_rng(4), flip_allowed=False)
    expected = random_crop(image, 32, np.random.default_rng(4), scale=(0.08, 1.0))
    assert np.array_equal(pixels, expected)
    assert [Augmentation(s).least_side(224) for s in (1.0, 0.5, 0.125)] == [224, 224, 448]


def test_without_flips_the_same_crops_are_never_mirrored() -> None:
    turned = 0
    for seed in range(40):
        rngs = [np.random.default_rng(seed) for _ in range(3)]
        as_drawn, plain, crop = (
            Augmentation(rand_augment=0).apply(ramp(64, 64), 32, rngs[0], flip_allowed=True),
            Augmentation(flip=False).apply(ramp(64, 64), 32, rngs[1], flip_allowed=True),
            random_crop(ramp(64, 64), 32, rngs[2], scale=(0.5, 1.0)),
        )
        assert np.array_equal(plain, crop)
        assert rngs[0].random() == rngs[1].random()  # RandAugment's draws stay the same
        turned += not np.array_equal(as_drawn, crop)
    assert 8 < turned < 32


@pytest.mark.parametrize("values", [(0.0, 0), (1.1, 0), (0.5, -1), (0.5, 11)])
def test_values_out_of_range_are_refused(values: tuple[float, int]) -> None:
    with pytest.raises(CaptuneError, match=r"crop_scale|rand_augment"):
        Augmentation(*values)


# -- RandAugment --------------------------------------------------------------------------------
def test_rand_augment_is_decided_by_the_generator() -> None:
    drawn = [
        Augmentation(0.5, 9).apply(picture(), 32, np.random.default_rng(seed), flip_allowed=True)
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    assert drawn[0].shape == (3, 32, 32) and drawn[0].dtype == np.uint8
    assert drawn[0].flags.c_contiguous


def test_magnitude_0_draws_nothing_and_others_leave_crop_and_flip() -> None:
    off, on = np.random.default_rng(5), np.random.default_rng(5)
    Augmentation(0.5, 0).apply(picture(), 32, off, flip_allowed=True)
    crop_and_flip_of_before(picture(), 32, on)
    assert off.bit_generator.state == on.bit_generator.state
    varied = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        plain = Augmentation().apply(picture(), 32, rng, flip_allowed=True)
        square = Image.fromarray(np.ascontiguousarray(plain.transpose(1, 2, 0)))
        expected = np.asarray(rand_augment(square, 7, rng)).transpose(2, 0, 1)
        rng = np.random.default_rng(seed)
        found = Augmentation(rand_augment=7).apply(picture(), 32, rng, flip_allowed=True)
        assert np.array_equal(found, expected)
        varied += not np.array_equal(found, plain)
    assert varied > 50


def test_every_operation_is_reached_with_both_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def noting(name: str) -> object:
        def operation(image: Image.Image, level: float) -> Image.Image:
            seen.add((name, level))
            return image

        return operation

    for name in list(OPERATIONS):
        monkeypatch.setitem(OPERATIONS, name, noting(name))
    rng = np.random.default_rng(0)
    for _ in range(300):
        rand_augment(picture(), 4, rng)
    assert seen == {(name, level) for name in OPERATIONS for level in (-0.4, 0.4)}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_an_operation_gives_rgb_of_the_same_size(name: str) -> None:
    image = picture()
    for level in (-1.0, -0.1, 0.1, 1.0):
        result = OPERATIONS[name](image, level)
        assert (result.mode, result.size) == ("RGB", (40, 40))
    changed = not np.array_equal(np.asarray(OPERATIONS[name](image, 1.0)), np.asarray(image))
    assert changed == (name != "identity")


@pytest.mark.parametrize(
    "name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y", "colour", "contrast"]
)
def test_signed_operations_differ_by_sign_and_rest_at_level_0(name: str) -> None:
    image = picture()
    there, back, rest = (np.asarray(OPERATIONS[name](image, level)) for level in (0.8, -0.8, 0.0))
    assert not np.array_equal(there, back)
    assert np.array_equal(rest, np.asarray(image))


def test_what_moves_in_from_outside_is_grey() -> None:
    white = Image.new("RGB", (40, 40), "white")
    moved = np.asarray(OPERATIONS["translate_x"](white, 1.0))
    assert (moved[:, -17:] == 128).all() and (moved[:, :21] == 255).all()  # 0.45 of 40 is 18
    assert (np.asarray(OPERATIONS["rotate"](white, 1.0))[0, 0] == 128).all()


@pytest.mark.parametrize("magnitude", [0, 3])
def test_photos_whose_captions_name_a_side_are_never_mirrored(
    tmp_path: Path, magnitude: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ramp(48, 48).save(tmp_path / "a.png")
    images = [(n, f"{n}.png", tmp_path / "a.png") for n in (1, 2)]
    captions = [(1, "red on the right", 0), (2, "red and green", 1)]
    table = CaptionTable.build(images, captions, name="sides", split="train")
    dataset = COCOClipDataset(table=table, image_size=32, augment=Augmentation(0.3, magnitude))
    for name in ("solarize", "contrast"):  # they turn a ramp's brightness, not its sides
        monkeypatch.setitem(OPERATIONS, name, OPERATIONS["identity"])

    def mirrored(row: int) -> int:
        crops = (dataset[DrawKey(row, epoch, 0)].pixels.float() for epoch in range(60))
        middle = (crop[0, 8:24, 8:24] for crop in crops)
        return sum(bool(part[:, 0].mean() > part[:, -1].mean()) for part in middle)

    assert mirrored(0) == 0
    assert 15 < mirrored(1) < 45


# -- colours ------------------------------------------------------------------------------------
def jittered_slowly(image: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """``(3, S, S)`` uint8, pixel by pixel in plain numbers."""

    def clamp(value: float) -> float:
        return min(255.0, max(0.0, value))

    def grey(rgb: list[float]) -> float:
        return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]

    brightness, contrast, saturation = (float(f) for f in factors)
    side = image.shape[-1]
    places = [(y, x) for y in range(side) for x in range(side)]
    lit = {p: [clamp(float(v) * brightness) for v in image[:, *p]] for p in places}
    mean = sum(grey(rgb) for rgb in lit.values()) / len(places)
    out = np.empty(image.shape)
    for place, rgb in lit.items():
        rgb = [clamp(mean + contrast * (v - mean)) for v in rgb]
        own = grey(rgb)
        out[:, *place] = [clamp(own + saturation * (v - own)) for v in rgb]
    return out


def test_colours_are_those_of_a_loop_over_pixels() -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (6, 3, 9, 9), dtype=np.uint8)
    factors = rng.uniform(0, 2, (6, 3)).astype(np.float32)
    found = jitter_colours(torch.from_numpy(pixels), torch.from_numpy(factors))
    assert found.dtype == torch.uint8 and found.shape == (6, 3, 9, 9)
    for row in range(6):
        slow = jittered_slowly(pixels[row], factors[row])
        assert np.abs(found[row].numpy() - slow).max() <= 0.5 + 1e-3  # rounded once, at the end


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_colours_of_floats_stay_floats_in_0_to_1(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (4, 3, 7, 7), dtype=np.uint8)
    factors = rng.uniform(0, 2, (4, 3)).astype(np.float32)
    found = jitter_colours((torch.from_numpy(pixels) / 255).to(dtype), torch.from_numpy(factors))
    assert found.dtype == dtype and found.min() >= 0 and found.max() <= 1
    for row in range(4):
        slow = jittered_slowly(pixels[row], factors[row]) / 255
        assert np.abs(found[row].double().numpy() - slow).max() < 5e-3


def test_colours_are_pure_and_factors_of_one_change_nothing() -> None:
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    kept = pixels.clone()
    assert torch.equal(jitter_colours(pixels, torch.ones(4, 3)), pixels)
    grey = jitter_colours(pixels, torch.tensor([[1.0, 1.0, 0.0]]).expand(4, 3))
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
    assert not jitter_colours(pixels, torch.tensor([[0.0, 1.0, 1.0]]).expand(4, 3)).any()
    assert torch.equal(pixels, kept)


def test_an_image_s_colours_do_not_depend_on_its_batch() -> None:
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    ids = np.array([40, 7, 0, 99, 12])
    factors = colour_factors(ids, 1, 2, 0.4)
    together = jitter_colours(pixels, factors)
    order = [3, 0, 2]
    part = colour_factors(ids[order], 1, 2, 0.4)
    assert torch.equal(part, factors[order])
    assert torch.equal(jitter_colours(pixels[order], part), together[order])


def test_factors_belong_to_seed_epoch_and_image_within_the_strength() -> None:
    ids = np.arange(400)
    factors = colour_factors(ids, 0, 0, 0.4)
    assert factors.shape == (400, 3) and factors.dtype == torch.float32
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4
    assert torch.equal(factors, colour_factors(ids, 0, 0, 0.4))
    for seed, epoch in ((1, 0), (0, 1)):
        assert not (factors == colour_factors(ids, seed, epoch, 0.4)).any()
    assert torch.corrcoef(factors.T).fill_diagonal_(0).abs().max() < 0.2
    assert colour_factors(ids, 0, 0, 1.5).min() >= 0  # no negative light
    assert torch.equal(colour_factors(ids, 0, 0, 0.0), torch.ones(400, 3))
    assert colour_factors(ids[:0], 0, 0, 0.4).shape == (0, 3)
