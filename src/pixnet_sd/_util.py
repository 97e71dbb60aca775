"""What the package says: its one logger and how loud it is, progress, and warnings.

The root logger is left to the application. Progress is a bar where somebody watches, and lines in the log elsewhere.
"""

from __future__ import annotations

import logging
import numbers
import os
import reprlib
import sys
import time
import warnings
from typing import Any

from tqdm import auto, std

from pixnet_sd.errors import PixNetError

logger = logging.getLogger("pixnet_sd")
if not logger.handlers:
    _handler = logging.StreamHandler()
    # an application that has set up logging prints for itself
    _handler.addFilter(lambda _: not logging.getLogger().handlers)
    _handler.setFormatter(logging.Formatter("pixnet_sd: %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.INFO)

_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}


class Settings:
    """Settings of the session, ``pixnet_sd.settings``; all else is an argument of the call that it concerns."""

    __slots__ = ()  # a name that is not here is a slip, not a new setting

    @property
    def verbosity(self) -> str | int:
        """Least important messages that are logged: ``"error"``, ``"warning"``, ``"info"`` or ``"debug"``.

        ``"info"`` by default. It is the level of the logger ``"pixnet_sd"``, and a level of :mod:`logging` can be given
        as well. Warnings of :mod:`warnings` and progress bars are not messages: see ``show_progress_bar`` of each verb.
        """
        return next((name for name, level in _LEVELS.items() if level == logger.level), logger.level)

    @verbosity.setter
    def verbosity(self, value: str | int) -> None:
        level = _LEVELS.get(value.lower()) if isinstance(value, str) else value
        if type(level) is not int or level < 0:  # True is an int, but no level
            raise PixNetError(f"verbosity={value!r}: give one of {', '.join(map(repr, _LEVELS))}, or a logging level.")
        logger.setLevel(level)

    def __repr__(self) -> str:
        return f"Settings(verbosity={self.verbosity!r})"


settings = Settings()

_SHORTEST_S, _LONGEST_S = 10.0, 300.0
_SHARE = 1 / 20  # of the time gone by that passes before the next line


class LineBar(std.tqdm):  # type: ignore[type-arg]
    """A bar that writes a line into the log every so often: a batch log shows carriage returns as a heap of bars.

    Lines come 10 seconds apart at first, 5 minutes apart in runs of hours, and one at the end.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._began_at = self._said_at = time.monotonic()
        self._said_n: float | None = None
        # gui: tqdm itself writes nothing. Whether a line is due is decided in `refresh` alone.
        super().__init__(*arguments, **{**options, "gui": True, "mininterval": 0, "miniters": 1, "smoothing": 0})

    def refresh(self, *_: Any, **__: Any) -> None:
        """Write a line if one is due."""
        now = time.monotonic()
        wait = min(max((now - self._began_at) * _SHARE, _SHORTEST_S), _LONGEST_S)
        if not self.disable and now - self._said_at >= wait:
            self._say(now)

    def close(self) -> None:
        """Write the last line, unless it was written."""
        if not self.disable and self.n not in (self._said_n, self.initial):
            self.postfix = None
            self._say(time.monotonic())
        super().close()

    def _say(self, now: float) -> None:
        """Log done of total, time gone and left, and what the bar was told to show."""
        self._said_at, self._said_n = now, self.n
        gone, done = now - self._began_at, self.n - self.initial
        total = "" if self.total is None else f" of {self.total:.0f}"
        line = f"{self.n:.0f}{total} {self.unit}s, {self.format_interval(gone)} gone"
        if self.total is not None and done and self.n < self.total:
            line += f", about {self.format_interval((self.total - self.n) * gone / done)} left"
        logger.info("%s", "; ".join([line, *(str(text) for text in (self.desc, self.postfix) if text)]))


def bar_class() -> type[Any]:
    """Kind of bar for where this runs: tqdm's own on a terminal or in a notebook, lines elsewhere."""
    in_notebook = auto.tqdm.display is not std.tqdm.display
    return auto.tqdm if in_notebook or sys.stderr.isatty() else LineBar


_OWN = __name__.partition(".")[0]
_WIDTH = 60


class _Short(reprlib.Repr):
    """Cuts what is long, and names what it does not know by its type: a slide's own text takes long and many lines."""

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to spell out numbers of thousands of digits."""
        return super().repr_int(x, level) if x.bit_length() < 4096 else f"<a number of {x.bit_length()} bits>"

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, os.PathLike | str):
            return self.repr_str(str(x), level)
        if isinstance(x, bytes):
            return repr(bytes(x[:_WIDTH]))
        spelt = str(x) if x is None or isinstance(x, bool | numbers.Real) else ""
        return spelt if 0 < len(spelt) <= _WIDTH else f"<{type(x).__name__}>"


_SHORT = _Short()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 4
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong = 2, _WIDTH, _WIDTH


def shown(value: Any) -> str:
    """Spell a value as Python does, cut where it is long."""
    return _SHORT.repr(value)


def warn(message: str) -> None:
    """Warn of the first caller outside the package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _OWN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
