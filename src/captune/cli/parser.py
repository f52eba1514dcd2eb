"""What the command line takes. Nothing heavy is imported: ``captune --help`` answers at once."""

from __future__ import annotations

import argparse
import os
from typing import Any, NoReturn

from captune import __version__
from captune.cli import commands, data_commands
from captune.config import FIELDS
from captune.errors import CaptuneError
from captune.recipes import RECIPES, TOWERS


class _Parser(argparse.ArgumentParser):
    """Wrong words are the user's error like any other: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise CaptuneError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; importing it loads nothing heavy."""
    parser = _Parser(
        prog="captune",
        description="Teach an image encoder the language of a frozen text encoder.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"captune {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_demo,
        _add_train,
        _add_compare,
        _add_evaluate,
        _add_blend,
        _add_search,
        _add_classify,
        _add_zeroshot,
        _add_bench,
        _add_data,
    ):
        add(subparsers)
    return parser


def _command(subparsers: Any, name: str, run: Any, help: str, **options: Any) -> Any:
    parser = subparsers.add_parser(
        name,
        help=help,
        description=help,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.set_defaults(run=run, takes_config=False)
    return parser


def _add_demo(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "demo",
        commands.demo,
        "draw pictures, train on them, write a report: no data and no network needed",
        epilog=_config_help(),
    )
    parser.add_argument("--out", default=os.path.join("runs", "demo"), help="the run's folder")
    parser.add_argument("--images", type=int, help="scenes to train on")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    parser.set_defaults(takes_config=True)


def _add_train(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "train",
        commands.train,
        "train on a COCO 2014 folder or a table of images and captions",
        epilog=_config_help(),
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help="COCO 2014 folder, pack, .csv, .jsonl or .parquet; or WebDataset shards: a pattern of "
        "paths or URLs, such as 's3://photos/cc-{00000..00999}.tar'",
    )
    parser.add_argument(
        "--val-data", default="", metavar="DATA", help="what to validate on, for shards"
    )
    parser.add_argument("--out", help="the run's folder (default runs/<data>{suffix})")
    parser.add_argument("--resume", action="store_true", help="go on where the run stopped")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    _add_table_options(parser)
    parser.set_defaults(takes_config=True)


def _add_compare(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "compare",
        commands.compare,
        "train every combination of some config values over seeds, and say which truly differ",
        epilog=_config_help(),
    )
    parser.add_argument(
        "data", metavar="DATA", help="COCO 2014 folder, pack, .csv, .jsonl or .parquet"
    )
    parser.add_argument(
        "--flags",
        nargs="+",
        required=True,
        metavar="KEY",
        help="on/off config keys, or key=value,value (the first value is the base)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--out", help="the comparison's folder (default runs/<data>-compare)")
    _add_split(parser)
    _add_table_options(parser)
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    parser.set_defaults(takes_config=True)


def _add_evaluate(subparsers: Any) -> None:
    parser = _command(subparsers, "evaluate", commands.evaluate, "Recall@K of a run, both ways")
    parser.add_argument("model", metavar="RUN", help="a run, RUN@stage-1, or a CLIP")
    parser.add_argument("data", metavar="DATA", nargs="?", help="default: the run's own data")
    parser.add_argument(
        "--hubness", action="store_true", help="also text→image recall corrected for hubs"
    )
    parser.add_argument(
        "--protocol",
        default="full",
        metavar="NAME",
        help="full (default), coco-5k, coco-1k, one-caption",
    )
    parser.add_argument(
        "--eccv", action="store_true", help="also CxC and ECCV Caption, of the split karpathy-test"
    )
    parser.add_argument(
        "--pmrp", metavar="DIR", help="these and PMRP, whose ground truth lies in the folder DIR"
    )
    parser.add_argument(
        "--against", metavar="RUN", help="another model, or RUN@stage-1, tested in pairs"
    )
    _add_split(parser)
    _add_own_towers(parser)
    _add_table_options(parser)
    printed = parser.add_mutually_exclusive_group()
    printed.add_argument("--json", action="store_true", help="print the metrics as JSON")
    printed.add_argument(
        "--format", choices=("text", "markdown", "latex"), default="text", help="for papers"
    )


def _add_blend(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "blend",
        commands.blend,
        "the models between two (WiSE-FT), measured; the best is kept as a run",
    )
    parser.add_argument("first", metavar="RUN_A", help="a run, RUN@stage-1, or a CLIP: alpha 0")
    parser.add_argument("second", metavar="RUN_B", help="a run of the same towers: alpha 1")
    parser.add_argument("data", metavar="DATA", nargs="?", help="default: RUN_B's own data")
    parser.add_argument("--steps", type=int, default=11, help="models, both ends among them")
    parser.add_argument("--out", help="the blend's folder (default runs/<RUN_B>-blend)")
    _add_split(parser)
    _add_own_towers(parser)
    _add_table_options(parser)
    parser.add_argument("--json", action="store_true", help="print the blend as JSON")


def _add_search(subparsers: Any) -> None:
    parser = _command(subparsers, "search", commands.search, "the pictures that best answer a text")
    parser.add_argument("model", metavar="RUN", help="a run, RUN@stage-1, or a CLIP")
    parser.add_argument("query", metavar="QUERY", help='such as "a dog on a beach"')
    parser.add_argument("-k", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--data", help="default: the run's own data")
    _add_split(parser)
    _add_own_towers(parser)
    _add_table_options(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def _add_classify(subparsers: Any) -> None:
    parser = _command(subparsers, "classify", commands.classify, "zero-shot labels of image files")
    parser.add_argument("model", metavar="RUN", help="a run, RUN@stage-1, or a CLIP")
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    parser.add_argument("--labels", nargs="+", required=True, metavar="LABEL")
    parser.add_argument("--template", action="append", help="prompt with {} (repeatable; averaged)")
    _add_own_towers(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def _add_zeroshot(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "zeroshot",
        commands.zeroshot,
        "accuracy of zero-shot labels on labelled pictures, beside baselines",
    )
    parser.add_argument("model", metavar="RUN", help="a run, RUN@stage-1, or a CLIP")
    parser.add_argument(
        "data", metavar="DATA", help="a folder for each class, COCO 2014 with instances, or a table"
    )
    parser.add_argument("--templates", metavar="FILE", help="prompts with {}, one a line; averaged")
    parser.add_argument("--names", metavar="FILE", help='{"n02123045": "tabby cat"} in JSON')
    parser.add_argument("--no-probe", action="store_true", help="train no linear probe")
    parser.add_argument("--out", metavar="DIR", help="for the page (default: the run's folder)")
    parser.add_argument("--split", help="default: test, else val")
    _add_own_towers(parser)
    _add_table_options(parser)
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")


def _add_bench(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "bench",
        commands.bench,
        "where a training step's time goes on this machine, and what would make it faster",
        epilog=_config_help(),
    )
    parser.add_argument("data", metavar="DATA", help="COCO 2014 folder, .csv, .jsonl or .parquet")
    parser.add_argument("--steps", type=int, default=8, help="steps timed each way (default 8)")
    _add_table_options(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(takes_config=True)


def _add_data(subparsers: Any) -> None:
    parser = _command(subparsers, "data", None, "make, fetch or check data")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    demo = _command(
        kinds, "demo", data_commands.demo, "draw scenes of emoji in the COCO 2014 layout"
    )
    demo.add_argument("folder", metavar="DIR")
    demo.add_argument("--images", type=int, required=True, help="training scenes")
    demo.add_argument("--seed", type=int, default=0, help="decides all scenes (default 0)")
    _add_data_coco(kinds)
    for name, run in (("flickr8k", data_commands.flickr8k), ("flickr30k", data_commands.flickr30k)):
        flickr = _command(kinds, name, run, f"lay out {name} (ask its makers for it) as COCO 2014")
        flickr.add_argument("folder", metavar="DIR")
        flickr.add_argument("--images", default="", metavar="PATH", help="archive or folder")
        flickr.add_argument("--captions", default="", metavar="PATH", help="file or archive")
    table = _command(
        kinds, "table", data_commands.table, "check an own table, fetch the images of its links"
    )
    table.add_argument("file", metavar="FILE", help=".csv, .tsv, .jsonl or .parquet")
    table.add_argument("--out", metavar="DIR", help="default data/<the table's name>")
    _add_shrink(table)
    _add_column_options(table.add_argument_group("columns"))
    _add_data_pack(kinds)


def _add_data_pack(kinds: Any) -> None:
    parser = _command(
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
    _add_table_options(parser)


def _add_data_coco(kinds: Any) -> None:
    for name, run, what in (
        ("coco", data_commands.coco, "fetch COCO 2014 from its host (20.2 GB, less with --shrink)"),
        ("kaggle", data_commands.kaggle, "fetch COCO 2014 from Kaggle's copy, captions included"),
    ):
        parser = _command(kinds, name, run, what)
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


def _add_split(parser: Any) -> None:
    parser.add_argument("--split", help="default: the validation split")


def _add_own_towers(parser: Any) -> None:
    own = parser.add_argument_group("runs with towers of one's own")
    own.add_argument("--image-encoder", default="", metavar="package.module:factory")
    own.add_argument("--text-encoder", default="", metavar="package.module:factory")


def _add_table_options(parser: Any) -> None:
    table = parser.add_argument_group("own tables")
    _add_column_options(table)
    table.add_argument("--val", default="", metavar="FILE", help="a table to validate on")


def _add_column_options(group: Any) -> None:
    group.add_argument("--image-column", default="", metavar="NAME")
    group.add_argument("--caption-column", action="append", default=[], metavar="NAME")
    group.add_argument("--caption", default="", metavar="TEMPLATE", help="'{title}, {colour}'")


def _config_help() -> str:
    """Every config key with its default, below the options."""
    lines = ["config values, written key=value or --key value after the rest:"]
    for key, spec in FIELDS.items():
        choices = spec.metadata.get("choices")
        kinds = f" ({', '.join(choices)})" if choices else ""
        lines.append(f"  {key:<22} {spec.default!r:<16} {spec.metadata['help']}{kinds}")
    lines += ["", "recipes:", *(f"  {name:<14} {r.summary}" for name, r in RECIPES.items())]
    lines += ["", "towers:", *(f"  {name:<14} {t.summary}" for name, t in TOWERS.items())]
    return "\n".join(lines)
