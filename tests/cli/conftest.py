"""One small slide and what the commands make of it, each run as a process once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import pixnet_sd as ps
from pixnet_sd._util import logger
from pixnet_sd.cli._log import _CHATTY

TINY = {
    "encoder": "test_resnet",
    "encoder-weights": "none",
    "decoder-width": "16",
    "working-mpp": "1",
    "tile-px": "128",
    "batch-size": "4",
    "n-genes": "6",
    "max-epochs": "1",
    "device": "cpu",
}
"""Options of `fit` that make it take half a second."""


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """`main` sets up the logging of a process, and here it is not alone in it."""
    level, formatters = logger.level, [handler.formatter for handler in logger.handlers]
    others = {name: list(logging.getLogger(name).filters) for name in _CHATTY}
    with warnings.catch_warnings():
        yield
    logger.setLevel(level)
    for handler, formatter in zip(logger.handlers, formatters, strict=True):
        handler.setFormatter(formatter)
    for name, filters in others.items():
        logging.getLogger(name).filters = filters


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    return [f"--{name}={value}" for name, value in TINY.items()]


@pytest.fixture(scope="session")
def pixnet_sd() -> Callable[..., CompletedProcess[str]]:
    """The command line as a process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}

    def run(*arguments: str | Path, code: int = 0) -> CompletedProcess[str]:
        command = [sys.executable, "-m", "pixnet_sd.cli", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == code, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide with an image and counts; not to be changed."""
    store = tmp_path_factory.mktemp("drawn") / "slide.zarr"
    ps.datasets.sample(size_um=200, mpp=1.0, bin_um=(8,)).write(store)
    return store
