"""The command line: parses, calls, prints. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from captune.cli.commands import EXIT_INTERRUPTED
from captune.cli.parser import build_parser
from captune.config import FIELDS, parse_value
from captune.console import SPEAKS
from captune.errors import CaptuneError, nearest

EXIT_USER_ERROR = 2

# Of several processes the first as a rule says the same, and the launcher then ends the others.
SECONDS_BEFORE_OTHERS_SPEAK = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0, 2 for wrong input, 130 for Ctrl-C)."""
    try:
        arguments, rest = build_parser().parse_known_args(argv)
        overrides = parse_overrides(_take_data(rest, arguments), arguments)
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            from captune.cli.launched import run_together

            return run_together(arguments, overrides)
        return int(arguments.run(arguments, overrides))
    except CaptuneError as error:
        if not SPEAKS:
            time.sleep(SECONDS_BEFORE_OTHERS_SPEAK)
        print(f"captune: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        if error.filename is None:
            raise  # no file of the user's: a defect to be seen whole
        print(f"captune: error: {error.strerror}: {error.filename}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        if SPEAKS:
            print("captune: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _take_data(rest: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    """An optional DATA may stand behind options too; argparse leaves it over there."""
    words = list(rest)
    if arguments.command in ("evaluate", "blend") and arguments.data is None:
        for place, word in enumerate(words):
            if not word.startswith("--"):
                arguments.data = words.pop(place)
                break
    return words


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
        if word.startswith("--") and not (arguments.takes_config and key in FIELDS):
            wanted = f"--{key.replace('_', '-')}"
            # An argument without dashes, such as DATA, is no option of that name.
            hint = nearest(wanted, [name for name in _options(arguments) if name != wanted])
            raise CaptuneError(f"captune {arguments.command} has no option {word!r}{hint}")
        if not arguments.takes_config:
            raise CaptuneError(f"captune {arguments.command} takes no config values: {word!r}")
        if not equals:
            is_flag = isinstance(FIELDS[key].default, bool)
            if words and not words[0].startswith("--") and not (is_flag and "=" in words[0]):
                value = words.pop(0)
            elif is_flag:
                value = "true"
            else:
                raise CaptuneError(f"--{key.replace('_', '-')} wants a value")
        overrides[key] = parse_value(key, value)
    return overrides


def _options(arguments: argparse.Namespace) -> list[str]:
    """All options of the command, config keys among them where it takes them."""
    internal = {"run", "takes_config", "command", "kind"}
    names = {name for name in vars(arguments) if name not in internal}
    names |= set(FIELDS) if arguments.takes_config else set()
    return [f"--{name.replace('_', '-')}" for name in names]
