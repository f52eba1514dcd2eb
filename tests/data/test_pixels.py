"""Decoding and cropping: upright RGB, the right square, and errors instead of zeros."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from captune.data import pixels as pixels_module
from captune.data.pixels import (
    UnreadableImageError,
    flipped,
    image_batches,
    load_image,
    random_crop,
    resize_and_crop,
)


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (100, 40), (40, 100), (3, 200), (64, 65)])
def test_the_square_is_the_middle_of_the_picture(size: tuple[int, int]) -> None:
    pixels = resize_and_crop(gradient(*size), 64)
    assert pixels.shape == (3, 64, 64) and pixels.dtype == np.uint8
    assert abs(float(pixels[0].mean()) - 127.5) < 3 and abs(float(pixels[1].mean()) - 127.5) < 3


def test_the_shorter_side_is_kept_whole() -> None:
    pixels = resize_and_crop(gradient(200, 100), 50)
    assert pixels[1, 0].mean() < 5 and pixels[1, -1].mean() > 250  # all of the height
    assert 55 < pixels[0, :, 0].mean() < 72  # a quarter of the width is cut on the left


def test_orientation_of_the_camera_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), "white")
    image.paste("red", (0, 0, 5, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    turned = load_image(tmp_path / "a.png")
    assert turned.size == (10, 20)
    assert turned.getpixel((5, 1)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_photo_is_the_copy_turned_upright(
    tmp_path: Path, mode: str, orientation: int | None
) -> None:
    """No photo is copied that is upright and RGB already; a picture at hand is left as it is."""
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    picture = gradient(24, 16).convert(mode)
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "a.jpg") as opened:
        slow = ImageOps.exif_transpose(opened).convert("RGB")
        before = opened.copy()
        (given,) = image_batches([opened], 16, 1)
        assert opened.size == before.size and opened.tobytes() == before.tobytes()
    found = load_image(tmp_path / "a.jpg")
    assert found.mode == "RGB" and found.size == slow.size
    assert found.tobytes() == slow.tobytes()
    assert np.array_equal(given[0].numpy(), resize_and_crop(slow, 16))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path: Path, mode: str) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    (clear if mode == "RGBA" else clear.convert(mode)).save(
        tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {})
    )
    assert load_image(tmp_path / "a.png").getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "CMYK", "I;16", "1"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (8, 8)).save(path)
    assert load_image(path).mode == "RGB"


def test_reduced_decoding_shows_the_same_picture(tmp_path: Path) -> None:
    gradient(1600, 1200).save(tmp_path / "a.jpg", quality=95)
    full = resize_and_crop(load_image(tmp_path / "a.jpg"), 64).astype(int)
    reduced_image = load_image(tmp_path / "a.jpg", least_side=64)
    assert reduced_image.size[0] < 1600
    assert np.abs(resize_and_crop(reduced_image, 64).astype(int) - full).max() <= 6


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0 broken"])
def test_broken_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"bad\.jpg"):
        load_image(tmp_path / "bad.jpg")


def test_truncated_and_missing_files_are_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    gradient(300, 300).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    for name in ("cut.jpg", "missing.jpg"):
        with pytest.raises(UnreadableImageError, match=name):
            load_image(tmp_path / name)


def test_the_error_crosses_process_borders() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImageError("a.jpg", "cut off")))
    assert (error.path, error.reason, str(error)) == ("a.jpg", "cut off", "a.jpg: cut off")


def test_random_crops_are_parts_of_the_picture_decided_by_the_generator() -> None:
    image = gradient(120, 90)
    crops = [random_crop(image, 32, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(crops[0], crops[1]) and not np.array_equal(crops[0], crops[2])
    for crop in crops:
        assert crop.shape == (3, 32, 32)
        assert np.all(np.diff(crop[0].mean(axis=0)) > 0)  # still left to right
        width = crop[0, :, -1].mean() - crop[0, :, 0].mean()
        assert width > 0.4 * 255  # at least half of the area


def test_flip_exchanges_left_and_right() -> None:
    pixels = resize_and_crop(gradient(32, 32), 32)
    assert np.array_equal(flipped(pixels)[0, 0], pixels[0, 0][::-1])
    assert np.array_equal(flipped(flipped(pixels)), pixels)


def test_more_pixels_than_a_photo_has_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    Image.new("L", (400, 300)).save(path)
    monkeypatch.setattr(pixels_module, "LARGEST_OWN", 400 * 300 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UnreadableImageError, match="megapixels: 400 x 300"):
        load_image(path)
