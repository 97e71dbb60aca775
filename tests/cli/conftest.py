"""One small slide, and `main` with the logging of this process kept as it was."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

import pixnet_sd as ps
from pixnet_sd.cli import main


def printed(*arguments: object) -> str:
    """Run a command, by default that of this process, and return what it prints."""
    with redirect_stdout(StringIO()) as stdout:
        assert main([*map(str, arguments)] or None) == 0
    return stdout.getvalue()


@pytest.fixture(autouse=True)
def _logging_as_before(monkeypatch) -> Iterator[None]:
    """`main` sets up the logging of a process, and here it is not alone in it."""
    monkeypatch.setattr(ps.settings, "verbosity", ps.settings.verbosity)
    for logger in map(logging.getLogger, ("pixnet_sd", "spatialdata._logging", "spatialdata_plot._logging")):
        monkeypatch.setattr(logger, "filters", list(logger.filters))
        for handler in logger.handlers:
            monkeypatch.setattr(handler, "formatter", handler.formatter)
    with warnings.catch_warnings():
        yield


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Options of `fit` that make it take half a second."""
    model = ["--encoder=test_resnet", "--encoder-weights=none", "--decoder-width=16", "--working-mpp=1", "--genes=6"]
    return [*model, "--tile-px=128", "--batch-size=4", "--max-epochs=1", "--device=cpu", "--no-show-progress-bar"]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide with an image and counts; not to be changed."""
    store = tmp_path_factory.mktemp("drawn") / "slide.zarr"
    ps.datasets.sample(size_um=200, mpp=1.0, bin_um=(8,)).write(store)
    return store
