"""COCO's annotation files: a JSON object of images and captions, read into columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from captune.data.table import caption_columns, image_columns
from captune.errors import CaptuneError
from captune.files import read_json

ImageRow = tuple[int, str, Path]
CaptionRow = tuple[int, str, int]

STRIPPED_AT_ONCE = 65_536  # captions that are Python strings
LARGEST = 2**31 - 2  # bytes that Arrow parses at once
WANTED = pa.schema(
    {
        "images": pa.list_(pa.struct({"id": pa.int64(), "file_name": pa.string()})),
        "annotations": pa.list_(
            pa.struct({"id": pa.int64(), "image_id": pa.int64(), "caption": pa.string()})
        ),
    }
)


def read_annotations(path: Path, folder: Path) -> tuple[pa.Table, pa.Table]:
    """Images and captions of a file, as :class:`captune.data.table.CaptionTable` has them.

    Args:
        folder: where the images lie.

    Raises:
        CaptuneError: not JSON, or not COCO's.
    """
    found = columns_by_arrow(path, folder)
    return columns_by_python(path, folder) if found is None else found


def columns_by_arrow(path: Path, folder: Path) -> tuple[pa.Table, pa.Table] | None:
    """What :func:`columns_by_python` gives, without a Python object for each entry.

    None for whatever is not a plain file of COCO's: numbers that are written as strings, an id
    twice, a caption of no image. Python's parser takes some of it, and names the rest.
    """
    listed = _listed(path)
    if listed is None:
        return None
    images, captions = listed
    columns = [*images.flatten(), *captions.flatten()]
    if not len(captions) or any(column.null_count for column in [images, captions, *columns]):
        return None
    ids, names = images.flatten()
    if pc.count_distinct(ids).as_py() < len(ids):
        return None
    caption_ids, image_ids, texts = captions.flatten()
    owners = pc.index_in(image_ids, value_set=ids)
    if owners.null_count:
        return None
    files = names.to_pylist()
    image_table = {
        "image_id": ids,
        "file_name": names,
        "path": pa.array((str(folder / name) for name in files), pa.string(), size=len(files)),
    }
    caption_table = {
        "caption_id": caption_ids,
        "caption": _stripped(texts),
        "image": owners.cast(pa.int64()),
    }
    return pa.table(image_table), pa.table(caption_table)


def _listed(path: Path) -> tuple[pa.StructArray, pa.StructArray] | None:
    """The two lists of a file."""
    try:
        size = path.stat().st_size
        if not 0 < size <= LARGEST:
            return None
        content = pj.read_json(
            path,
            read_options=pj.ReadOptions(use_threads=False, block_size=size + 1),
            parse_options=pj.ParseOptions(
                explicit_schema=WANTED,
                newlines_in_values=True,
                unexpected_field_behavior="ignore",
            ),
        )
    except (OSError, pa.ArrowException):
        return None
    if content.num_rows != 1 or any(column.null_count for column in content.columns):
        return None
    images, annotations = (content[name].chunk(0).flatten() for name in WANTED.names)
    return images, annotations


def _stripped(texts: pa.StringArray) -> pa.ChunkedArray:
    """Without the space around them, as Python knows it: Arrow's idea of space is another one."""
    starts = range(0, len(texts), STRIPPED_AT_ONCE)
    parts = (texts.slice(start, STRIPPED_AT_ONCE).to_pylist() for start in starts)
    return pa.chunked_array(
        [pa.array([text.strip() for text in part], pa.string()) for part in parts], pa.string()
    )


def columns_by_python(path: Path, folder: Path) -> tuple[pa.Table, pa.Table]:
    """As :func:`read_annotations`, entry by entry."""
    content = read_json(path, what="annotation file")
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise CaptuneError(f"{path} has no list {key!r}: it is not a COCO captions file")
    images, captions = _parse(path, folder, content)
    return image_columns(images), caption_columns(captions)


def _parse(
    path: Path, folder: Path, content: dict[str, Any]
) -> tuple[list[ImageRow], list[CaptionRow]]:
    """Rows from the JSON of one annotation file."""
    try:
        images = [
            (int(entry["id"]), str(entry["file_name"]), folder / str(entry["file_name"]))
            for entry in content["images"]
        ]
        row_of_id = {image_id: row for row, (image_id, _, _) in enumerate(images)}
        captions = []
        for entry in content["annotations"]:
            row = row_of_id.get(int(entry["image_id"]))
            if row is None:
                raise CaptuneError(
                    f"{path}: caption {entry['id']} belongs to image {entry['image_id']}, "
                    "which its 'images' does not list"
                )
            captions.append((int(entry["id"]), str(entry["caption"]), row))
    except (KeyError, TypeError, ValueError) as error:
        raise CaptuneError(f"{path} is not a COCO captions file: {error!r} in an entry") from None
    if len(row_of_id) < len(images):
        raise CaptuneError(f"{path} lists {len(images) - len(row_of_id)} image ids twice")
    if not captions:
        raise CaptuneError(f"{path} holds no captions")
    return images, captions
