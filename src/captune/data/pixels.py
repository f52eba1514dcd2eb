"""From a file to uint8 RGB pixels: decode, orient, resize, crop. Normalising is the model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from captune.data.photos import LARGEST_OWN, open_photo, to_rgb
from captune.errors import CaptuneError

ImageLike = str | Path | Image.Image
Images = ImageLike | Tensor | Sequence[ImageLike]
"""One picture or several; a tensor is ``(N, 3, H, W)`` or ``(3, H, W)`` RGB."""

Pixels = npt.NDArray[np.uint8]
"""``(3, S, S)`` RGB."""

CROP_SCALE = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)


class UnreadableImageError(Exception):
    """A file that is no image, or a broken one. Counted and skipped, never replaced."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableImageError], tuple[str, str]]:
        # It travels from loader processes, and an exception is rebuilt from these arguments.
        return type(self), (self.path, self.reason)


def load_image(path: Path | str, *, least_side: int = 0) -> Image.Image:
    """Decode a file as upright RGB; transparency is laid on white.

    Args:
        path: of any format that Pillow reads, or a photo in a shard (``train-00000.arrow::12``).
        least_side: where above 0, a JPEG may be decoded at a fraction of its size, both sides of
            the result staying at twice this or more: large photos then cost a fraction.

    Raises:
        UnreadableImageError: no such file, not an image, truncated, or absurdly large.
    """
    try:
        return open_photo(Path(path), least_side=least_side, largest=LARGEST_OWN, formats=None)
    # Pillow's decoders raise far more than OSError on broken files (SyntaxError, ValueError, …).
    except Exception as error:
        raise UnreadableImageError(path, str(error) or type(error).__name__) from None


def decode_image(content: bytes, name: str, *, least_side: int = 0) -> Image.Image:
    """Decode a photo at hand, called ``name`` in an error, as :func:`load_image` does a file.

    It may come from anywhere: formats that start a program and absurd sizes are refused.

    Raises:
        UnreadableImageError: not an image, truncated, or absurdly large.
    """
    try:
        return open_photo(content, least_side=least_side)
    except Exception as error:
        raise UnreadableImageError(name, str(error) or type(error).__name__) from None


def resize_and_crop(image: Image.Image, size: int) -> Pixels:
    """Shorter side to ``size`` (bicubic, antialiased), then the centre square.

    Returns:
        ``(3, size, size)`` uint8 RGB.
    """
    width, height = image.size
    scale = size / min(width, height)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    if target != image.size:
        image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    return _channels_first(image.crop((left, top, left + size, top + size)))


def random_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = CROP_SCALE,
) -> Pixels:
    """A random part of the area, of a random shape, resized to a square (bicubic, antialiased).

    Szegedy et al. 2015 (Inception crops), by default with a milder range that keeps what captions
    speak of: half to all of the area. Torch resizes, in a quarter of Pillow's time; a few in a
    hundred of a photo's bytes differ from Pillow's by 1. What is evaluated, and compared with what
    others have published, is resized by Pillow.

    Args:
        image: RGB.
        size: S.
        rng: advanced by the draws, which do not depend on ``size``.
        scale: the least and the largest share of the area.

    Returns:
        ``(3, size, size)`` uint8 RGB.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = np.exp(rng.uniform(np.log(CROP_RATIO[0]), np.log(CROP_RATIO[1])))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            box = (int(left), int(top), int(left) + w, int(top) + h)
            return _to_square(image.crop(box), size)
    return resize_and_crop(image, size)


def _to_square(image: Image.Image, size: int) -> Pixels:
    """All of the picture, whatever its shape."""
    # (3, H, W), but each pixel's bytes side by side: torch is fastest with those.
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    square = F.interpolate(whole[None], size=(size, size), mode="bicubic", antialias=True)[0]
    return np.ascontiguousarray(square.numpy())


def flipped(pixels: Pixels) -> Pixels:
    """Left and right exchanged; ``(3, S, S)`` in and out."""
    return np.ascontiguousarray(pixels[:, :, ::-1])


def stacked(pixels: Sequence[Tensor]) -> Tensor:
    """Photos ``(3, S, S)`` as a batch ``(n, 3, S, S)`` uint8; n may be 0.

    One tensor for a batch: each that comes from a loader process is an open file.
    """
    return torch.stack(list(pixels)) if pixels else torch.empty(0, 3, 1, 1, dtype=torch.uint8)


def image_batches(images: Images, size: int, batch_size: int) -> Iterator[Tensor]:
    """Pictures of any kind as batches ``(n, 3, size, size)``, uint8 or float in 0..1.

    Raises:
        UnreadableImageError: a path that is no readable image.
        CaptuneError: a tensor of another form.
    """
    if isinstance(images, Tensor):
        whole = images[None] if images.dim() == 3 else images
        if whole.dim() != 4 or whole.shape[1] != 3:
            raise CaptuneError(f"images must be (N, 3, H, W) RGB, found {tuple(images.shape)}")
        if whole.dtype != torch.uint8 and not whole.is_floating_point():
            raise CaptuneError(f"image tensors are uint8 or float in 0..1, not {whole.dtype}")
        for batch in torch.split(whole, batch_size):
            yield batch if batch.shape[-2:] == (size, size) else _resize_tensor(batch, size)
        return
    several = [images] if isinstance(images, str | Path | Image.Image) else images
    for start in range(0, len(several), batch_size):
        pictures = (
            to_rgb(item) if isinstance(item, Image.Image) else load_image(item, least_side=size)
            for item in several[start : start + batch_size]
        )
        yield torch.stack([torch.from_numpy(resize_and_crop(p, size)) for p in pictures])


def _resize_tensor(batch: Tensor, size: int) -> Tensor:
    """Shorter side to ``size``, antialiased bicubic, then the centre square; dtype kept."""
    height, width = batch.shape[-2:]
    scale = size / min(height, width)
    target = (max(size, round(height * scale)), max(size, round(width * scale)))
    resized = F.interpolate(
        batch.float(), size=target, mode="bicubic", antialias=True, align_corners=False
    )
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    square = resized[..., top : top + size, left : left + size]
    if batch.dtype == torch.uint8:
        return square.round().clamp(0, 255).to(torch.uint8)
    return square.clamp(0, 1)


def _channels_first(image: Image.Image) -> Pixels:
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
