"""What every room's tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


def _share_bytecode() -> None:
    """Where Python may write no bytecode beside the sources, keep it in pytest's cache instead.

    Compiling torch, timm, spatialdata and squidpy anew takes 15 s of a core, and every process that a test starts would
    do it: once is enough for all of them.
    """
    if sys.dont_write_bytecode and sys.pycache_prefix is None:
        sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
        sys.dont_write_bytecode = False
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


_share_bytecode()  # before the rooms' own conftest.py import anything large


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # only now: most runs of one room's tests need no torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
