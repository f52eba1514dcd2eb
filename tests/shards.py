"""Tiny WebDataset shards, made on the spot."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from conftest import COLOURS

PAIRS = [(ground, square) for ground in COLOURS for square in COLOURS if ground != square]


def photo(number: int, kind: str = "JPEG") -> bytes:
    """A square on a ground, its colours by number."""
    ground, square = PAIRS[number % len(PAIRS)]
    image = Image.new("RGB", (40, 40), COLOURS[ground])
    image.paste(COLOURS[square], (10, 10, 30, 30))
    out = io.BytesIO()
    image.save(out, kind, quality=95)
    return out.getvalue()


def caption(number: int, turn: int = 0) -> str:
    """What the photo of a number shows, told apart from that of any other."""
    ground, square = PAIRS[number % len(PAIRS)]
    return f"a {square} square on a {ground} ground, number {number}, told {turn}"


def tar_of(members: Iterable[tuple[str, bytes]], mode: str = "w") -> bytes:
    """A tar file of names and contents."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def sample(number: int, captions: int = 1) -> list[tuple[str, bytes]]:
    """The members of a sample: one caption as text, several as JSON."""
    told = [caption(number, turn) for turn in range(captions)]
    words = (
        (f"{number:06d}.txt", told[0].encode())
        if captions == 1
        else (f"{number:06d}.json", json.dumps({"captions": told}).encode())
    )
    return [(f"{number:06d}.jpg", photo(number)), words]


def write_shards(folder: Path, sizes: Iterable[int], captions: int = 1) -> str:
    """Shards ``squares-00.tar`` and so on, their samples numbered through; the pattern of all."""
    folder.mkdir(parents=True, exist_ok=True)
    number = count = 0
    for count, size in enumerate(sizes):
        members = [m for n in range(number, number + size) for m in sample(n, captions)]
        (folder / f"squares-{count:02d}.tar").write_bytes(tar_of(members))
        number += size
    return f"{folder}/squares-{{00..{count:02d}}}.tar"
