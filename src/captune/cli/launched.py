"""A command that ``torchrun`` or ``accelerate launch`` started several times."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any

from captune.errors import CaptuneError
from captune.processes import launched, leave, processes, watched

SHARED_COMMANDS = ("train", "evaluate")


def run_together(arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Run the command in this process as one of several; only the main one prints the result.

    Raises:
        CaptuneError: a command that one process does, or what the command raises.
    """
    if arguments.command not in SHARED_COMMANDS:
        raise CaptuneError(
            f"captune {arguments.command} runs in one process, and {launched()} were started: "
            f"several can share {' and '.join(SHARED_COMMANDS)}"
        )
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(watched())
            if not processes().main:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            return int(arguments.run(arguments, overrides))
    finally:  # after an error, too: who just ends may be aborted in place of its exit code
        leave()
