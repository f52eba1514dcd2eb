"""Captions and splits of Flickr8k and Flickr30k, in each of the forms they go around in."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from captune.console import say
from captune.data.tabular import image_id
from captune.download.archive import Archive
from captune.download.tar import is_tar, read_tar
from captune.errors import CaptuneError

_LISTS = re.compile(r"Flickr_?(?:8|30)k\.(train|dev|test)Images\.txt", re.IGNORECASE)
_KNOWN = re.compile(
    r"Flickr8k\.token\.txt|results_\d+\.token|results\.csv|captions\.txt|dataset_flickr\w+\.json"
    rf"|{_LISTS.pattern}",
    re.IGNORECASE,
)
_LARGEST = 256 << 20  # bytes; Karpathy's list of Flickr30k has 37 MB
_ORDER = ("train", "val", "test")

Rows = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Captions:
    """Captions of each photo, and the split it belongs to.

    Attributes:
        texts: captions by the photo's file name.
        split_of: ``train``, ``val`` or ``test`` by the photo's file name.
    """

    texts: dict[str, list[str]]
    split_of: dict[str, str]

    @property
    def splits(self) -> list[str]:
        """Those that have photos."""
        found = set(self.split_of.values())
        return [split for split in _ORDER if split in found]

    @property
    def digest(self) -> str:
        """Tells these captions and splits from others, whatever form they came in."""
        content = json.dumps([self.texts, self.split_of], sort_keys=True)
        return hashlib.blake2b(content.encode("utf-8"), digest_size=16).hexdigest()


def read_captions(path: Path, flickr: str) -> Captions:
    """Captions from a file, folder, zip or tar; photos that no list of splits names are left out.

    Args:
        flickr: ``flickr8k`` or ``flickr30k``; Karpathy's archive has the lists of both.

    Raises:
        CaptuneError: nothing of the known names or forms is there.
    """
    texts: dict[str, list[str]] = {}
    split_of: dict[str, str] = {}
    for name, content in sorted(_files(path).items()):
        if name.startswith("dataset_flickr") and name != f"dataset_{flickr}.json":
            continue
        listed = _LISTS.fullmatch(name)
        if listed:
            split = "val" if listed.group(1).lower() == "dev" else listed.group(1).lower()
            split_of |= dict.fromkeys(content.split(), split)
        elif content.lstrip().startswith("{"):
            texts, split_of = _karpathy(path, content)
            break  # it holds captions and splits; other files would double the captions
        elif not texts:
            texts = _gathered(path, name, content)
    if not texts:
        raise CaptuneError(
            f"{path} holds no captions of Flickr8k or Flickr30k: give Flickr8k.token.txt, "
            "results_20130124.token, results.csv, captions.txt, dataset_flickr8k.json or "
            "dataset_flickr30k.json, or an archive of one"
        )
    return _with_splits(texts, split_of)


def _with_splits(texts: dict[str, list[str]], split_of: dict[str, str]) -> Captions:
    if not split_of:
        say("no list of splits is there: a tenth of the photos, by hashed name, is for validation")
        split_of = {name: "train" if image_id(name) % 10 else "val" for name in texts}
    kept = {name: texts[name] for name in sorted(texts) if split_of.get(name) in _ORDER}
    if len(kept) < len(texts):
        say(f"{len(texts) - len(kept):,} photos with captions are in no split: left out")
    if not kept:
        raise CaptuneError("the lists of splits name none of the photos that have captions")
    for name in kept:
        if PurePosixPath(name).name != name or "\\" in name:
            raise CaptuneError(f"the captions name a photo {name!r}: that is no plain file name")
    return Captions(kept, {name: split_of[name] for name in kept})


def _files(path: Path) -> dict[str, str]:
    """Text of each file that may hold captions or splits, by its bare name."""
    if path.is_dir():
        return {p.name: _text(p.name, p.read_bytes()) for p in path.rglob("*") if _is_known(p.name)}
    if zipfile.is_zipfile(path):
        with Archive(path, largest=_LARGEST) as archive:
            wanted = archive.wanted(lambda name: Path(name) if _is_known(name) else None)
            return {
                item.path.name: _text(item.path.name, archive.fetch(item.info, b"".join))
                for item in wanted
            }
    if is_tar(path):
        texts: dict[str, str] = {}

        def take(name: str, pieces: Iterable[bytes]) -> None:
            texts[name] = _text(name, b"".join(pieces))

        read_tar(path, lambda name, _: _is_known(name), take, largest=_LARGEST)
        return texts
    # The lists of splits lie beside the captions.
    lists = [p for p in path.parent.iterdir() if _LISTS.fullmatch(p.name)]
    return {p.name: _text(p.name, p.read_bytes()) for p in (path, *lists)}


def _is_known(name: str) -> bool:
    return _KNOWN.fullmatch(PurePosixPath(name).name) is not None


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptuneError(f"{name} is no UTF-8 text: {error}") from None


def _karpathy(path: Path, content: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Karpathy and Fei-Fei's lists: file name, split and sentences of each photo."""
    try:
        images = json.loads(content)["images"]
        texts = {str(i["filename"]): [str(s["raw"]) for s in i["sentences"]] for i in images}
        return texts, {str(i["filename"]): str(i["split"]) for i in images}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CaptuneError(f"{path} is no list of images as Karpathy's: {error!r}") from None


def _gathered(path: Path, name: str, content: str) -> dict[str, list[str]]:
    first = content.partition("\n")[0]
    read: Callable[[str], Rows]
    if re.match(r"[^\t]+#\d+\t", first):
        read = _token_rows
    elif "|" in first:
        read = _bar_rows
    elif re.match(r"\s*image\s*,\s*caption\s*$", first):
        read = _comma_rows
    else:
        raise CaptuneError(f"{path}: {name} starts with {first[:60]!r}: no captions of Flickr")
    texts: dict[str, list[str]] = {}
    try:
        for image, text in read(content):
            if text.strip():
                texts.setdefault(image.strip(), []).append(text.strip())
    except csv.Error as error:  # thousands of rows read as one field
        raise CaptuneError(
            f"{path}: {name} cannot be read as CSV ({error}): a quotation mark may lack its second"
        ) from None
    return texts


def _token_rows(content: str) -> Rows:
    """``1000268201.jpg#0<tab>A child …``"""
    for line in content.splitlines():
        image, tab, text = line.partition("\t")
        if tab:
            yield image.rpartition("#")[0], text


def _bar_rows(content: str) -> Rows:
    """``1000092795.jpg| 0| Two men …`` below a header; one row is known to lack its second bar."""
    for line in content.splitlines()[1:]:
        match = re.match(r"([^|]+)\|\s*\d+\s*\|?(.*)", line)
        if match:
            yield match.group(1), match.group(2)


def _comma_rows(content: str) -> Rows:
    """``1000268201.jpg,A child …`` below a header; captions with commas are quoted."""
    for row in list(csv.reader(content.splitlines()))[1:]:
        if len(row) >= 2:
            yield row[0], ",".join(row[1:])
