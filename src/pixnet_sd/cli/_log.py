"""What a run says, on stderr: times where it goes to a file, and nothing of other libraries unless asked for."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from pixnet_sd._util import logger

__all__ = ["set_up_logging"]

_PACKAGE = str(Path(__file__).parents[1])
_CHATTY = ("spatialdata._logging", "spatialdata_plot._logging")
"""Loggers that write to stdout, where results go; squidpy uses the first."""


def set_up_logging(*, verbose: bool, quiet: bool) -> None:
    """Set up the package's logger and those of others.

    Parameters
    ----------
    verbose
        Show what other libraries say and warn of.
    quiet
        Show warnings and errors only.
    """
    watched = sys.stderr.isatty()
    formatter = logging.Formatter("%(message)s" if watched else "%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
    for handler in logger.handlers:
        handler.setFormatter(formatter)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    for name in _CHATTY:
        _divert(logging.getLogger(name), verbose)
    warnings.simplefilter("default")
    warnings.showwarning = _shown(verbose)


class _Diverted(logging.Filter):
    """Hands records to our logger, and keeps them from where they were meant for."""

    def __init__(self, verbose: bool) -> None:
        super().__init__()
        self._verbose = verbose

    def filter(self, record: logging.LogRecord) -> bool:
        """Hand a record on."""
        if self._verbose or record.levelno >= logging.WARNING:
            logger.handle(record)
        return False


def _divert(chatty: logging.Logger, verbose: bool) -> None:
    """Divert a logger, once."""
    for earlier in [found for found in chatty.filters if isinstance(found, _Diverted)]:
        chatty.removeFilter(earlier)
    chatty.addFilter(_Diverted(verbose))


def _shown(verbose: bool) -> Any:
    """Warnings as lines of the log: ours, and with `verbose` those of others with where they come from."""

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if filename.startswith(_PACKAGE) and issubclass(category, UserWarning):
            logger.warning("warning: %s", message)
        elif verbose:
            logger.warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)

    return show
