"""How training photos are varied: crop, flip and RandAugment here, colours on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from captune.data.pixels import CROP_SCALE, Pixels, flipped, random_crop
from captune.device import send
from captune.errors import CaptuneError

OPERATIONS_EACH = 2  # N of RandAugment
LARGEST_MAGNITUDE = 10
GREY = (128, 128, 128)
COLOUR_STREAM = 3  # sets the generator of the colours apart from the one of captions and crops
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode L


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for a training photo before it is pixels; all of it decided by a generator.

    Args:
        crop_scale: the least share of the area that a crop keeps, above 0 to 1.
        rand_augment: magnitude, 0 to 10, of two random operations (Cubuk et al. 2020); 0: none.
        flip: mirror half of the photos.

    Raises:
        CaptuneError: a value out of its range.
    """

    crop_scale: float = CROP_SCALE[0]
    rand_augment: int = 0
    flip: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale <= 1:
            raise CaptuneError(f"crop_scale is above 0 and at most 1, found {self.crop_scale}")
        if not 0 <= self.rand_augment <= LARGEST_MAGNITUDE:
            raise CaptuneError(f"rand_augment is 0 to {LARGEST_MAGNITUDE}: {self.rand_augment}")

    def least_side(self, size: int) -> int:
        """The ``least_side`` to decode with, so that small crops are not blown up from a
        thumbnail: crops of half the area and more need no more than the plain ``size``."""
        return round(size * max(1.0, math.sqrt(CROP_SCALE[0] / self.crop_scale)))

    def apply(
        self, image: Image.Image, size: int, rng: np.random.Generator, *, flip_allowed: bool
    ) -> Pixels:
        """A random crop, mirrored half of the time, and what RandAugment makes of it.

        Args:
            image: RGB.
            size: S.
            rng: advanced by the crop's draws, the flip's, then those of RandAugment: so none of
                ``flip``, ``flip_allowed`` and ``rand_augment`` changes which crop is drawn.
            flip_allowed: False where a mirrored picture would make its captions lie.

        Returns:
            ``(3, S, S)`` uint8 RGB.
        """
        pixels = random_crop(image, size, rng, scale=(self.crop_scale, CROP_SCALE[1]))
        if rng.random() < 0.5 and self.flip and flip_allowed:
            pixels = flipped(pixels)
        if self.rand_augment == 0:
            return pixels
        square = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        square = rand_augment(square, self.rand_augment, rng)
        return np.ascontiguousarray(np.asarray(square, dtype=np.uint8).transpose(2, 0, 1))


# -- RandAugment ------------------------------------------------------------------------------
def rand_augment(image: Image.Image, magnitude: int, rng: np.random.Generator) -> Image.Image:
    """Two random operations of :data:`OPERATIONS`, one after the other: Cubuk et al. 2020.

    Args:
        image: RGB.
        magnitude: M, 0 to 10, one for all operations.
        rng: gives each operation and its sign.

    Returns:
        RGB of the same size; what is moved in from outside is grey.
    """
    names = list(OPERATIONS)
    for _ in range(OPERATIONS_EACH):
        name = names[int(rng.integers(len(names)))]
        # Drawn even where it is not used: each operation costs the same draws.
        sign = -1.0 if rng.random() < 0.5 else 1.0
        image = OPERATIONS[name](image, sign * magnitude / LARGEST_MAGNITUDE)
    return image


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """The picture whose point ``(x, y)`` is the given one's ``(ax + by + c, dx + ey + f)``."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY
    )


def _rotate(image: Image.Image, level: float) -> Image.Image:
    return image.rotate(30 * level, Image.Resampling.BILINEAR, fillcolor=GREY)


def _shear_x(image: Image.Image, level: float) -> Image.Image:
    by = 0.3 * level
    return _affine(image, 1, by, -by * image.height / 2, 0, 1, 0)  # the middle row stays


def _shear_y(image: Image.Image, level: float) -> Image.Image:
    by = 0.3 * level
    return _affine(image, 1, 0, 0, by, 1, -by * image.width / 2)


def _translate_x(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, 1, 0, 0.45 * level * image.width, 0, 1, 0)


def _translate_y(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, 0.45 * level * image.height)


def _solarize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.solarize(image, round(256 * (1 - abs(level))))


def _posterize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(4 * abs(level)))


Operation = Callable[[Image.Image, float], Image.Image]
"""RGB and a level in -1..1 to RGB of the same size."""

# The operations of the paper with the ranges of AutoAugment (Cubuk et al. 2019, table 6), which
# it takes over; an enhancement's factor is 1 where the level is 0, and 0.1 or 1.9 at its ends.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, level: image,
    "autocontrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "rotate": _rotate,
    "solarize": _solarize,
    "posterize": _posterize,
    "colour": lambda image, level: ImageEnhance.Color(image).enhance(1 + 0.9 * level),
    "contrast": lambda image, level: ImageEnhance.Contrast(image).enhance(1 + 0.9 * level),
    "brightness": lambda image, level: ImageEnhance.Brightness(image).enhance(1 + 0.9 * level),
    "sharpness": lambda image, level: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * level),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}


# -- colours, a batch at a time -----------------------------------------------------------------
def colour_factors(
    image_ids: npt.NDArray[np.int64], seed: int, epoch: int, strength: float
) -> Tensor:
    """Factors of brightness, contrast and saturation, each from its image's own generator.

    Args:
        image_ids: ``(B,)``; a row of the result depends on its id, not on the others.
        seed, epoch: of the draw.
        strength: s; factors are uniform in ``[max(0, 1 - s), 1 + s]``.

    Returns:
        ``(B, 3)`` fp32 on the CPU.
    """
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = np.empty((len(image_ids), 3), dtype=np.float32)
    for row, image_id in enumerate(image_ids):
        rng = np.random.default_rng([seed, epoch, int(image_id), COLOUR_STREAM])
        factors[row] = rng.uniform(low, high, 3)
    return torch.from_numpy(factors)


@torch.no_grad()
def jitter_colours(pixels: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation scaled, in this order (Howard 2013; Chen et al. 2020).

    It runs on the device where the pixels are, a batch at a time: on a GPU it costs next to
    nothing, while the processes that decode are often what a training waits for.

    Args:
        pixels: ``(B, 3, S, S)`` RGB, uint8 or float in 0..1.
        factors: ``(B, 3)`` of brightness, of contrast about the image's mean grey, of saturation
            about each pixel's grey; 1 leaves as it is.

    Returns:
        ``(B, 3, S, S)`` of the same dtype: each step clamped to the range, uint8 rounded at the
        end.
    """
    factors = send(factors.float(), pixels.device)
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1)
    weights = send(torch.tensor(LUMA), pixels.device)[:, None, None]  # (3, 1, 1)
    top = 255 if pixels.dtype == torch.uint8 else 1
    image = (pixels.float() * brightness).clamp_(0, top)
    mean = (image * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)  # (B, 1, 1, 1)
    image = torch.lerp(mean, image, contrast).clamp_(0, top)
    grey = (image * weights).sum(1, keepdim=True)  # (B, 1, S, S)
    image = torch.lerp(grey, image, saturation).clamp_(0, top)
    return (image.round_() if top == 255 else image).to(pixels.dtype)
