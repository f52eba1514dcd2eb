"""Speed of decoding: python benchmarks/pixels.py DATA [--size 224] [--side 256] [--repeats N].

Every photo of DATA (train and val) becomes a square by COCOClipDataset, once a repeat and way, as
training sees it (random crop and flip) and as evaluation does, in one thread. The ways: the photos
themselves (Pillow, large JPEGs decoded at a fraction), without that fraction, from a pack, either
with training's crops resized by Pillow in torch's place, and either with another decoder in
Pillow's place where one is installed (pip install simplejpeg opencv-python-headless kornia-rs);
cropping and resizing stay captune's. Ways take turns; a ratio is of two turns of one repeat, and
the figure is the median. Time is the processor's, so that other work beside it matters less.

Writes benchmarks/results/pixels.json and prints it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch.utils.data import ConcatDataset

from captune.data import dataset as dataset_module
from captune.data import pixels as pixels_module
from captune.data.dataset import COCOClipDataset
from captune.data.pixels import Pixels, load_image
from captune.data.shards import photo_bytes
from captune.data.sources import open_source
from captune.download.pack import pack
from captune.files import write_json

VERSION = 1
RESULTS = Path(__file__).parent / "results"
Loader = Callable[..., Image.Image]
Resizer = Callable[[Image.Image, int], Pixels]
TORCH: Resizer = pixels_module._to_square


class Way(NamedTuple):
    """Photos, what opens one, and what resizes a crop of training's."""

    data: Path
    load: Loader = load_image
    resize: Resizer = TORCH


def pillow(crop: Image.Image, size: int) -> Pixels:
    square = crop.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def without_fraction(path: Path, *, least_side: int) -> Image.Image:
    return load_image(path)


def simplejpeg() -> Loader:
    decode = importlib.import_module("simplejpeg").decode_jpeg

    def load(path: Path, *, least_side: int) -> Image.Image:
        least = 2 * least_side
        return Image.fromarray(decode(photo_bytes(path), min_height=least, min_width=least))

    return load


def opencv() -> Loader:
    cv2 = importlib.import_module("cv2")
    cv2.setNumThreads(1)

    def load(path: Path, *, least_side: int) -> Image.Image:
        content = np.frombuffer(photo_bytes(path), dtype=np.uint8)
        return Image.fromarray(cv2.imdecode(content, cv2.IMREAD_COLOR_RGB))

    return load


def kornia() -> Loader:
    decode = importlib.import_module("kornia_rs").io.decode_image_jpegturbo

    def load(path: Path, *, least_side: int) -> Image.Image:
        return Image.fromarray(np.asarray(decode(photo_bytes(path), "rgb")))

    return load


LIBRARIES: dict[str, tuple[str, Callable[[], Loader]]] = {
    "simplejpeg": ("simplejpeg", simplejpeg),
    "OpenCV": ("opencv-python-headless", opencv),
    "kornia-rs": ("kornia-rs", kornia),
}


def installed() -> dict[str, Loader]:
    """The decoders that are there."""
    found = {}
    for name, (_, make) in LIBRARIES.items():
        try:
            found[name] = make()
        except ImportError:
            continue
    return found


def photos_of(data: Path, size: int, augment: bool) -> ConcatDataset[Any]:
    source = open_source(data)
    tables = [source.table(split) for split in ("train", "val")]
    return ConcatDataset(
        [COCOClipDataset(table=t, image_size=size, augment=augment) for t in tables]
    )


def ways(data: Path, packed: Path) -> dict[str, Way]:
    """By name; the first is what others are compared with."""
    found = {
        "photos": Way(data),
        "photos, never at a fraction": Way(data, without_fraction),
        "photos, resized by Pillow": Way(data, resize=pillow),
        "pack": Way(packed),
        "pack, resized by Pillow": Way(packed, resize=pillow),
    }
    for name, load in installed().items():
        found[f"photos, {name}"] = Way(data, load)
        found[f"pack, {name}"] = Way(packed, load)
    return found


def turn(photos: ConcatDataset[Any], way: Way) -> tuple[float, list[Any]]:
    """Processor seconds for all photos, and their pixels."""
    dataset_module.load_image, pixels_module._to_square = way.load, way.resize
    began = time.process_time()
    pixels = [photos[row].pixels for row in range(len(photos))]
    seconds = time.process_time() - began
    dataset_module.load_image, pixels_module._to_square = load_image, TORCH
    return seconds, pixels


def measure(data: Path, packed: Path, size: int, augment: bool, repeats: int) -> dict[str, Any]:
    chosen = ways(data, packed)
    photos = {name: photos_of(way.data, size, augment) for name, way in chosen.items()}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    differences: dict[str, float] = {}
    for repeat in range(repeats + 1):
        first: list[Any] = []
        for name, way in chosen.items():
            taken, pixels = turn(photos[name], way)
            first = first or pixels
            if repeat == 0:  # files come into memory, and libraries start
                pairs = zip(pixels, first, strict=True)
                off = [float((a.float() - b.float()).abs().mean()) for a, b in pairs]
                differences[name] = round(statistics.mean(off), 3)
            else:
                seconds[name].append(taken)
    count = len(next(iter(photos.values())))
    own = seconds["photos"]
    return {
        name: {
            "images a second": round(count / statistics.median(taken), 1),
            "times as fast": round(
                statistics.median(a / b for a, b in zip(own, taken, strict=True)), 2
            ),
            "mean difference of a pixel": differences[name],
            "seconds": [round(value, 3) for value in taken],
        }
        for name, taken in seconds.items()
    }


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def versions() -> dict[str, str]:
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "Pillow": f"{PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}",
    }
    for name in installed():
        found[name] = importlib.metadata.version(LIBRARIES[name][0])
    return found


def main() -> None:
    """Measure both views, keep the figures and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="a folder in the COCO 2014 layout")
    parser.add_argument("--size", type=int, default=224, help="of the squares (default 224)")
    parser.add_argument("--side", type=int, default=256, help="of the pack (default 256)")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "pack"
        pack(arguments.data, packed, side=arguments.side, splits=["train", "val"])
        shape = (arguments.data, packed, arguments.size)
        result = {
            "format_version": VERSION,
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, one thread",
            "versions": versions(),
            "photos": len(photos_of(arguments.data, arguments.size, False)),
            "size": arguments.size,
            "side": arguments.side,
            "bytes": {"photos": size_of(arguments.data), "pack": size_of(packed)},
            "training": measure(*shape, augment=True, repeats=arguments.repeats),
            "evaluation": measure(*shape, augment=False, repeats=arguments.repeats),
        }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / "pixels.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
