"""Flickr8k and Flickr30k, from the archives that their makers send, in COCO 2014's layout.

Their terms give them to those who ask for them, for research: captune does not fetch them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from captune.console import say
from captune.download.archive import LARGEST_PHOTO, Archive, unpack_photos
from captune.download.flickr_captions import Captions, read_captions
from captune.download.photos import sizes, write_photo
from captune.download.record import captions_file, claimed
from captune.download.tar import is_tar, read_tar
from captune.errors import CaptuneError
from captune.files import write_json


@dataclass(frozen=True)
class FlickrSet:
    """One of the two sets.

    Attributes:
        name: as the command writes it.
        form: where its makers are asked for it.
        images: what the archive of photos is usually called.
        captions: what the archive or file of captions is usually called.
    """

    name: str
    form: str
    images: str
    captions: str


FLICKR8K = FlickrSet(
    "flickr8k",
    "https://forms.illinois.edu/sec/1713398",
    "Flickr8k_Dataset.zip",
    "Flickr8k_text.zip",
)
FLICKR30K = FlickrSet(
    "flickr30k",
    "https://forms.illinois.edu/sec/229675",
    "flickr30k-images.tar.gz",
    "dataset_flickr30k.json",
)


def convert_flickr(
    flickr: FlickrSet, folder: str | Path, *, images: str = "", captions: str = ""
) -> Path:
    """Lay out Flickr's photos and captions as COCO 2014 does: train, val and test.

    Args:
        images: a folder, .zip or .tar(.gz) of photos.
        captions: a file, folder, .zip or .tar(.gz) with one of ``*.token.txt``, ``*.token``,
            ``results.csv``, ``captions.txt`` or Karpathy's ``dataset_*.json``, and the lists
            ``Flickr_8k.{train,dev,test}Images.txt`` where there are such.

    Returns:
        The folder.

    Raises:
        CaptuneError: either is not given (the message tells how to get them), not there, or holds
            nothing that is known.
    """
    root = Path(folder).expanduser()
    if not images or not captions:
        raise CaptuneError(
            f"{flickr.name} is given by its makers to those who ask, for research: "
            f"1. ask at {flickr.form}; 2. download what they send; 3. run: captune data "
            f"{flickr.name} {folder} --images {flickr.images} --captions {flickr.captions}"
        )
    paths = [Path(images).expanduser(), Path(captions).expanduser()]
    for path, option in zip(paths, ("--images", "--captions"), strict=True):
        if not path.exists():
            raise CaptuneError(f"nothing at {path} ({option})")
    found = read_captions(paths[1], flickr.name)
    with claimed(
        root, data=flickr.name, source=str(paths[0]), shrink=None, captions=found.digest
    ) as record:
        record.write()
        places = {n: root / f"{found.split_of[n]}2014" / n for n in found.texts}
        for split in found.splits:
            (root / f"{split}2014").mkdir(exist_ok=True)
        _take_photos(paths[0], places)
        _write_annotations(root, found, places)
        for split in found.splits:
            if captions_file(root, split).is_file():
                say(f"{root / f'{split}2014'}: {record.finish(split):,} photos with captions")
    return root


def _take_photos(images: Path, places: Mapping[str, Path]) -> None:
    """Photos by their bare names, whatever folders they lie in."""

    def place(name: str) -> Path | None:
        return places.get(PurePosixPath(name).name)

    if images.is_dir():
        _link_photos(images, place)
    elif is_tar(images):
        _unpack_tar(images, places)
    else:
        with Archive(images) as archive:
            unpack_photos(archive, archive.wanted(place), shrink=None)


def _link_photos(images: Path, place: Callable[[str], Path | None]) -> None:
    paths = [path for path in sorted(images.rglob("*")) if place(path.name) and path.is_file()]
    for path in tqdm(paths, unit="photo", desc=images.name):
        target = place(path.name)
        if target is None or target.exists():
            continue
        try:
            os.link(path.resolve(), target)  # a link to a link would dangle
        except OSError:  # another disk, or a file system without hard links
            temporary = target.with_name(f".{target.name}.tmp")
            shutil.copyfile(path, temporary)
            os.replace(temporary, target)


def _unpack_tar(images: Path, places: Mapping[str, Path]) -> None:
    """Only bare names of wanted regular files are used, so nothing can land elsewhere."""
    size = images.stat().st_size
    with tqdm(total=size, unit="B", unit_scale=True, desc=images.name) as bar:
        read_tar(
            images,
            lambda name, size: name in places and _size(places[name]) != size,
            lambda name, pieces: write_photo(places[name], pieces),
            largest=LARGEST_PHOTO,
            progress=lambda at: bar.update(at - bar.n),
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _write_annotations(root: Path, found: Captions, places: Mapping[str, Path]) -> None:
    there = {split: set(sizes(root / f"{split}2014")) for split in found.splits}
    absent = [name for name in found.texts if name not in there[found.split_of[name]]]
    if len(absent) == len(found.texts):
        raise CaptuneError(
            f"none of the {len(absent):,} photos that the captions name is in --images "
            f"(looked for {absent[0]})"
        )
    if absent:
        say(f"{len(absent):,} photos that the captions name are not there, such as {absent[0]}")
    for split in found.splits:
        names = [name for name in places if name in there[split] and found.split_of[name] == split]
        if names:
            write_json(captions_file(root, split), _coco(found, set(names)))


def _coco(found: Captions, names: set[str]) -> dict[str, list[dict[str, object]]]:
    """A COCO captions file; ids count through the whole set, so splits share none."""
    images: list[dict[str, object]] = []
    captions: list[dict[str, object]] = []
    caption_id = 0
    for image_id, (name, texts) in enumerate(found.texts.items(), start=1):
        for text in texts:
            caption_id += 1
            if name in names:
                captions.append({"id": caption_id, "image_id": image_id, "caption": text})
        if name in names:
            images.append({"id": image_id, "file_name": name})
    return {"images": images, "annotations": captions}
