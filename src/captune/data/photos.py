"""Photos decoded: upright RGB, and never more pixels than are meant. Torch is not needed here."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps

from captune.data.shards import photo_bytes, shard_of

LARGEST_OWN = 89_478_485  # pixels of a user's own photo: from here on Pillow warns of a bomb
# Pixels; the largest cameras' photos have about as many, and each takes up to 15 bytes to decode.
LARGEST_PIXELS = 50_000_000
# Others are rare, and some start a program: an EPS starts Ghostscript. JPEG stands for MPO, too.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def open_image(
    content: bytes | Path,
    *,
    largest: int | None = None,
    formats: tuple[str, ...] | None = FORMATS,
) -> Image.Image:
    """Read the head of a photo: its format and size. Nothing is decoded yet.

    Args:
        content: a file, or what is in it; or where in a shard it lies.
        largest: pixels; default :data:`LARGEST_PIXELS`.
        formats: those that are taken for photos; None: all that Pillow reads.

    Raises:
        Exception: whatever Pillow raises on what is no photo, or one of more pixels.
    """
    largest = largest or LARGEST_PIXELS
    if isinstance(content, Path) and shard_of(content):
        content, formats = photo_bytes(content), ("JPEG",)  # none other is ever packed
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        image = Image.open(source, formats=formats)
    # Pillow has limits of its own, above these.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"more than {largest // 1_000_000} megapixels") from None
    if image.width * image.height > largest:
        image.close()
        raise ValueError(
            f"more than {largest // 1_000_000} megapixels: {image.width} x {image.height}"
        )
    return image


def open_photo(
    content: bytes | Path,
    *,
    least_side: int = 0,
    largest: int | None = None,
    formats: tuple[str, ...] | None = FORMATS,
) -> Image.Image:
    """Decode a photo as upright RGB; transparency is laid on white.

    Args:
        content, largest, formats: as for :func:`open_image`.
        least_side: where above 0, a JPEG may be decoded at a fraction of its size, both sides
            staying at twice this or more: large photos then cost a fraction.

    Raises:
        Exception: as :func:`open_image`, or whatever Pillow's decoders raise on what is broken.
    """
    with open_image(content, largest=largest, formats=formats) as image:
        if least_side:
            image.draft("RGB", (2 * least_side, 2 * least_side))
        image.load()
        # In place: what is upright and RGB already, as most photos are, is not copied.
        ImageOps.exif_transpose(image, in_place=True)
        return _opaque(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """A copy in upright RGB; transparent parts become white."""
    return _opaque(ImageOps.exif_transpose(image))


def _opaque(image: Image.Image) -> Image.Image:
    """RGB on white; the very same image where it is that already."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        canvas = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(canvas, layered).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
