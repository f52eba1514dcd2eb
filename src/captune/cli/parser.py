"""What the command line takes. Nothing heavy is imported: ``captune --help`` answers at once."""

from __future__ import annotations

import argparse
import os
from typing import Any, NoReturn

from captune import __version__
from captune.cli import commands
from captune.cli.data_parser import add_data
from captune.cli.options import (
    add_own_towers,
    add_split,
    add_table_options,
    command,
    config_help,
)
from captune.errors import CaptuneError


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
        add_data,
    ):
        add(subparsers)
    return parser


def _add_demo(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "demo",
        commands.demo,
        "draw pictures, train on them, write a report: no data and no network needed",
        epilog=config_help(),
    )
    parser.add_argument("--out", default=os.path.join("runs", "demo"), help="the run's folder")
    parser.add_argument("--images", type=int, help="scenes to train on")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    parser.set_defaults(takes_config=True)


def _add_train(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "train",
        commands.train,
        "train on a COCO 2014 folder or a table of images and captions",
        epilog=config_help(),
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
    add_table_options(parser)
    parser.set_defaults(takes_config=True)


def _add_compare(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "compare",
        commands.compare,
        "train every combination of some config values over seeds, and say which truly differ",
        epilog=config_help(),
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
    add_split(parser)
    add_table_options(parser)
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    parser.set_defaults(takes_config=True)


def _add_evaluate(subparsers: Any) -> None:
    parser = command(subparsers, "evaluate", commands.evaluate, "Recall@K of a run, both ways")
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
    add_split(parser)
    add_own_towers(parser)
    add_table_options(parser)
    printed = parser.add_mutually_exclusive_group()
    printed.add_argument("--json", action="store_true", help="print the metrics as JSON")
    printed.add_argument(
        "--format", choices=("text", "markdown", "latex"), default="text", help="for papers"
    )


def _add_blend(subparsers: Any) -> None:
    parser = command(
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
    add_split(parser)
    add_own_towers(parser)
    add_table_options(parser)
    parser.add_argument("--json", action="store_true", help="print the blend as JSON")


def _add_search(subparsers: Any) -> None:
    parser = command(subparsers, "search", commands.search, "the pictures that best answer a text")
    parser.add_argument("model", metavar="RUN", help="a run, RUN@stage-1, or a CLIP")
    parser.add_argument("query", metavar="QUERY", help='such as "a dog on a beach"')
    parser.add_argument("-k", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--data", help="default: the run's own data")
    add_split(parser)
    add_own_towers(parser)
    add_table_options(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def _add_classify(subparsers: Any) -> None:
    parser = command(subparsers, "classify", commands.classify, "zero-shot labels of image files")
    parser.add_argument("model", metavar="RUN", help="a run, RUN@stage-1, or a CLIP")
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    parser.add_argument("--labels", nargs="+", required=True, metavar="LABEL")
    parser.add_argument("--template", action="append", help="prompt with {} (repeatable; averaged)")
    add_own_towers(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def _add_zeroshot(subparsers: Any) -> None:
    parser = command(
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
    add_own_towers(parser)
    add_table_options(parser)
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")


def _add_bench(subparsers: Any) -> None:
    parser = command(
        subparsers,
        "bench",
        commands.bench,
        "where a training step's time goes on this machine, and what would make it faster",
        epilog=config_help(),
    )
    parser.add_argument("data", metavar="DATA", help="COCO 2014 folder, .csv, .jsonl or .parquet")
    parser.add_argument("--steps", type=int, default=8, help="steps timed each way (default 8)")
    add_table_options(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(takes_config=True)
