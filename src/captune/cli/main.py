"""The command line: parses, calls, prints. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from captune.cli.commands import EXIT_INTERRUPTED
from captune.cli.parser import build_parser
from captune.config import FIELDS, parse_value
from captune.errors import CaptuneError, nearest

EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0, 2 for wrong input, 130 for Ctrl-C)."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    try:
        overrides = parse_overrides(rest, arguments)
        return int(arguments.run(arguments, overrides))
    except CaptuneError as error:
        print(f"captune: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("captune: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def parse_overrides(rest: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """``key=value``, ``--key value`` and ``--flag`` as config values.

    Raises:
        CaptuneError: an unknown key, a missing value, or a command that takes no config.
    """
    overrides: dict[str, Any] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not word.startswith("--") and not equals:
            raise CaptuneError(f"unexpected word {word!r}; config values are written key=value")
        if not arguments.takes_config:
            known = [name.replace("_", "-") for name in vars(arguments) if name[0] != "_"]
            hint = nearest(key.replace("_", "-"), set(known) - {"run", "takes-config", "command"})
            raise CaptuneError(f"captune {arguments.command} has no option {word!r}{hint}")
        if not equals:
            is_flag = key in FIELDS and isinstance(FIELDS[key].default, bool)
            if words and not words[0].startswith("--") and not (is_flag and "=" in words[0]):
                value = words.pop(0)
            elif is_flag:
                value = "true"
            elif key in FIELDS:
                raise CaptuneError(f"--{key.replace('_', '-')} wants a value")
        overrides[key] = parse_value(key, value)
    return overrides
