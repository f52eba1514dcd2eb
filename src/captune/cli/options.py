"""What the parsers of several commands share: how one is made, and options they have in common."""

from __future__ import annotations

import argparse
from typing import Any

from captune.config import FIELDS
from captune.recipes import RECIPES, TOWERS


def command(subparsers: Any, name: str, run: Any, help: str, **options: Any) -> Any:
    """The parser of a command that calls ``run``; ``options`` are argparse's own."""
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


def add_split(parser: Any) -> None:
    """``--split``, of commands that measure."""
    parser.add_argument("--split", help="default: the validation split")


def add_own_towers(parser: Any) -> None:
    """The factories of towers that a run cannot rebuild."""
    own = parser.add_argument_group("runs with towers of one's own")
    own.add_argument("--image-encoder", default="", metavar="package.module:factory")
    own.add_argument("--text-encoder", default="", metavar="package.module:factory")


def add_table_options(parser: Any) -> None:
    """How own tables are read, a second one to validate on among it."""
    table = parser.add_argument_group("own tables")
    add_column_options(table)
    table.add_argument("--val", default="", metavar="FILE", help="a table to validate on")


def add_column_options(group: Any) -> None:
    """Which columns of an own table are meant."""
    group.add_argument("--image-column", default="", metavar="NAME")
    group.add_argument("--caption-column", action="append", default=[], metavar="NAME")
    group.add_argument("--caption", default="", metavar="TEMPLATE", help="'{title}, {colour}'")


def config_help() -> str:
    """Every config key with its default, below the options."""
    lines = ["config values, written key=value or --key value after the rest:"]
    for key, spec in FIELDS.items():
        choices = spec.metadata.get("choices")
        kinds = f" ({', '.join(choices)})" if choices else ""
        lines.append(f"  {key:<22} {spec.default!r:<16} {spec.metadata['help']}{kinds}")
    lines += ["", "recipes:", *(f"  {name:<14} {r.summary}" for name, r in RECIPES.items())]
    lines += ["", "towers:", *(f"  {name:<14} {t.summary}" for name, t in TOWERS.items())]
    return "\n".join(lines)
