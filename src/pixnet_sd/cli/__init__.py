"""The command line ``pixnet-sd``: the same verbs, for batch queues. Here is what ends a command, well or not."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._commands import COMMANDS as COMMANDS
    from ._parser import Call
    from ._parser import parse as parse

__all__ = ["main"]

_LATER = {"COMMANDS": "._commands", "parse": "._parser"}


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what a batch system sends before it kills."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of this process without the program's name; returns its exit code.

    Everything is imported in here, so that an interrupt meanwhile is answered as well.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    state = "Nothing was changed."
    try:
        from ._commands import COMMANDS
        from ._parser import parse

        call = parse(sys.argv[1:] if arguments is None else arguments, COMMANDS)
        state = call.command.resume
        return _execute(call)
    except SystemExit as done:  # of the parser: --help, --version, wrong usage
        return int(done.code or 0)
    except KeyboardInterrupt as stop:
        said, code = ("Terminated", 143) if isinstance(stop, _Terminated) else ("Interrupted", 130)
        print(f"{said}. {state}", file=sys.stderr, flush=True)
        return code
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: Any) -> None:
    raise _Terminated


def _execute(call: Call) -> int:
    from pixnet_sd.errors import PixNetError

    from ._run import set_up_logging

    set_up_logging(verbose=call.own.get("verbose", False), quiet=call.own.get("quiet", False))
    module, _, function = call.command.does.partition(".")
    try:
        return getattr(import_module(f".{module}", __name__), function)(call) or 0
    except (PixNetError, ImportError) as error:  # the latter says which extra is not installed
        if call.own.get("verbose"):
            import traceback

            traceback.print_exc()
        flag = call.command.flags.get(getattr(error, "argument", None) or "")
        about = f"{flag.flag}: " if flag else ""
        print(f"pixnet-sd {call.command.name}: error: {about}{error}", file=sys.stderr, flush=True)
        return 1
    except BrokenPipeError:  # of `pixnet-sd info ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def __getattr__(name: str) -> Any:
    """Import the grammar on first use."""
    if name in _LATER:
        return getattr(import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
