"""Reads a command line, runs the verb, and turns what goes wrong into an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from pixnet_sd.errors import PixNetError

from ._log import set_up_logging
from ._messages import as_options
from ._parser import Call, parse

__all__ = ["run_line"]


def run_line(arguments: Sequence[str]) -> int:
    """Run a command line; returns its exit code.

    Raises
    ------
    KeyboardInterrupt
        When it is interrupted, with a note on what becomes of its work.
    """
    try:
        call = parse(arguments)
    except SystemExit as done:  # of argparse: --help, --version, wrong usage
        return int(done.code or 0)
    set_up_logging(verbose=call.own["verbose"], quiet=call.own["quiet"])
    try:
        return _run(call)
    except KeyboardInterrupt as stop:
        stop.add_note(call.command.resume)
        raise


def _run(call: Call) -> int:
    try:
        code: int | None = import_module("._run", __package__).run(call)
    except PixNetError as error:
        return _fail(call, as_options(str(error), call.options))
    except ImportError as error:  # an extra that is not installed; says which
        return _fail(call, str(error))
    except BrokenPipeError:  # of `pixnet-sd info ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code or 0


def _fail(call: Call, message: str) -> int:
    if call.own["verbose"]:
        traceback.print_exc()
    print(f"pixnet-sd {call.command.name}: error: {message}", file=sys.stderr, flush=True)
    return 1
