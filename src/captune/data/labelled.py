"""Pictures with class labels: a folder for each class, COCO's objects, or a table of labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from captune.console import say
from captune.data.objects import LEAST_RATIO, LEAST_SHARE, read_objects
from captune.data.packed import is_pack
from captune.data.sources import is_of_table, open_source
from captune.data.table import CaptionTable, Rows
from captune.data.tabular import TableOptions
from captune.errors import CaptuneError, nearest
from captune.files import read_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TRAIN_FOLDERS = ("train", "training")
MANY = 100  # labels: more of them than half of the pictures are captions
SPLIT_FOLDERS = ("test", "val", "valid", "validation", *TRAIN_FOLDERS)  # by default the first


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """N pictures of C classes.

    Attributes:
        table: the pictures; of a folder for each class, its name is their caption.
        keys: C classes as the data names them.
        names: C classes as prompts say them.
        target: ``(N,)`` class of each picture, -1 where it is not of one class alone.
        present: ``(N, C)`` which classes are to be seen, where a picture may show several.
        rule: how a picture came to its class, in words.
    """

    table: CaptionTable
    keys: list[str]
    names: list[str]
    target: Rows
    present: npt.NDArray[np.bool_] | None
    rule: str

    @property
    def images(self) -> int:
        """How many pictures are of one class."""
        return int((self.target >= 0).sum())

    def named(self, names: Mapping[str, str]) -> LabelledImages:
        """With other words for some classes.

        Raises:
            CaptuneError: words for a class that is not there.
        """
        for key in names:
            if key not in self.keys:
                raise CaptuneError(f"a name is given for {key!r}{nearest(key, self.keys)}")
        words = [names.get(key, own) for key, own in zip(self.keys, self.names, strict=True)]
        return LabelledImages(self.table, self.keys, words, self.target, self.present, self.rule)

    def as_classes_of(self, other: LabelledImages) -> LabelledImages:
        """With the classes of ``other``; a picture of another class is of none."""
        place = {key: number for number, key in enumerate(other.keys)}
        moved = np.array([place.get(key, -1) for key in self.keys], dtype=np.int64)
        target = np.where(self.target >= 0, moved[self.target], -1)
        return LabelledImages(self.table, other.keys, other.names, target, None, self.rule)


def open_labelled(
    data: str | Path, split: str | None = None, options: TableOptions | None = None
) -> LabelledImages:
    """The labelled pictures of a split.

    Args:
        data: a folder with a folder for each class, or with such folders below ``train``,
            ``test`` and the like; a folder in the COCO 2014 layout with instance annotations; a
            table whose captions are class names.
        split: default ``test``, else ``val``; of COCO and of a table what ``evaluate`` takes.
        options: columns of a table.

    Raises:
        CaptuneError: it is none of these, or of fewer than two classes.
    """
    path = Path(data).expanduser()
    if _has_class_folders(path):
        if options is not None and options != TableOptions():
            raise CaptuneError(f"column options belong to a table; {path} is a folder")
        found = _by_folder(path, split)
    else:
        source = open_source(path, options)
        table = source.table(split or source.evaluation_split)
        found = _by_caption(table) if is_of_table(source) else _by_objects(table)
    present = np.unique(found.target[found.target >= 0])
    if len(present) < 2:
        raise CaptuneError(
            f"{found.table.describe()} shows {len(present)} classes: at least two are needed to "
            "tell apart"
        )
    return found


def training_part(
    data: str | Path, labelled: LabelledImages, options: TableOptions | None = None
) -> LabelledImages | None:
    """The training split beside ``labelled``, with its classes; None where there is none, one that
    cannot be read (said aloud: nobody asked for it), that shares pictures with ``labelled``, or
    that has none of its classes."""
    split = _training_split(Path(data).expanduser(), options)
    if split is None or split == labelled.table.split:
        return None
    try:
        found = open_labelled(data, split, options)
    except CaptuneError as error:
        say(f"no training split to learn from: {error}")
        return None
    if set(found.table.file_keys()) & set(labelled.table.file_keys()):
        return None
    found = found.as_classes_of(labelled)
    return found if found.images else None


def read_names(path: Path) -> dict[str, str]:
    """What prompts call some classes, from a JSON object: ``{"n02123045": "tabby cat"}``.

    Raises:
        CaptuneError: no such file, or not of this form.
    """
    content = read_json(path, what="class names")
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise CaptuneError(f'{path} is no object of names such as {{"n02123045": "tabby cat"}}')
    return content


def _has_class_folders(path: Path) -> bool:
    return path.is_dir() and not (path / "annotations").is_dir() and not is_pack(path)


def _training_split(path: Path, options: TableOptions | None) -> str | None:
    if _has_class_folders(path):
        return next((name for name in TRAIN_FOLDERS if _is_split(path / name)), None)
    source = open_source(path, options)
    instances = path / "annotations" / "instances_train2014.json"
    if not is_of_table(source) and not instances.is_file():
        return None
    return source.train_split if source.train_split in source.splits else None


def _is_split(folder: Path) -> bool:
    """Whether classes lie below it: a folder of pictures called train is a class of railways."""
    return folder.is_dir() and any(inside.is_dir() for inside in folder.iterdir())


def _by_folder(path: Path, split: str | None) -> LabelledImages:
    """Pictures in a folder for each class, split folders above them or not."""
    splits = [name for name in SPLIT_FOLDERS if _is_split(path / name)]
    if split is not None and split not in splits:
        raise CaptuneError(
            f"no split {split!r} in {path}"
            + (nearest(split, splits) if splits else ": it holds the classes themselves")
        )
    chosen = split or next(iter(splits), "all")
    root = path / chosen if splits else path
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    images: list[tuple[int, str, Path]] = []
    labels: list[tuple[int, str, int]] = []
    for name in classes:
        for file in sorted((root / name).rglob("*")):
            if file.suffix.lower() in SUFFIXES and file.is_file():
                row = len(images)
                images.append((row, file.relative_to(path).as_posix(), file))
                labels.append((row, name, row))
    if not images:
        raise CaptuneError(
            f"{root} holds no folders of pictures: it needs a folder for each class "
            f"({root}/cat/1.jpg), the COCO 2014 layout, or give a table of images and labels"
        )
    table = CaptionTable.build(images, labels, name=path.resolve().name, split=chosen)
    return _of_captions(table, classes, "the folder that it lies in")


def _by_caption(table: CaptionTable) -> LabelledImages:
    """A table of labels: the caption of a picture is its class."""
    if int(table.caption_counts.max()) > 1:
        row = int(table.caption_counts.argmax())
        raise CaptuneError(
            f"{table.describe()}: {table.file_name(row)} has {table.caption_counts[row]} labels, "
            "and one is wanted: name the column of the class with --caption-column"
        )
    classes = sorted(set(table.texts()))
    if len(classes) > max(MANY, len(table) / 2):
        raise CaptuneError(
            f"{table.describe()}: {len(classes):,} different labels, such as {classes[0]!r}, look "
            "like captions: name the column of the class with --caption-column"
        )
    return _of_captions(table, classes, "its label in the table")


def _of_captions(table: CaptionTable, classes: list[str], rule: str) -> LabelledImages:
    texts = table.texts()
    place = {name.strip(): number for number, name in enumerate(classes)}
    target = np.full(len(table), -1, dtype=np.int64)
    target[table.image_of_caption] = [place[text] for text in texts]
    empty = len(classes) - len(set(texts))
    if empty:
        say(f"{table.describe()}: {empty} of {len(classes)} classes have no picture")
    return LabelledImages(table, classes, _as_words(classes), target, None, rule)


def _by_objects(table: CaptionTable) -> LabelledImages:
    objects = read_objects(table)
    rule = (
        f"its largest object, where that fills {100 * LEAST_SHARE:.0f} % of the picture and is "
        f"{LEAST_RATIO:g} times as large as the largest of any other class"
    )
    classes = objects.classes
    return LabelledImages(
        table, classes, _as_words(classes), objects.dominant(), objects.counts > 0, rule
    )


def _as_words(classes: Iterable[str]) -> list[str]:
    return [name.replace("_", " ") for name in classes]
