"""Paths on the command line: names of slides, stores, and Space Ranger folders that become stores."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import spatialdata as sd
from tests.cli.conftest import printed

from pixnet_sd.cli import main
from pixnet_sd.datasets import write_visium, write_visium_hd


@pytest.fixture(scope="module")
def outs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "outs"
    return write_visium_hd(folder, size_um=110.0, mpp=0.5, n_genes=8, dataset_id="s", n_workers=1)


@pytest.fixture
def refused(capsys):
    """Run a command that fails, and return what it says."""

    def run(*arguments: str | Path) -> str:
        assert main([*map(str, arguments)]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        return said.err.splitlines()[-1]

    return run


def test_names_and_what_is_no_slide(outs, tmp_path, monkeypatch, refused):
    """A path that is there names no slide before its ``=``."""
    monkeypatch.chdir(tmp_path)
    Path("with=sign.zarr").mkdir()
    assert "'with=sign.zarr' is neither a SpatialData store" in refused("fit", "with=sign.zarr")
    assert "nothing at 'x/C3.zarr'" in refused("fit", "p1=x/C3.zarr", "C3.zarr")
    assert "Space Ranger's outs." in refused("predict", outs / "binned_outputs" / "square_008um")
    assert "Space Ranger's outs, or the folder of a model" in refused("info", "nowhere")
    assert "C2_1=a/C2.zarr C2_2=b/C2.zarr" in refused("fit", "a/C2.zarr", "b/C2.zarr")
    assert "s9_1=s9/outs s9_2=s9.zarr" in refused("cross-validate", "s9/outs", "s9.zarr")


def test_space_ranger_folder(outs, caplog, refused):
    """Converted beside it, said so, and taken as it is the second time; `info` knows it, too."""
    described = printed("info", outs)
    assert "Space Ranger folder of Visium HD" in described
    assert "bins of 8 µm: " in described
    store = outs.with_name("outs.zarr")
    assert "--model" in refused("predict", outs.parent, "--model=nowhere")
    assert caplog.messages[:2] == [  # the first by `info`, before imports that take seconds
        f"reading {outs}",
        f"converting the Space Ranger folder {outs} to the store {store}",
    ]
    changed = (store / "zarr.json").stat().st_mtime_ns
    refused("predict", outs, "--model=nowhere")
    assert (store / "zarr.json").stat().st_mtime_ns == changed
    assert f"{outs} was converted before: taking {store}" in caplog.text
    matrix = next(outs.rglob("filtered_feature_bc_matrix.h5"))
    before = matrix.stat().st_mtime_ns
    os.utime(matrix, ns=(0, 0))  # as if Space Ranger had run again
    assert matrix.parent.name in refused("predict", outs)
    os.utime(matrix, ns=(before, before))


def test_convert(outs, tmp_path):
    store = tmp_path / "s.zarr"
    assert printed("convert", outs, store, "--bin-um", "8,16") == f"{store}\n"
    assert {key for key in sd.read_zarr(store).tables if "square" in key} == {"square_008um", "square_016um"}


def test_visium(tmp_path, refused):
    """Of spots: no folder of Visium HD, but known, and what reads it is said."""
    outs = write_visium(tmp_path / "outs", size_um=200.0, n_genes=4, dataset_id="")
    assert "spatialdata_io.visium(" in refused("fit", outs)
    assert "spatialdata_io.visium(" in refused("info", outs.parent)
    assert "of Visium, not of Visium HD" in refused("convert", outs, tmp_path / "s.zarr")


def test_no_image(outs, tmp_path, refused):
    """What is to be given is an option of convert alone."""
    folder = shutil.copytree(outs, tmp_path / "outs", ignore=shutil.ignore_patterns("microscope_image", "*.tif*"))
    assert "pixnet-sd convert" in refused("fit", folder)
    assert "cannot be converted as it is" in printed("info", folder)


def test_store_is_for_one_folder(drawn, refused):
    assert "--zarr" in refused("fit", "a.zarr", "b.zarr", "--zarr=s.zarr")
    assert "--zarr" in refused("fit", drawn, "--zarr=s.zarr")
