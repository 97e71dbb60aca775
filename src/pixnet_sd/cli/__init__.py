"""The command line ``pixnet-sd``: the same verbs, for batch queues."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

INTERRUPTED, TERMINATED = 130, 143


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what a batch system sends before it kills."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code.

    Everything is imported in here, so that an interrupt meanwhile is answered as well.

    Parameters
    ----------
    arguments
        Without the program's name; default: those of this process.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        from ._main import run_line

        return run_line(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: Any) -> None:
    raise _Terminated


def _stopped(stop: KeyboardInterrupt) -> int:
    """Say so, and what the command noted on what becomes of its work."""
    terminated = isinstance(stop, _Terminated)
    (state,) = getattr(stop, "__notes__", [])[:1] or ["Nothing was changed."]
    print(f"{'Terminated' if terminated else 'Interrupted'}. {state}", file=sys.stderr, flush=True)
    return TERMINATED if terminated else INTERRUPTED
