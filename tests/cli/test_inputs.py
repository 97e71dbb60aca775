"""Paths on the command line: names of slides, stores, and Space Ranger folders that become stores."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import spatialdata as sd

from pixnet_sd.cli import main
from pixnet_sd.cli._info import describe
from pixnet_sd.cli._inputs import named_paths, open_slide, open_slides
from pixnet_sd.datasets import write_visium, write_visium_hd
from pixnet_sd.errors import DataError, PixNetError, StoreError
from pixnet_sd.io import convert_visium_hd


@pytest.fixture(scope="module")
def outs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "outs"
    return write_visium_hd(folder, size_um=110.0, mpp=0.5, n_genes=8, dataset_id="s", n_workers=1)


def test_names(tmp_path):
    (tmp_path / "with=sign.zarr").mkdir()
    given = ["C2.zarr", "p1=x/C3.zarr", "s9/outs", str(tmp_path / "with=sign.zarr")]
    found = named_paths(given)
    assert list(found) == ["C2", "p1", "s9", "with=sign"]
    assert found["p1"] == Path("x/C3.zarr")


def test_two_of_a_name():
    with pytest.raises(PixNetError, match=r"Give them names, as in C2_1=a/C2.zarr C2_2=b/C2.zarr"):
        named_paths(["a/C2.zarr", "b/C2.zarr"])


def test_space_ranger_folder(outs, tmp_path, capsys, caplog):
    """Converted beside it, said so, and taken as it is the second time; `info` knows it, too."""
    assert main(["info", str(outs)]) == 0
    described = capsys.readouterr().out
    assert "Space Ranger folder of Visium HD" in described
    assert "bins of 8 µm: " in described
    sdata = open_slide(outs.parent)
    store = outs.with_name("outs.zarr")
    assert sdata.path == store
    assert f"converting the Space Ranger folder {outs} to the store {store}" in caplog.text
    changed = (store / "zarr.json").stat().st_mtime_ns
    assert open_slide(outs).path == store
    assert (store / "zarr.json").stat().st_mtime_ns == changed
    assert f"{outs} was converted before: taking {store}" in caplog.text
    matrix = next(outs.rglob("filtered_feature_bc_matrix.h5"))
    before = matrix.stat().st_mtime_ns
    os.utime(matrix, ns=(0, 0))  # as if Space Ranger had run again
    with pytest.raises(StoreError, match=matrix.parent.name):
        open_slide(outs)
    os.utime(matrix, ns=(before, before))


def test_convert(outs, tmp_path, capsys):
    store = tmp_path / "s.zarr"
    assert main(["convert", str(outs), str(store), "--bin-um", "8,16"]) == 0
    assert capsys.readouterr().out == f"{store}\n"
    assert set(sd.read_zarr(store).tables) >= {"square_008um", "square_016um"}
    assert "square_002um" not in sd.read_zarr(store).tables


def test_neither(tmp_path):
    with pytest.raises(StoreError, match=r"neither a SpatialData store .* nor a Space Ranger folder .*outs\.$"):
        open_slide(tmp_path)


@pytest.mark.parametrize("dataset_id", ["s", ""])
def test_visium(dataset_id, tmp_path):
    """Of spots: no folder of Visium HD, but known, and what reads it is said."""
    outs = write_visium(tmp_path / "outs", size_um=200.0, n_genes=4, dataset_id=dataset_id)
    for ask in (open_slide, describe):
        for path in (outs, outs.parent):
            with pytest.raises(
                StoreError, match=r"of Visium, not of Visium HD.* spatialdata_io\.visium\('.*/outs', full"
            ):
                ask(path)
    with pytest.raises(DataError, match="of Visium, not of Visium HD"):
        convert_visium_hd(outs, tmp_path / "s.zarr")


def test_no_image(outs, tmp_path):
    """What is to be given is an option of convert alone."""
    folder = shutil.copytree(outs, tmp_path / "outs", ignore=shutil.ignore_patterns("microscope_image", "*.tif*"))
    said = r"give the file that went into it with `--image`\. \(An option of pixnet-sd convert"
    with pytest.raises(DataError, match=said):
        open_slide(folder)
    assert re.search(said, describe(folder))


def test_bins_of_visium_hd_are_not_taken_for_visium(outs):
    with pytest.raises(StoreError, match="neither a SpatialData store"):
        open_slide(outs / "binned_outputs" / "square_008um")


def test_says_what_it_reads_before_it_imports(drawn, caplog):
    """Imports take seconds."""
    for ask in (open_slide, describe):
        caplog.clear()
        ask(drawn)
        assert caplog.messages[0] == f"reading {drawn}"


def test_store_is_for_one_folder(drawn):
    with pytest.raises(PixNetError, match="there are 2 slides"):
        open_slides(["a.zarr", "b.zarr"], "s.zarr")
    with pytest.raises(PixNetError, match="--zarr is for Space Ranger folders"):
        open_slides([str(drawn)], "s.zarr")
