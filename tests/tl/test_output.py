"""What `predict` leaves is read back as it was, and drawn by squidpy and spatialdata-plot at the first call."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import spatialdata as sd
import xarray as xr
from anndata import AnnData
from anndata.tests.helpers import assert_equal
from geopandas import GeoDataFrame
from geopandas.testing import assert_geodataframe_equal
from spatialdata.transformations import get_transformation
from tests.tl.conftest import BINS, FULL, TABLE, names

mpl.use("Agg")

import matplotlib.pyplot as plt


@pytest.fixture(scope="module")
def predicted(_fitted, predict, tmp_path_factory) -> sd.SpatialData:
    """Not to be changed."""
    sdata = sd.read_zarr(shutil.copytree(_fitted[0], tmp_path_factory.mktemp("predicted") / "slide.zarr"))
    predict(sdata, radius_um=8)
    predict(sdata, shapes_key=BINS)
    return sdata


@pytest.fixture(autouse=True)
def _figures():
    yield
    plt.close("all")


def affines(element) -> dict[str, list[list[float]]]:
    ways = get_transformation(element, get_all=True)
    return {system: way.to_affine_matrix(("x", "y"), ("x", "y")).tolist() for system, way in ways.items()}


def assert_same(one: sd.SpatialData, other: sd.SpatialData) -> None:
    """Same elements with the same values, types, names and transformations."""
    assert names(one) == names(other)
    for name in names(one):
        mine, theirs = one[name], other[name]
        assert type(mine) is type(theirs)
        if isinstance(mine, AnnData):
            assert_equal(mine, theirs)
            continue
        assert affines(mine) == affines(theirs)
        if isinstance(mine, GeoDataFrame):
            assert_geodataframe_equal(mine, theirs, check_index_type=False)
        else:
            xr.testing.assert_equal(mine, theirs)


def test_read_back_the_same(predicted, fitted, model, predict, tmp_path):
    """By itself, and from a copy that SpatialData writes, of a backed object and of one in memory."""
    again = sd.read_zarr(predicted.path)
    assert_same(again, predicted)
    assert again.attrs["pixnet_sd"] == predicted.attrs["pixnet_sd"]
    assert names(again) >= {"pixnet_map", "pixnet_map_tissue", "pixnet_circles_8um_shapes", "pixnet_circles_8um"}
    assert not list(Path(predicted.path).parent.glob(".*pixnet_sd*"))
    memory = sd.SpatialData(images={FULL: fitted.images[FULL]}, shapes={BINS: fitted.shapes[BINS]})
    predict(memory, model, radius_um=8)
    for sdata, name in ((predicted, "copy"), (memory, "memory")):
        sdata.write(tmp_path / f"{name}.zarr", update_sdata_path=False)
        assert_same(sd.read_zarr(tmp_path / f"{name}.zarr"), sdata)


@pytest.mark.parametrize("key", ["pixnet_circles_8um", f"pixnet_{BINS}"])
def test_squidpy(predicted, key):
    import squidpy as sq

    table = sd.read_zarr(predicted.path).tables[key]
    gene = table.var_names[0]
    sq.pl.spatial_scatter(table, color=gene)
    axes = plt.gcf().axes[0]
    (image,) = axes.get_images()
    assert image.get_array().shape == (200, 200, 3)
    (spots,) = axes.collections
    np.testing.assert_allclose(spots.get_array(), table.to_df()[gene], rtol=1e-6)
    assert len(np.unique(spots.to_rgba(spots.get_array()), axis=0)) > 10
    # as large as they are on the slide, and where they are
    extents = [path.get_extents() for path in spots.get_paths()]
    centres = np.array([[(e.x0 + e.x1) / 2, (e.y0 + e.y1) / 2] for e in extents])
    np.testing.assert_allclose(centres, table.obsm["spatial"], atol=1e-6)
    expected = 16 if "circles" in key else 2 * np.sqrt(64 / np.pi)
    np.testing.assert_allclose([e.width for e in extents], expected, rtol=1e-3)
    assert axes.get_title() == gene


def test_spatialdata_plot(predicted):
    import spatialdata_plot  # noqa: F401

    again = sd.read_zarr(predicted.path)
    gene = again.tables["pixnet_circles_8um"].var_names[0]
    _, axes = plt.subplots()
    again.pl.render_images("pixnet_map", channel=gene).pl.show(ax=axes)
    (image,) = axes.get_images()
    drawn = np.ma.filled(image.get_array(), 0).astype(float)
    assert drawn.shape[:2] == (50, 50)
    assert len(np.unique(drawn.reshape(2500, -1), axis=0)) > 50
    x0, x1, y0, y1 = image.get_extent()
    to_data = image.get_transform() - axes.transData
    # on the whole of the slide; spatialdata-plot 0.4 draws every image half a pixel up and to the left
    assert np.abs(to_data.transform([[x0, y1], [x1, y0]]) - [[0, 0], [200, 200]]).max() <= 4 / 2

    _, axes = plt.subplots()
    key = "pixnet_circles_8um"
    chain = again.pl.render_images(FULL).pl.render_shapes(f"{key}_shapes", color=gene, table_name=key)
    chain.pl.show(ax=axes)
    (patches,) = axes.collections
    assert len(patches.get_paths()) == again.tables[key].n_obs
    assert len(np.unique(patches.get_facecolor(), axis=0)) > 10


def test_napari(predicted):
    """Layers as napari-spatialdata makes them, without a window."""
    reason = "needs napari-spatialdata and a Qt binding"
    napari_viewer = pytest.importorskip("napari_spatialdata._viewer", reason=reason, exc_type=ImportError)
    from napari.components import ViewerModel
    from napari.utils.events import EventedList

    viewer = napari_viewer.SpatialDataViewer(ViewerModel(), EventedList([predicted]))
    gene_map = viewer.get_sdata_image(predicted, "pixnet_map", "sample", multi=False)
    assert gene_map.multiscale
    finest = predicted.images["pixnet_map"]["scale0"]["image"]
    np.testing.assert_array_equal(np.asarray(gene_map.data[0]), finest.values)
    assert list(gene_map.metadata["adata"].var_names) == list(finest.coords["c"].values)
    corner = [0, finest.sizes["y"] - 0.5, finest.sizes["x"] - 0.5]  # pixels are centred on whole numbers
    np.testing.assert_allclose(gene_map.data_to_world(corner)[-2:], [200, 200], atol=1e-6)
    circles = viewer.get_sdata_circles(predicted, "pixnet_circles_8um_shapes", "sample", multi=False)
    table = predicted.tables["pixnet_circles_8um"]
    np.testing.assert_allclose(circles.data, table.obsm["spatial"][:, ::-1])
    assert list(circles.metadata["adata"].obs_names) == list(table.obs_names)
    np.testing.assert_allclose(circles.size, 16)
    bins = viewer.get_sdata_shapes(predicted, BINS, "sample", multi=False)
    assert set(bins.metadata["table_names"]) == {TABLE, f"pixnet_{BINS}"}
    tissue = viewer.get_sdata_labels(predicted, "pixnet_map_tissue", "sample", multi=False)
    assert tissue.data[0].shape == finest.shape[1:]
