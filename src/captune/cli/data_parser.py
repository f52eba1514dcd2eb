"""What ``captune data`` takes."""

from __future__ import annotations

from typing import Any

from captune.cli import data_commands
from captune.cli.options import add_column_options, add_table_options, command


def add_data(subparsers: Any) -> None:
    """The command ``data`` and its kinds."""
    parser = command(subparsers, "data", None, "make, fetch or check data")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    demo = command(
        kinds, "demo", data_commands.demo, "draw scenes of emoji in the COCO 2014 layout"
    )
    demo.add_argument("folder", metavar="DIR")
    demo.add_argument("--images", type=int, required=True, help="training scenes")
    demo.add_argument("--seed", type=int, default=0, help="decides all scenes (default 0)")
    _add_data_coco(kinds)
    for name, run in (("flickr8k", data_commands.flickr8k), ("flickr30k", data_commands.flickr30k)):
        flickr = command(kinds, name, run, f"lay out {name} (ask its makers for it) as COCO 2014")
        flickr.add_argument("folder", metavar="DIR")
        flickr.add_argument("--images", default="", metavar="PATH", help="archive or folder")
        flickr.add_argument("--captions", default="", metavar="PATH", help="file or archive")
    table = command(
        kinds, "table", data_commands.table, "check an own table, fetch the images of its links"
    )
    table.add_argument("file", metavar="FILE", help=".csv, .tsv, .jsonl or .parquet")
    table.add_argument("--out", metavar="DIR", help="default data/<the table's name>")
    _add_shrink(table)
    add_column_options(table.add_argument_group("columns"))
    _add_data_pack(kinds)


def _add_data_pack(kinds: Any) -> None:
    parser = command(
        kinds, "pack", data_commands.pack, "resize photos once into few files, made for training"
    )
    parser.add_argument(
        "data", metavar="DATA", help="COCO 2014 folder or table; to --check, a pack"
    )
    parser.add_argument("--out", metavar="DIR", help="the pack's folder, then given as DATA")
    parser.add_argument("--side", type=int, default=256, help="the shorter side (default 256)")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs (default 90)")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="default: train val test")
    parser.add_argument("--check", action="store_true", help="compare a pack with its digests")
    add_table_options(parser)


def _add_data_coco(kinds: Any) -> None:
    for name, run, what in (
        ("coco", data_commands.coco, "fetch COCO 2014 from its host (20.2 GB, less with --shrink)"),
        ("kaggle", data_commands.kaggle, "fetch COCO 2014 from Kaggle's copy, captions included"),
    ):
        parser = command(kinds, name, run, what)
        parser.add_argument("folder", metavar="DIR")
        _add_shrink(parser)
        parser.add_argument(
            "--splits", nargs="+", default=["train", "val"], metavar="SPLIT", help="train val"
        )
        parser.add_argument("--source", default="", metavar="URL", help="a mirror of COCO's host")


def _add_shrink(parser: Any) -> None:
    parser.add_argument(
        "--shrink", type=int, metavar="N", help="the photos' shorter side in pixels, such as 256"
    )
