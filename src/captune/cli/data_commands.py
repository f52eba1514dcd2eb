"""``captune data …``: each makes, fetches or checks data and says where it lies.

Heavy imports happen inside the commands, so that ``captune --help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from captune.cli.commands import EXIT_INTERRUPTED, table_options
from captune.errors import CaptuneError


def demo(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.data.demo import ATTRIBUTION, draw_demo

    scenes = draw_demo(arguments.folder, train=arguments.images, seed=arguments.seed)
    print(f"{scenes.folder}: {scenes.train} train, {scenes.val} val, {scenes.test} test scenes")
    print(ATTRIBUTION, file=sys.stderr)
    return 0


def coco(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.download.coco import download_coco

    return _coco(download_coco, arguments)


def kaggle(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.download.kaggle import download_kaggle

    return _coco(download_kaggle, arguments)


def _coco(download: Callable[..., Any], arguments: argparse.Namespace) -> int:
    from captune.download.coco import OFFICIAL

    return _resumable(
        lambda: download(
            arguments.folder,
            shrink=arguments.shrink,
            source=arguments.source or OFFICIAL,
            splits=arguments.splits,
        )
    )


def flickr8k(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.download.flickr import FLICKR8K

    return _flickr(FLICKR8K, arguments)


def flickr30k(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.download.flickr import FLICKR30K

    return _flickr(FLICKR30K, arguments)


def _flickr(flickr: Any, arguments: argparse.Namespace) -> int:
    from captune.download.flickr import convert_flickr

    return _resumable(
        lambda: convert_flickr(
            flickr, arguments.folder, images=arguments.images, captions=arguments.captions
        )
    )


def table(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.data.tabular import TableOptions
    from captune.download.table import convert_table

    options = TableOptions(
        arguments.image_column, tuple(arguments.caption_column), arguments.caption
    )
    return _resumable(
        lambda: convert_table(
            arguments.file, arguments.out, options=options, shrink=arguments.shrink
        ).describe()
    )


def pack(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from captune.data.packed import check_pack
    from captune.download.pack import describe, pack

    if arguments.check:
        folder = Path(arguments.data).expanduser()
        print(f"{describe(folder, check_pack(folder))}: every file is as it was written")
        return 0
    if not arguments.out:
        raise CaptuneError("captune data pack needs --out DIR, the folder to write into")
    return _resumable(
        lambda: pack(
            arguments.data,
            arguments.out,
            side=arguments.side,
            quality=arguments.quality,
            splits=arguments.splits,
            options=table_options(arguments),
        )
    )


def _resumable(work: Callable[[], Any]) -> int:
    """Print what ``work`` returns; Ctrl-C is answered with what to do next."""
    try:
        print(work())
    except KeyboardInterrupt:
        print("captune: stopped: the same command goes on where it stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
