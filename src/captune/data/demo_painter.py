"""Draws a demo scene: patterned ground, small clutter, the things, a little grain."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from captune.data.demo_scenes import COLOURS, Placed, Scene, Thing

_JPEG_QUALITY = 90
_FINE = 2  # ground and clutter are drawn at twice the size and halved, for smooth edges


class Painter:
    """Draws scenes at one size; each glyph is rendered once and kept.

    Args:
        things: what a scene's `Placed.thing` counts into.
        font: an emoji font with colour layers (COLR version 0).
        size: side of the square pictures in pixels.
    """

    def __init__(self, things: Sequence[Thing], font: Path, *, size: int) -> None:
        self.things = things
        self.size = size
        # About as large as the largest thing is shown: scaling up would blur it.
        self._font = ImageFont.truetype(str(font), max(64, round(0.6 * size)))
        self._glyphs: dict[int, Image.Image] = {}
        self.sprite = lru_cache(maxsize=16)(self._sprite)

    def boxes(self, scene: Scene) -> list[tuple[list[int], int]]:
        """For each thing its box (x, y, width, height) and its area, all in pixels.

        Neither knows of things that lie in front.
        """
        found = []
        for placed in scene.placed:
            sprite, (left, top) = self.sprite(placed)
            area = int((np.asarray(sprite.getchannel("A")) > 127).sum())
            found.append(([left, top, sprite.width, sprite.height], area))
        return found

    def jpeg(self, scene: Scene) -> bytes:
        """The picture as a JPEG file."""
        rng = Random(scene.seed)
        ground = _ground(scene, rng, self.size * _FINE)
        _scatter_clutter(ground, rng)
        picture = ground.reduce(_FINE)
        for placed in scene.placed:
            sprite, corner = self.sprite(placed)
            picture.paste(sprite, corner, sprite)
        grain = np.random.default_rng(scene.seed).integers(-6, 7, (self.size, self.size, 1))
        pixels = np.clip(np.asarray(picture).astype(np.int16) + grain, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=_JPEG_QUALITY)
        return file.getvalue()

    def _sprite(self, placed: Placed) -> tuple[Image.Image, tuple[int, int]]:
        """A thing, turned, scaled and cut out (RGBA), and where its upper left corner goes."""
        glyph = self._glyph(placed.thing)
        turned = glyph.rotate(placed.angle, Image.Resampling.BILINEAR, expand=True)
        scale = placed.size * self.size / max(glyph.size)
        shape = (max(1, round(turned.width * scale)), max(1, round(turned.height * scale)))
        small = turned.resize(shape, Image.Resampling.BOX)
        sprite = small.crop(small.getbbox())
        left = round(placed.x * self.size - sprite.width / 2)
        top = round(placed.y * self.size - sprite.height / 2)
        inside = (
            min(max(left, 0), self.size - sprite.width),
            min(max(top, 0), self.size - sprite.height),
        )
        return sprite, inside

    def _glyph(self, thing: int) -> Image.Image:
        if thing not in self._glyphs:
            side = round(self._font.size * 2.2)
            canvas = Image.new("RGBA", (side, side), (0, 0, 0, 0))
            ImageDraw.Draw(canvas).text(
                (side / 2, side / 2),
                self.things[thing].emoji,
                font=self._font,
                embedded_color=True,
                anchor="mm",
            )
            self._glyphs[thing] = canvas.crop(canvas.getbbox())
        return self._glyphs[thing]


def _ground(scene: Scene, rng: Random, side: int) -> Image.Image:
    """The background: each pixel a mixture of the scene's two colours."""
    first, second = (
        [value + rng.randint(-8, 8) for value in COLOURS[name]] for name in scene.colours
    )
    if scene.pattern == "speckles":
        second = [round(0.72 * value) for value in first]
    share = Image.fromarray((_pattern(scene.pattern, rng, side) * 255).astype(np.uint8))
    bands = [
        share.point([round(a + (b - a) * step / 255) for step in range(256)])
        for a, b in zip(first, second, strict=True)
    ]
    return Image.merge("RGB", bands)


def _pattern(pattern: str, rng: Random, side: int) -> NDArray[np.float32]:
    """How much of the second colour each pixel has, 0 to 1, as (side, side)."""
    along = np.linspace(0, 1, side, dtype=np.float32)
    down, across = np.broadcast_arrays(along[:, None], along[None, :])
    width = rng.uniform(0.07, 0.14)
    shift = rng.random()
    turn = rng.choice((1, -1))
    share: NDArray[Any]
    if pattern == "plain":
        share = np.zeros((side, side))
    elif pattern == "gradient":
        share = down if turn > 0 else across
    elif pattern == "rows":
        share = np.floor(down / width + shift) % 2
    elif pattern == "columns":
        share = np.floor(across / width + shift) % 2
    elif pattern == "diagonal":
        share = np.floor((down + turn * across) / (1.4 * width) + shift) % 2
    elif pattern == "checks":
        share = (np.floor(down / width + shift) + np.floor(across / width + shift)) % 2
    elif pattern == "dots":
        share = (down / width % 1 - 0.5) ** 2 + (across / width % 1 - 0.5) ** 2 < 0.09
    elif pattern == "grid":
        share = (down / width % 1 < 0.14) | (across / width % 1 < 0.14)
    elif pattern == "waves":
        share = (down + 0.025 * np.sin(across * 18)) / (1.3 * width) % 1 < 0.2
    elif pattern == "speckles":
        coarse = np.random.default_rng(rng.randrange(2**32)).random((side // 4 + 1, side // 4 + 1))
        share = coarse.repeat(4, 0).repeat(4, 1)[:side, :side] < 0.16
    else:
        raise ValueError(f"no pattern {pattern!r}")
    return share.astype(np.float32)


def _scatter_clutter(picture: Image.Image, rng: Random) -> None:
    """Small thin shapes that no caption speaks of; none could pass for a thing."""
    pen = ImageDraw.Draw(picture)
    side = picture.width
    for _ in range(rng.randrange(13)):
        x, y, reach = rng.random() * side, rng.random() * side, rng.uniform(0.012, 0.035) * side
        ink = tuple(rng.randrange(40, 230) for _ in range(3))
        box = (x - reach, y - reach, x + reach, y + reach)
        shape = rng.choice(("line", "cross", "arc", "corner"))
        line = max(1, round(0.008 * side))
        if shape == "arc":
            start = rng.randrange(360)
            pen.arc(box, start, start + 180, fill=ink, width=line)
        elif shape == "corner":
            pen.line([(box[0], y), (x, box[1]), (box[2], y)], fill=ink, width=line)
        else:
            pen.line([(box[0], box[1]), (box[2], box[3])], fill=ink, width=line)
            if shape == "cross":
                pen.line([(box[0], box[3]), (box[2], box[1])], fill=ink, width=line)
