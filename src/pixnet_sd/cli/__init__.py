"""The command line ``pixnet-sd``: the same verbs, for batch queues."""

from __future__ import annotations

from ._main import main

__all__ = ["main"]
