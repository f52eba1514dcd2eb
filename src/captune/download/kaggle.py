"""COCO 2014 from Kaggle's copy: its photos in place or shrunk, the captions from COCO's host."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
from tqdm.auto import tqdm

from captune.console import say
from captune.download.coco import OFFICIAL, SPLITS, fetch_annotations
from captune.download.disk import full_disk_is_an_error, gigabytes
from captune.download.photos import (
    bounded,
    check_side,
    shrunk_or_same,
    sizes,
    workers,
    write_photo,
)
from captune.download.record import Record, claimed
from captune.download.stumbling import PATIENCE, Patience, root_cause
from captune.errors import CaptuneError, MissingExtraError, nearest

DATA = "coco-2014-kaggle"
OWNER, NAME = "jeffaudi", "coco-2014-dataset-for-yolov3"
HANDLE = f"{OWNER}/{NAME}"
ATTACHED = Path("/kaggle/input")  # where Kaggle's own notebooks find data sets
_ROOM = 41_000_000_000  # the archive and what is unpacked from it, side by side
_STEPS = (
    "1. sign in at kaggle.com; 2. open Settings, then API, then Create New Token; "
    "3. put the kaggle.json that it gives into {folder}; 4. run the same command again "
    "(or set KAGGLE_USERNAME and KAGGLE_KEY, or KAGGLE_API_TOKEN)"
)


def download_kaggle(
    folder: str | Path,
    *,
    shrink: int | None = None,
    source: str = OFFICIAL,
    splits: Sequence[str] = SPLITS,
    attached: Path = ATTACHED,
    patience: Patience = PATIENCE,
) -> Path:
    """Lay out Kaggle's copy of COCO 2014 as COCO does, with the official captions.

    ``{split}2014`` become links to the folders of the copy, which kagglehub keeps in its cache (or,
    in a notebook on Kaggle, to the attached data set), or hold shrunk photos.

    Args:
        shrink: as :func:`captune.download.coco.download_coco`, which also explains ``splits``.
        source: where the annotations come from.
        attached: where attached data sets lie on Kaggle.

    Returns:
        The folder.

    Raises:
        CaptuneError: no credentials, no kagglehub, no such photos in the copy, and all that
            :func:`captune.download.coco.download_coco` raises for annotations.
    """
    root = Path(folder).expanduser()
    check_side(shrink)
    for split in splits:
        if split not in SPLITS:
            raise CaptuneError(f"COCO 2014 has no split {split!r}{nearest(split, SPLITS)}")
    with claimed(root, data=DATA, source=f"kaggle:{HANDLE}", shrink=shrink) as record:
        todo = [split for split in splits if not record.is_complete(split)]
        if todo:
            copy = _attached_copy(attached) or _fetch_copy()
            photos = {split: _photo_folder(copy, split) for split in todo}
            record.write()
            fetch_annotations(root, todo, source.rstrip("/"), patience)
            for split in todo:
                _lay_out(record, split, photos[split])
    for split in splits:
        say(f"{root / f'{split}2014'}: {record.photos[split]:,} photos, all that have captions")
    return root


def _attached_copy(attached: Path) -> Path | None:
    """The data set in a notebook on Kaggle; its place has changed once."""
    for path in (attached / NAME, attached / "datasets" / OWNER / NAME):
        if path.is_dir():
            say(f"reading the attached data set at {path}")
            return path
    return None


def _fetch_copy() -> Path:
    check_credentials()
    try:
        import kagglehub
    except ImportError:
        raise MissingExtraError("downloading from Kaggle", "kagglehub", "kaggle") from None
    cache = os.environ.get("KAGGLEHUB_CACHE", "~/.cache/kagglehub")
    say(f"kagglehub keeps its copy in {cache}; it takes about {gigabytes(_ROOM)} there at its most")
    try:
        with full_disk_is_an_error(Path(cache).expanduser()):
            return Path(kagglehub.dataset_download(HANDLE))
    except CaptuneError:
        raise
    # kagglehub hands on what requests raises, its own errors and plain ones.
    except Exception as error:
        offline = isinstance(error, requests.ConnectionError)
        said = root_cause(error) if offline else " ".join(str(error).split())
        raise CaptuneError(
            f"Kaggle did not give {HANDLE}: {said or type(error).__name__}; check the network and "
            "the credentials, then run the same command again"
        ) from None


def check_credentials() -> None:
    """Refuse to ask Kaggle without a token, before anything is fetched.

    Raises:
        CaptuneError: none is found, or kaggle.json is unreadable; with the steps to make one.
    """
    have = os.environ.get
    if have("KAGGLE_API_TOKEN") or (have("KAGGLE_USERNAME") and have("KAGGLE_KEY")):
        return
    if "google.colab" in sys.modules:
        return  # kagglehub reads Colab's secrets itself, and says when there are none
    home = Path.home() / ".kaggle"
    if any((home / name).is_file() for name in ("access_token", "access_token.txt")):
        return
    path = Path(have("KAGGLE_CONFIG_DIR") or home) / "kaggle.json"
    steps = _STEPS.format(folder=path.parent)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CaptuneError(f"no Kaggle credentials at {path}: {steps}") from None
    except (OSError, ValueError) as error:
        raise CaptuneError(f"{path} cannot be read as JSON ({error}): {steps}") from None
    parts = [content.get(key) for key in ("username", "key")] if isinstance(content, dict) else []
    if not parts or not all(isinstance(part, str) and part for part in parts):
        raise CaptuneError(f"{path} holds no 'username' and 'key': {steps}")


def _photo_folder(copy: Path, split: str) -> Path:
    """The folder of a split's photos; the copy has one of that name for its boxes, too."""
    for path in sorted(copy.rglob(f"{split}2014")):
        if path.is_dir() and next(path.glob("COCO_*.jpg"), None):
            return path
    raise CaptuneError(
        f"{copy} holds no folder {split}2014 with COCO_*.jpg in it: Kaggle's {HANDLE} has changed, "
        "or its download is not whole; delete it there, or use `captune data coco`"
    )


def _lay_out(record: Record, split: str, photos: Path) -> None:
    place = record.folder / f"{split}2014"
    if record.shrink is None:
        _link(place, photos)
    else:
        place.mkdir(exist_ok=True)
        with full_disk_is_an_error(place):
            _shrink_into(place, photos, record.shrink)
    record.finish(split)


def _link(place: Path, photos: Path) -> None:
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        raise CaptuneError(f"{place} is in the way of a link to {photos}: choose another folder")
    try:
        place.symlink_to(photos.resolve(), target_is_directory=True)
    except OSError as error:
        raise CaptuneError(
            f"{place} cannot become a link to {photos} ({error.strerror}): on Windows turn on "
            "Developer Mode, or use --shrink, which writes photos of its own"
        ) from None


def _shrink_into(place: Path, photos: Path, side: int) -> None:
    names = sorted(sizes(photos))
    there = sizes(place)

    def shrink(name: str) -> None:
        content = (photos / name).read_bytes()
        write_photo(place / name, [shrunk_or_same(content, side, name)])

    todo = [name for name in names if name.endswith(".jpg") and name not in there]
    with tqdm(total=len(todo), unit="photo", desc=place.name) as bar:
        for _ in bounded(shrink, todo, threads=workers()):
            bar.update()
