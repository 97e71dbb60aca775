"""The package's one logger. The root logger is left to the application."""

from __future__ import annotations

import logging

__all__ = ["logger"]


class _UnlessConfigured(logging.StreamHandler):  # type: ignore[type-arg]
    """Prints to stderr, unless the application has set up logging and prints for itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


logger = logging.getLogger("pixnet_sd")
if not logger.handlers:
    _handler = _UnlessConfigured()
    _handler.setFormatter(logging.Formatter("pixnet_sd: %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.INFO)
