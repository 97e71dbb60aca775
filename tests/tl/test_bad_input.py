"""What users get wrong: the verbs refuse it before any work and name argument or element; stores stay as they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import anndata as ad
import geopandas as gpd
import numpy as np
import pytest
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Affine, Identity, Translation, get_transformation, set_transformation
from tests.tl.conftest import BINS, FULL, TABLE, content, in_memory

from pixnet_sd import tl
from pixnet_sd.errors import CheckpointError, DataError, ElementError, PixNetError, ResolutionError, StoreError


@pytest.fixture(autouse=True)
def _store_stays_as_it_was(fitted, forward_passes):
    """Every test here breaks the object in memory; nothing of that, nor of a refused call, may reach the disk."""
    before = content(fitted.path)
    yield
    assert content(fitted.path) == before
    assert forward_passes == []  # refused before any work
    assert not list(Path(fitted.path).parent.glob(".*pixnet_sd*"))


def replaced(sdata, pixels, names=("r", "g", "b"), **options):
    """The full image with other pixels."""
    options["transformations"] = get_transformation(sdata.images[FULL], get_all=True)
    sdata.images[FULL] = Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=list(names), **options)


def pixels_of(sdata) -> np.ndarray:
    return sdata.images[FULL]["scale0"]["image"].values


def two_images(sdata):
    sdata.images["one"] = Image2DModel.parse(pixels_of(sdata)[:, ::-1], transformations={"sample": Identity()})


def with_pixels(change: Callable[..., Any], names="rgb") -> Callable[..., None]:
    return lambda sdata: replaced(sdata, change(pixels_of(sdata)), names)


def placed(key: str, transformation: Any, system: str | None = "sample", **options: Any) -> Callable[..., None]:
    return lambda sdata: set_transformation(sdata[key], transformation, system, **options)


sheared = placed(FULL, Affine([[1, 0.3, 0], [0, 1, 0], [0, 0, 1]], *[("x", "y")] * 2))
elsewhere = placed(BINS, {"elsewhere": Identity()}, None, set_all=True)
moved_regions = placed(BINS, Translation([5000, 0], axes=("x", "y")))


def twice(sdata):
    bins = sdata.shapes[BINS]
    frame = gpd.GeoDataFrame(geometry=[*bins.geometry, bins.geometry.iloc[0]], index=[*bins.index, bins.index[0]])
    sdata.shapes[BINS] = ShapesModel.parse(frame, transformations=get_transformation(bins, get_all=True))


def no_region(sdata):
    sdata.tables[TABLE] = ad.AnnData(sdata.tables[TABLE].X.copy())


def one_nan(sdata):
    x = sdata.tables[TABLE].X.tolil()
    x[7, sdata.tables[TABLE].var_names.get_loc("ACTB")] = np.nan
    sdata.tables[TABLE].X = x.tocsr()


def doubled_gene(sdata):
    sdata.tables[TABLE].var_names = ["ACTB", "ACTB", *sdata.tables[TABLE].var_names[2:]]


IMAGE = {"image_key": FULL}


class Bad(NamedTuple):
    """What is broken, and the name or number that the error of `fit`, `predict` or both has to give."""

    change: Callable[..., None]
    error: type[PixNetError]
    names: str
    only: str = ""
    arguments: dict[str, Any] = {}  # noqa: RUF012


BAD = {
    "no image": Bad(lambda sdata: sdata.images.clear(), ElementError, "Image2DModel"),
    "several images": Bad(two_images, ElementError, "one.*image_key="),
    "no such image": Bad(lambda _: None, ElementError, FULL, "", {"image_key": "full"}),
    "4 stains": Bad(with_pixels(lambda p: p[[0, 1, 2, 0]], ["DAPI", "CD3", "CD20", "CK"]), DataError, "CD3", "", IMAGE),
    "uint16": Bad(with_pixels(lambda p: p.astype(np.uint16) * 257), DataError, "uint16", "", IMAGE),
    "glass": Bad(with_pixels(lambda p: np.full_like(p, 240)), DataError, "image_key=", "predict"),
    "mpp unknown": Bad(lambda s: s.shapes.update(bins=s.shapes.pop(BINS)), ResolutionError, "bins.*mpp=", "predict"),
    "mpp too large": Bad(lambda _: None, ResolutionError, "mpp = 8", "", {"mpp": 8.0}),
    "shear": Bad(sheared, ResolutionError, FULL, "", IMAGE),
    "no such system": Bad(lambda _: None, ElementError, "global", "", {"coordinate_system": "global"}),
    "off the image": Bad(moved_regions, ResolutionError, BINS, "predict", {"shapes_key": BINS}),
    "off the image, fit": Bad(moved_regions, ResolutionError, BINS, "fit"),
    "a bin twice": Bad(twice, DataError, BINS),
    "no shared system": Bad(elsewhere, ElementError, "elsewhere", "predict", {"shapes_key": BINS}),
    "table of no region": Bad(no_region, ElementError, TABLE, "fit", {"table_key": TABLE}),
    "NaN": Bad(one_nan, DataError, "ACTB.*row 7", "fit"),
    "a gene twice": Bad(doubled_gene, DataError, "var_names", "fit"),
}


@pytest.mark.filterwarnings("ignore:mpp = ")
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_refused(fitted, fit, predict, tmp_path, bad):
    bad.change(fitted)
    if bad.only != "predict":
        with pytest.raises(bad.error, match=f"(?s){bad.names}"):
            fit(fitted, checkpoint_dir=tmp_path / "new", **bad.arguments)
        assert not (tmp_path / "new").exists()
    if bad.only != "fit":
        with pytest.raises(bad.error, match=f"(?s){bad.names}"):
            predict(in_memory(fitted), radius_um=8, **bad.arguments)


def test_a_bin_twice_cannot_be_scored(fitted):
    twice(fitted)
    measured = fitted.tables[TABLE].copy()
    measured.uns["pixnet_sd"] = {"target_sum": 1e4}
    fitted.tables["pixnet_bins"] = measured
    with pytest.raises(DataError, match=BINS):
        tl.evaluate(fitted, table_key=TABLE, predicted_key="pixnet_bins")


def test_models(fitted, checkpoint, predict, tmp_path):
    """Two that are recorded, one that was moved, and none."""
    fitted.attrs["pixnet_sd"]["model"] = str(tmp_path / "moved")
    for sdata, names in ((fitted, f"moved.*{checkpoint}.*model="), (in_memory(fitted), "moved")):
        with pytest.raises(CheckpointError, match=names):
            predict(sdata, radius_um=8)
    fitted.attrs.clear()
    with pytest.raises(CheckpointError, match="model="):
        predict(in_memory(fitted), radius_um=8)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"write": None}, "write=None"),
        ({"radius_um": 8, "bin_um": 8}, "bin_um"),
        ({"spacing_um": 8}, "radius_um"),
        ({"radius_um": 8, "spacing_um": 1e-6}, "spacing_um=1e-06"),
        ({"bin_um": 0.2}, "bin_um=0.2.*bin_um=0.5"),
        ({"radius_um": 1e-3, "shapes_key": BINS}, "radius_um=0.001"),
        ({"radius_um": 1e9, "shapes_key": BINS}, r"radius_um=1e\+09"),
        ({"radius_um": 4000}, "radius_um=4000"),
        ({"map_um": 10}, "map_um=8"),
        ({"map_um": 2}, "map_um=4"),
        ({"map_um": 400}, "map_um=200"),
        ({"map_um": 8, "write": "factors"}, "map_um=8"),
        ({"tile_px": 2**20}, "tile_px=1048576"),
        ({"batch_size": 2**16}, "batch_size=65536"),
        ({"mpp": 1e9, "allow_any_mpp": True}, "mpp=1e"),
        ({"mpp": 1e-9, "allow_any_mpp": True}, "mpp=1e-09"),
        ({"shapes_key": "cells"}, "shapes_key="),
        ({"shapes_key": FULL}, FULL),
        ({"genes": ["actb"]}, "actb"),
    ],
)
@pytest.mark.filterwarnings("ignore:mpp = ")
def test_arguments_that_do_not_fit(fitted, predict, arguments, names):
    """Calls of one slide that nothing is wrong with."""
    with pytest.raises(PixNetError, match=f"(?s){names}"):
        predict(fitted, **arguments)


@pytest.mark.parametrize("arguments", [{"map_um": 8}, {"write": None, "radius_um": 8}], ids=str)
def test_disk_too_small(fitted, predict, monkeypatch, arguments):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match="genes=.*map_um="):
        predict(fitted, **arguments)


moved_image = placed(FULL, Translation([40, 0], axes=("x", "y")), "again")


def other_pixels(sdata):
    replaced(sdata, pixels_of(sdata)[:, :, ::-1], scale_factors=[2])


@pytest.mark.parametrize(("change", "name"), [(moved_image, FULL), (other_pixels, FULL), (moved_regions, BINS)])
def test_changed_only_in_memory(fitted, predict, change, name):
    """Results go into the store, and would lie beside what it has."""
    change(fitted)
    with pytest.raises(StoreError, match=name):
        predict(fitted, shapes_key=BINS)
