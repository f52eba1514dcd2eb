"""The index of a stream: how many samples and captions each shard has, and where they are kept.

One pass over a shard writes its captions to the cache shared by runs; what stays in memory is a few
numbers for each shard, and the captions' places of those that were looked at last.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from tqdm.auto import tqdm

from captune.console import say
from captune.data.stream_shards import Shard, ShardReader, expand_pattern, find_shards
from captune.data.table import Rows
from captune.errors import CaptuneError
from captune.files import cache_dir, read_versioned, replacing, write_json

VERSION = 2  # 1 had no marks
REASONS_KEPT = 20  # of what was left out of a shard
STARTS_KEPT = 512  # shards whose captions' places stay in memory: 8 bytes a sample


@dataclass(frozen=True)
class ShardIndex:
    """What one pass over a shard found.

    Attributes:
        url: of the shard.
        folder: in the cache: ``index.json``, ``captions.parquet`` (column ``caption``),
            ``starts.npy`` ``(samples + 1,)``, the first caption of each sample, and ``marks.npy``
            ``(samples,)``, what each is known by.
        samples, captions: how many there are.
        digest: of keys and captions, in order.
        left_out: how many members no sample could be made of; the rest of a damaged tar is one.
        reasons: the first of them, with what was wrong.
    """

    url: str
    folder: str
    samples: int
    captions: int
    digest: str
    left_out: int
    reasons: dict[str, str]

    @classmethod
    def build(cls, shard: Shard) -> ShardIndex:
        """The index of ``shard``, from the cache where the same file was read before.

        Raises:
            CaptuneError: it cannot be read, or has no picture with a caption.
        """
        named = f"{VERSION}\0{shard.url}\0{shard.size}\0{shard.version}"
        digest = hashlib.blake2b(named.encode(), digest_size=16).hexdigest()
        folder = cache_dir() / "shards" / digest
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (folder / "index.json").is_file():
                return cls._open(folder)
            return _read_captions(shard.url, folder)

    @classmethod
    def _open(cls, folder: Path) -> ShardIndex:
        path = folder / "index.json"
        stated = read_versioned(path, what="shard index", version=VERSION)
        del stated["format_version"]
        try:
            return cls(folder=str(folder), **stated)
        except TypeError as error:
            raise CaptuneError(f"{path} is damaged ({error}): delete {folder}") from None

    def starts(self) -> Rows:
        """``(samples + 1,)``: sample ``i`` has the captions ``starts[i]`` to ``starts[i + 1]``."""
        return np.asarray(self._load("starts.npy"), dtype=np.int64)

    def marks(self) -> npt.NDArray[np.uint64]:
        """``(samples,)``: the :attr:`~captune.data.stream_shards.ShardSample.mark` of each."""
        return np.asarray(self._load("marks.npy"), dtype=np.uint64)

    def _load(self, name: str) -> npt.NDArray[Any]:
        try:
            return np.load(Path(self.folder) / name, allow_pickle=False)  # type: ignore[no-any-return]
        except (OSError, ValueError) as error:
            raise CaptuneError(f"{self.folder} is damaged ({error}): delete it") from None

    def texts(self) -> list[str]:
        """All its captions, in order."""
        try:
            table = pq.read_table(Path(self.folder) / "captions.parquet")
            return table["caption"].to_pylist()  # type: ignore[no-any-return]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise CaptuneError(f"{self.folder} is damaged ({error}): delete it") from None


def _read_captions(url: str, folder: Path) -> ShardIndex:
    """One pass over a shard; ``index.json`` is written last, so it stands for all files."""
    reader = ShardReader(url)
    state = hashlib.blake2b(digest_size=16)
    texts: list[str] = []
    starts, marks = [0], []
    for sample in reader:
        marks.append(sample.mark)
        texts += sample.captions
        starts.append(len(texts))
        key = sample.name.removeprefix(url)
        told = "\0".join([key, *sample.captions, "\n"])
        state.update(told.encode("utf-8", "surrogateescape"))  # a tar's names may be of any bytes
    if not texts:
        raise CaptuneError(
            f"shard {url} has no picture with a caption: each needs KEY.txt or KEY.json beside "
            "KEY.jpg, KEY.png or KEY.webp"
        )
    with replacing(folder / "captions.parquet") as temporary:
        pq.write_table(pa.table({"caption": texts}), temporary, compression="zstd")
    kept = {"starts": np.array(starts, dtype=np.int64), "marks": np.array(marks, dtype=np.uint64)}
    for name, rows in kept.items():
        with replacing(folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, rows, allow_pickle=False)
    problems = reader.problems
    found = ShardIndex(
        url,
        str(folder),
        samples=len(starts) - 1,
        captions=len(texts),
        digest=state.hexdigest(),
        left_out=len(problems),
        reasons=dict(list(problems.items())[:REASONS_KEPT]),
    )
    stated = asdict(found)
    del stated["folder"]
    write_json(folder / "index.json", {"format_version": VERSION, **stated})
    return found


class StreamTable:
    """N samples and M captions of S shards, numbered through all of them in the pattern's order.

    In place of :class:`captune.data.table.CaptionTable` where no list of all images can be had.
    """

    split = "stream"

    def __init__(self, pattern: str, shards: list[ShardIndex]) -> None:
        self.pattern = pattern
        self.name = pattern_name(pattern)
        self.shards = shards
        self.samples = np.array([shard.samples for shard in shards], dtype=np.int64)
        self.first_image = _starts(self.samples)
        self.first_caption = _starts(np.array([s.captions for s in shards], dtype=np.int64))
        self._recent: OrderedDict[int, Rows] = OrderedDict()

    @classmethod
    def open(cls, pattern: str, *, rank: int = 0, world_size: int = 1) -> StreamTable:
        """The shards that ``pattern`` names, indexed; what was indexed before is not read again.

        Processes begin at different shards and find in the cache what others have read.

        Raises:
            CaptuneError: no shard matches, one is missing, unreadable or without captions.
        """
        shards = find_shards(expand_pattern(pattern))
        order = rotated(len(shards), rank, world_size)
        found: dict[int, ShardIndex] = {}
        bar = tqdm(total=len(shards), desc="reading captions", unit="shard", leave=False)
        with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            try:
                indices = pool.map(ShardIndex.build, [shards[place] for place in order])
                for place, index in zip(order, indices, strict=True):
                    found[place] = index
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        table = cls(pattern, [found[place] for place in range(len(shards))])
        if table.left_out:
            reasons = [f"{n} ({why})" for shard in table.shards for n, why in shard.reasons.items()]
            more = f" and {table.left_out - 3:,} more" if table.left_out > 3 else ""
            say(f"left out of {table.name}: {', '.join(reasons[:3])}{more}")
        return table

    def __len__(self) -> int:
        return int(self.first_image[-1])

    @property
    def num_captions(self) -> int:
        """M."""
        return int(self.first_caption[-1])

    @property
    def digest(self) -> str:
        """A hash of all shards' keys and captions, in order: names the data."""
        digests = "".join(shard.digest for shard in self.shards)
        return hashlib.blake2b(digests.encode(), digest_size=16).hexdigest()

    @property
    def left_out(self) -> int:
        """Members of all shards that no sample could be made of."""
        return sum(shard.left_out for shard in self.shards)

    def record(self) -> dict[str, Any]:
        """What a run keeps of it, as a JSON object."""
        return {
            "pattern": self.pattern,
            "fingerprint": self.digest,
            "images": len(self),
            "captions": self.num_captions,
            "left_out": self.left_out,
            "shards": [shard.url for shard in self.shards],
        }

    def describe(self) -> str:
        """``cc: 10 shards, 100,000 images, 100,000 captions``."""
        return (
            f"{self.name}: {len(self.shards):,} shards, {len(self):,} images, "
            f"{self.num_captions:,} captions"
        )

    # -- what a training step asks -----------------------------------------------------------
    def starts(self, shard: int) -> Rows:
        """``(n + 1,)`` caption rows of the stream: the first one of each sample of a shard."""
        if shard not in self._recent:
            self._recent[shard] = self.first_caption[shard] + self.shards[shard].starts()
            if len(self._recent) > STARTS_KEPT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(shard)
        return self._recent[shard]

    def captions_of(self, image: int) -> Rows:
        """The caption rows of one image row."""
        shard = int(np.searchsorted(self.first_image, image, side="right")) - 1
        starts, row = self.starts(shard), image - int(self.first_image[shard])
        return np.arange(starts[row], starts[row + 1], dtype=np.int64)

    def ids_of(self, images: Rows) -> Rows:
        """What an image's draws are made of: its row."""
        return images

    def owners_of(self, captions: Rows) -> Rows:
        """``(C,)`` the image rows of caption rows."""
        shards = np.searchsorted(self.first_caption, captions, side="right") - 1
        owners = np.empty(len(captions), dtype=np.int64)
        for shard in np.unique(shards):
            mine = shards == shard
            place = np.searchsorted(self.starts(int(shard)), captions[mine], side="right") - 1
            owners[mine] = self.first_image[shard] + place
        return owners

    def negatives_for(self, images: Rows) -> list[range]:
        """The captions that random negatives of a step are drawn from: those of its shards."""
        shards = np.unique(np.searchsorted(self.first_image, images, side="right") - 1)
        first = self.first_caption
        return [range(int(first[shard]), int(first[shard + 1])) for shard in shards]

    def file_keys(self) -> list[str]:
        """None: a stream's images are too many to be remembered one by one."""
        return []


def rotated(count: int, rank: int, world_size: int) -> list[int]:
    """``0 .. count - 1`` from the share of a process on: nobody waits where another works."""
    first = rank * count // world_size
    return [*range(first, count), *range(first)]


def pattern_name(pattern: str) -> str:
    """``cc`` for ``shards/cc-{00000..00009}.tar``; the folder where nothing stands before."""
    *folders, last = [part for part in re.split(r"[/\\]+", pattern) if part]
    stem = re.split(r"[{*?\[]|\.tar$|\.tar\.|\.tgz$", last)[0].strip("-_. ")
    named: Iterator[str] = (part for part in reversed(folders) if not re.search(r"[{*?\[:]", part))
    return stem or next(named, "stream")


def _starts(counts: Rows) -> Rows:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
