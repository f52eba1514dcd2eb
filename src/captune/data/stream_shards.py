"""WebDataset shards: from a pattern to tar files anywhere, and from a tar file to its samples.

A sample is the files of one key, side by side: ``key.jpg`` (or ``.jpeg``, ``.png``, ``.webp``)
with ``key.txt``, one caption, or ``key.json``, whose ``captions`` or ``caption`` may be several.
Files of other kinds are passed over: nothing of a shard is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm.auto import tqdm

from captune.errors import CaptuneError, MissingExtraError

IMAGES = ("jpg", "jpeg", "png", "webp")
READ = frozenset({*IMAGES, "txt", "json"})
TARS = (".tar", ".tar.gz", ".tgz")
LARGEST_MEMBER = 200_000_000  # bytes: a photo of fifty megapixels without loss has fewer
PAUSES = (0.0, 2.0, 8.0, 32.0)  # seconds before each attempt to read a shard: stores fail at times
LOOKS_AT_ONCE = 16  # requests for the sizes of shards
# What a file store calls a file's version, in order of trust.
VERSIONS = ("ETag", "etag", "md5", "mtime", "LastModified", "last_modified", "created")
DAMAGE = (tarfile.TarError, EOFError, zlib.error)


@dataclass(frozen=True)
class Shard:
    """A tar file; ``size`` (bytes) and ``version`` change when it does, where its place tells."""

    url: str
    size: int
    version: str


class ShardSample(NamedTuple):
    """A picture, encoded, with its captions; ``name`` is ``SHARD::KEY.jpg``."""

    name: str
    image: bytes
    captions: list[str]

    @property
    def mark(self) -> int:
        """What it is known by when it is read again: 64 bits of name, captions and the picture's
        size, but not of its bytes, which nothing has to be read twice for."""
        key = self.name.rpartition("::")[2]
        told = "\0".join([key, str(len(self.image)), *self.captions])
        # A tar's names may be of any bytes.
        digest = hashlib.blake2b(told.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "little")


def is_pattern(data: str) -> bool:
    """Whether ``data`` names shards: a URL, a tar file, or braces or wildcards and no path."""
    if "://" in data or data.endswith(TARS):
        return True
    return bool(re.search(r"[{*?\[]", data)) and not Path(data).expanduser().exists()


def expand_pattern(pattern: str) -> list[str]:
    """The shards that ``pattern`` names: braces first (``{00000..00009}``), then wildcards.

    Raises:
        CaptuneError: it names none, or its place cannot be listed.
        MissingExtraError: ``webdataset`` or ``fsspec`` is not installed.
    """
    fsspec, expand = _libraries()
    try:
        words = list(expand(pattern, escape=False))
    except ValueError as error:
        raise CaptuneError(f"pattern {pattern!r}: {error}") from None
    urls: list[str] = []
    for word in words:
        chain, colons, last = word.rpartition("::")
        if not re.search(r"[*\[]" if "://" in last else r"[*?\[]", last):
            urls.append(word if "://" in word else os.path.abspath(os.path.expanduser(word)))
            continue
        try:
            files, path = fsspec.core.url_to_fs(last)
            found = [files.unstrip_protocol(name) for name in sorted(files.glob(path))]
        except Exception as error:  # each file store raises its own kinds
            raise CaptuneError(f"{word} cannot be listed: {_reason(error)}") from None
        urls += [chain + colons + url.removeprefix("file://") for url in found]
    if not urls:
        raise CaptuneError(f"no shard matches {pattern!r}: name tar files, such as cc-{{0..9}}.tar")
    twice = {url for url in urls if urls.count(url) > 1} if len(set(urls)) < len(urls) else set()
    if twice:
        raise CaptuneError(f"pattern {pattern!r} names {min(twice)} more than once")
    return urls


def find_shards(urls: list[str]) -> list[Shard]:
    """The shards at ``urls``, which are asked for their sizes many at a time.

    Raises:
        CaptuneError: some are not there, or their place cannot be reached.
    """
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        looks = pool.map(_look, urls)
        found = list(tqdm(looks, "finding shards", len(urls), unit="shard", leave=False))
    missing = [url for url, shard in zip(urls, found, strict=True) if shard is None]
    if missing:
        raise CaptuneError(
            f"{len(missing)} of {len(urls)} shards are not there, the first is {missing[0]}: "
            "mend the pattern, or see that its place can be reached"
        )
    return [shard for shard in found if shard is not None]


def _look(url: str) -> Shard | None:
    fsspec, _ = _libraries()
    try:
        files, path = fsspec.core.url_to_fs(url)
        stated = files.info(path)
    except FileNotFoundError:
        return None
    except Exception as error:
        raise CaptuneError(f"{url} cannot be reached: {_reason(error)}") from None
    if stated.get("type") == "directory":
        raise CaptuneError(
            f"{url} is a folder: name its tar files, such as {url.rstrip('/')}/*.tar"
        )
    version = next((str(stated[key]) for key in VERSIONS if stated.get(key)), "")
    return Shard(url, int(stated.get("size") or 0), version)


class ShardReader:
    """The samples of a shard in order, read as a stream: what is not read is not kept.

    Every reading numbers them alike. ``problems`` names what is left out, and why: members that no
    sample can be made of, and the rest of a tar file that ends too early or is damaged inside.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.problems: dict[str, str] = {}
        self._damage: Exception | None = None

    def __iter__(self) -> Iterator[ShardSample]:
        """Read it; where that fails, again from where it was, a few times.

        Raises:
            CaptuneError: the shard is not there any more, or cannot be read to its end.
        """
        fsspec, _ = _libraries()
        given, ended_at = 0, -1
        error: Exception | None = None
        for pause in PAUSES:
            if error is not None:
                time.sleep(pause)
            try:
                self._damage, error = None, None
                self.problems.clear()  # a line that broke may have made some of them
                with fsspec.open(self.url, "rb") as file:
                    for place, sample in enumerate(self._samples(file)):
                        if place >= given:
                            given = place + 1
                            yield sample
            except Exception as caught:  # each file store raises its own kinds
                error = caught  # a server that is away is a file that is not there, to some
                continue
            if self._damage is None:
                return
            # A line that was cut looks like a file that was: only what ends twice in one place is.
            if ended_at == given:
                self.problems[self.url] = f"damaged after {given:,} samples ({self._damage})"
                return
            ended_at = given
        raise CaptuneError(
            f"shard {self.url} cannot be read after {given:,} samples: "
            f"{_reason(error or self._damage)}"
        )

    def _samples(self, file: IO[bytes]) -> Iterator[ShardSample]:
        from webdataset.tariterators import group_by_keys

        for group in group_by_keys(self._members(file), suffixes=set(READ), handler=self._repeated):
            suffix = next((kind for kind in IMAGES if kind in group), None)
            name = f"{self.url}::{group['__key__']}"
            try:
                captions = _captions(group)
            except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, nested deeply
                self.problems[name] = f"captions cannot be read: {error}"
                continue
            if suffix and captions:
                yield ShardSample(f"{name}.{suffix}", group[suffix], captions)
            else:
                self.problems[name] = "no caption" if suffix else "no image"

    def _members(self, file: IO[bytes]) -> Iterator[dict[str, Any]]:
        """The files in the tar that may belong to a sample, as ``webdataset`` groups them."""
        from webdataset.tariterators import base_plus_ext

        try:
            with tarfile.open(fileobj=file, mode="r|*") as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep one for each file
                    suffix = base_plus_ext(member.name)[1]
                    if not member.isreg() or (suffix or "").lower() not in READ:
                        continue
                    if member.size > LARGEST_MEMBER:
                        self.problems[f"{self.url}::{member.name}"] = f"{member.size:,} bytes"
                        continue
                    content = archive.extractfile(member)
                    assert content is not None  # it is a regular file
                    yield {"fname": member.name, "data": content.read(), "__url__": self.url}
                # Cut inside of a header, or before one, a tar just ends; whole, it ends with zeros.
                if archive.fileobj.tell() < archive.offset + tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("unexpected end of data")
        except DAMAGE as error:
            self._damage = error

    def _repeated(self, error: Exception) -> bool:
        """A second file of the same name: the first one counts."""
        self.problems[f"{self.url}::{str(error.args[0]).partition(': ')[0]}"] = "named twice"
        return True


def _captions(group: dict[str, Any]) -> list[str]:
    """All that is told of a sample; of ``caption`` in the JSON and the text, the text."""
    stated = json.loads(group["json"]) if "json" in group else None
    stated = stated if isinstance(stated, dict) else {}
    text = group["txt"].decode("utf-8") if "txt" in group else ""
    found = stated.get("captions") or text.strip() or stated.get("caption")
    listed = found if isinstance(found, list) else [found]
    # JSON may spell half a character, which no file of text can hold.
    texts = [t.encode("utf-8", "replace").decode().strip() for t in listed if isinstance(t, str)]
    return [text for text in texts if text]


def _reason(error: Exception | None) -> str:
    """An error's words in one line, or its kind where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _libraries() -> tuple[Any, Any]:
    """``fsspec`` and the expansion of braces."""
    try:
        import fsspec
        import webdataset  # noqa: F401
        from braceexpand import braceexpand
    except ImportError as error:
        raise MissingExtraError(
            "reading WebDataset shards", str(error.name or error), "shards"
        ) from None
    return fsspec, braceexpand
