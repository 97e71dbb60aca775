from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pixnet_sd.datasets import write_visium_hd


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Space Ranger folder with cells; not to be changed."""
    return write_visium_hd(
        tmp_path_factory.mktemp("drawn") / "outs", size_um=110.0, mpp=0.5, n_genes=8, dataset_id="s", n_workers=1
    )


@pytest.fixture
def folder(drawn: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(drawn, tmp_path / "outs"))
