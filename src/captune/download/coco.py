"""COCO 2014 from its own host or a mirror, unpacked as it comes: no archive of photos on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from captune.console import say
from captune.download.archive import LARGEST_TABLE, Archive, Wanted, missing, unpack_photos
from captune.download.disk import check_room, gigabytes, shrunk_bytes
from captune.download.photos import check_side
from captune.download.record import Record, captions_file, claimed
from captune.download.stumbling import PATIENCE, Patience
from captune.download.whole import download_file
from captune.errors import CaptuneError, nearest
from captune.files import replacing

DATA = "coco-2014"
# The host's certificate is not its own, so https cannot be had: the checksums below, and the
# CRC-32 of every photo, show what was damaged on the way.
OFFICIAL = "http://images.cocodataset.org"
PHOTOS = {"train": 82_783, "val": 40_504}
SPLITS = tuple(PHOTOS)
_LENGTHS = {"train": 13_510_573_713, "val": 6_645_013_297}
_ANNOTATIONS = "annotations_trainval2014.zip"
_ANNOTATIONS_LENGTH = 252_872_794
_ANNOTATIONS_MD5 = "md5:0a379cfc70b0e71301e0f377548639bd"
# The archive and the four files of it that are kept; the archive is deleted at the end.
_ANNOTATIONS_ROOM = 1_100_000_000


def download_coco(
    folder: str | Path,
    *,
    shrink: int | None = None,
    source: str = OFFICIAL,
    splits: Sequence[str] = SPLITS,
    patience: Patience = PATIENCE,
) -> Path:
    """Fetch COCO 2014 into ``folder``; what already lies there is not fetched again.

    The folder then has ``annotations/{captions,instances}_{split}2014.json``, ``{split}2014/*.jpg``
    and ``download.json``. A run that was stopped, however rudely, goes on with the same call.

    Args:
        shrink: the shorter side that photos get, in pixels (larger ones only, JPEG quality 90);
            None keeps them as they are: 20.2 GB. 256 takes about a fifth of that.
        source: an address that serves ``zips/{split}2014.zip`` and ``annotations/…`` as COCO does.
        splits: ``train``, ``val`` or both.

    Returns:
        The folder.

    Raises:
        CaptuneError: too little room, a folder that holds something else, a server that cannot
            be reached or does not serve these archives, damaged or hostile ones, absent photos.
    """
    root, source = Path(folder).expanduser(), source.rstrip("/")
    check_side(shrink)
    for split in splits:
        if split not in SPLITS:
            raise CaptuneError(f"COCO 2014 has no split {split!r}{nearest(split, SPLITS)}")
    with claimed(root, data=DATA, source=source, shrink=shrink) as record:
        todo = [split for split in splits if not record.is_complete(split)]
        if todo:
            _download(record, todo, patience)
    for split in splits:
        say(f"{root / f'{split}2014'}: {record.photos[split]:,} photos, all that have captions")
    return root


def _download(record: Record, splits: list[str], patience: Patience) -> None:
    root = record.folder
    with contextlib.ExitStack() as stack:
        if record.source == OFFICIAL and not (root / "annotations").is_dir():
            # Known before any request: nobody waits for a network to hear that the disk is small.
            _check_room(record, sum(_LENGTHS[s] for s in splits), sum(PHOTOS[s] for s in splits))
        photos: dict[str, list[Wanted]] = {}
        archives: dict[str, Archive] = {}
        for split in splits:
            archives[split] = stack.enter_context(_open(record.source, split, patience))
            photos[split] = archives[split].wanted(_place_photos(root, split))
            if not photos[split]:
                raise CaptuneError(f"{archives[split].name} holds no {split}2014/*.jpg")
        left = {split: missing(photos[split], shrink=record.shrink) for split in splits}
        size = sum(item.info.file_size for items in left.values() for item in items)
        count = sum(map(len, left.values()))
        _check_room(record, size, count)
        record.write()
        fetch_annotations(root, splits, record.source, patience)
        say(
            f"fetching {count:,} of {sum(map(len, photos.values())):,} photos ({gigabytes(size)}) "
            f"from {record.source} into {root}"
        )
        for split in splits:
            unpack_photos(archives[split], photos[split], shrink=record.shrink)
            record.finish(split)


def _open(source: str, split: str, patience: Patience) -> Archive:
    archive = Archive(f"{source}/zips/{split}2014.zip", patience=patience)
    if source == OFFICIAL and archive.length != _LENGTHS[split]:
        archive.__exit__()
        raise CaptuneError(
            f"{archive.name} has {archive.length:,} bytes, COCO's has {_LENGTHS[split]:,}: "
            "something else answers in its place"
        )
    return archive


def _place_photos(root: Path, split: str) -> Callable[[str], Path | None]:
    def place(name: str) -> Path | None:
        path = PurePosixPath(name)
        is_photo = path.parent.name == f"{split}2014" and path.suffix.lower() == ".jpg"
        return root / path.parent.name / path.name if is_photo else None

    return place


def _check_room(record: Record, size: int, count: int) -> None:
    """Refuse to begin where ``count`` photos of ``size`` bytes in all will not fit, once shrunk."""
    needed = shrunk_bytes(count, size, record.shrink) if record.shrink else size
    if record.source == OFFICIAL and not (record.folder / "annotations").is_dir():
        needed += _ANNOTATIONS_ROOM
    advice = "" if record.shrink else ", choose another disk, or take smaller photos: --shrink 256"
    check_room(record.folder, needed, advice=advice)


def fetch_annotations(
    root: Path, splits: Sequence[str], source: str, patience: Patience = PATIENCE
) -> None:
    """The captions and boxes of the splits into ``root/annotations``, unless they lie there.

    Raises:
        CaptuneError: as :func:`download_coco`.
    """
    captions = [captions_file(root, split) for split in splits]
    boxes = [root / "annotations" / f"instances_{split}2014.json" for split in splits]
    files = {path.name: path for path in (*captions, *boxes)}
    local, official = root / f".{_ANNOTATIONS}", source == OFFICIAL
    if all(path.is_file() for path in files.values()):
        _remove_archive(local)  # a killed run may have left it
        return
    if not local.is_file():
        download_file(
            f"{source}/annotations/{_ANNOTATIONS}",
            local,
            length=_ANNOTATIONS_LENGTH if official else None,
            checksum=_ANNOTATIONS_MD5 if official else "",
            patience=patience,
        )
    try:
        with Archive(local, largest=LARGEST_TABLE) as archive:
            found = archive.wanted(lambda name: files.get(PurePosixPath(name).name))
            absent = {path.name for path in captions} - {item.path.name for item in found}
            if absent:
                raise CaptuneError(f"{source}/annotations/{_ANNOTATIONS} lacks {min(absent)}")
            # Where the disk is full, the OSError leaves the archive for the next run.
            for item in found:
                archive.fetch(item.info, partial(_write_flushed, item.path))
    except CaptuneError:
        _remove_archive(local)  # a damaged one must not be found again by the next run
        raise
    _remove_archive(local)


def _remove_archive(local: Path) -> None:
    """The archive of annotations and what :func:`download_file` has beside it until it is whole."""
    for end in (".part.json", ".part", ""):
        local.with_name(local.name + end).unlink(missing_ok=True)


def _write_flushed(path: Path, pieces: Iterable[bytes]) -> None:
    """Unlike photos, these few files are taken for whole wherever they are found."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines(pieces)
