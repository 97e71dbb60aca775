"""What a session can set: how much pixnet_sd says. Everything else is an argument of the call that it concerns."""

from __future__ import annotations

import logging

from pixnet_sd._util import logger
from pixnet_sd.errors import PixNetError

__all__ = ["Settings", "settings"]

_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}


class Settings:
    """Settings of the session, ``pixnet_sd.settings``."""

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
        logger.setLevel(_level(value))

    def __repr__(self) -> str:
        return f"Settings(verbosity={self.verbosity!r})"


def _level(value: str | int) -> int:
    if isinstance(value, str) and value.lower() in _LEVELS:
        return _LEVELS[value.lower()]
    if type(value) is int and value >= 0:  # True is an int, but no level
        return value
    raise PixNetError(f"verbosity={value!r}: give one of {', '.join(map(repr, _LEVELS))}, or a logging level.")


settings = Settings()
"""The one instance."""
