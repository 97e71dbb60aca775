"""Entry point of ``pixnet-sd``: reads the command line, runs the verb, and turns what goes wrong into an exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pixnet_sd._errors import PixNetError

from ._log import set_up_logging
from ._messages import as_options
from ._parser import Call, parse

__all__ = ["main"]

INTERRUPTED, TERMINATED = 130, 143


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what a batch system sends before it kills."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code.

    Parameters
    ----------
    arguments
        Without the program's name; default: those of this process.
    """
    try:
        call = parse(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as done:  # of argparse: --help, --version, wrong usage
        return int(done.code or 0)
    set_up_logging(verbose=call.own["verbose"], quiet=call.own["quiet"])
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(call)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: Any) -> None:
    raise _Terminated


def _run(call: Call) -> int:
    try:
        code: int | None = import_module("._run", __package__).run(call)
    except PixNetError as error:
        return _fail(call, as_options(str(error), call.options))
    except ImportError as error:  # an extra that is not installed; says which
        return _fail(call, str(error))
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, _Terminated)
        _say(f"{'Terminated' if terminated else 'Interrupted'}. {call.command.resume}")
        return TERMINATED if terminated else INTERRUPTED
    except BrokenPipeError:  # of `pixnet-sd info ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code or 0


def _fail(call: Call, message: str) -> int:
    if call.own["verbose"]:
        traceback.print_exc()
    _say(f"pixnet-sd {call.command.name}: error: {message}")
    return 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
