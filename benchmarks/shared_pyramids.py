"""A frozen encoder's maps are the same for every model that is trained on it: made once for a whole benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from pixnet_sd.engine.train import PyramidCache


@contextmanager
def shared_pyramids(folder: Path) -> Iterator[None]:
    """Runs of `fit` in here, on slides and tiles of the same names and places, keep their pyramids in ``folder``."""

    init = PyramidCache.__init__

    def shared(self: PyramidCache, encoder: Any, _directory: Path, stain_jitter: float, seed: int) -> None:
        init(self, encoder, folder, stain_jitter, seed)

    with mock.patch.multiple(PyramidCache, __init__=shared, clear=lambda _: None):
        yield
