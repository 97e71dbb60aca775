"""Panels of `pl.gene_map`: what is drawn, where, in which colours, and how little is read for it."""

from __future__ import annotations

import geopandas as gpd
import matplotlib.pyplot as plt
import numpy as np
import pytest
import shapely
import spatialdata as sd
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from spatialdata.models import ShapesModel
from spatialdata.transformations import Affine, Identity, set_transformation
from tests.pl.conftest import add_map, hd
from tests.slide.conftest import make_table, make_visium
from zarr.storage import LocalStore

import pixnet_sd as ps
from pixnet_sd.errors import DataError, ElementError, PixNetError
from pixnet_sd.store.gene_map import FactorHead, factor_names


def draw(sdata, genes="GENE0", **options):
    return ps.pl.gene_map(sdata, genes, show=False, **options)


def shown(ax) -> np.ndarray:
    """Values of the last image that is drawn, NaN for nothing."""
    return np.ma.filled(ax.get_images()[-1].get_array(), np.nan)


def limits(ax) -> tuple[float, float]:
    return ax.get_images()[-1].get_clim()


def to_um(ax) -> np.ndarray:
    """Map of (x, y, 1) from that image's pixels to µm."""
    return (ax.get_images()[-1].get_transform() - ax.transData).get_matrix()


def value_at(ax, x_um: float, y_um: float) -> float:
    """What is shown at a point."""
    col, row, _ = np.linalg.inv(to_um(ax)) @ [x_um, y_um, 1]
    return float(shown(ax)[int(row), int(col)])


def test_three_panels_in_um():
    sdata, values = hd()
    axes = draw(sdata)
    assert axes.shape == (1, 3)
    titles, levels = zip(*((*ax.get_title().split("\n"), "")[:2] for ax in axes.flat), strict=True)
    assert titles == ("H&E", "GENE0, measured (16 µm bins)", "GENE0, predicted")
    assert levels[0] == ""
    said = float(levels[2].removeprefix("mean ").split(",")[0])
    assert said == pytest.approx(np.nanmean(values[0]), rel=0.05)
    for ax in axes.flat:
        assert (ax.get_xlim(), ax.get_ylim(), ax.get_aspect()) == ((0, 160), (120, 0), 1)
    np.testing.assert_array_equal(shown(axes[0, 2]), values[0])
    np.testing.assert_allclose(to_um(axes[0, 2]), np.diag([2, 2, 1]), atol=1e-9)


def test_factors_draw_what_the_map_does():
    sdata, values = hd(factor_names(3))
    head = FactorHead(["GENE0", "GENE1"], np.eye(2, 3, dtype=np.float32), np.zeros(2, np.float32))
    sdata.tables["pixnet_factors_head"] = head.table("log", "of these factors")
    for kind, end in ((sdata.images, ""), (sdata.labels, "_tissue"), (sdata.attrs["pixnet_sd"]["maps"], "")):
        kind[f"pixnet_factors{end}"] = kind.pop(f"pixnet_map{end}")
    np.testing.assert_allclose(shown(draw(sdata, panels=["predicted"])), values[0], rtol=1e-6)


def test_image_is_the_slide_also_beneath_and_without_expression():
    sdata, _ = hd()
    _, ax = plt.subplots(figsize=(8, 6), dpi=100)
    draw(sdata, ax=ax, panels=["image"], crop_um=(20, 30, 60, 60))
    pixels = sdata.images["sample_full_image"]["scale0"]["image"].values
    np.testing.assert_array_equal(shown(ax), pixels[:, 60:120, 40:120].transpose(1, 2, 0))
    np.testing.assert_allclose(to_um(ax), [[0.5, 0, 20], [0, 0.5, 30], [0, 0, 1]], atol=1e-9)
    for ax in draw(sdata, alpha=0.4, cmap="magma")[0, 1:]:
        beneath, values = ax.get_images()
        assert beneath.get_array().shape[-1] == 3
        assert (values.get_alpha(), values.get_cmap().name) == (0.4, "magma")
    alone = sd.SpatialData(images=sdata.images, labels=sdata.labels, attrs=sdata.attrs)
    assert [ax.get_title().split("\n")[0] for ax in draw(alone).flat] == ["H&E", "GENE0, predicted"]
    with pytest.raises(ElementError, match="panels="):
        draw(alone, panels=["measured"])
    for crop_um, length in ((None, 20), ((0, 0, 36, 60), 5)):
        (bar,) = draw(sdata, panels=["image"], crop_um=crop_um).artists
        assert (bar.dx, bar.units, bar.fixed_value, bar.fixed_units) == (1, "um", length, "um")
    assert not draw(sdata, panels=["image"], scalebar=False).artists


def log_normalised(table) -> np.ndarray:
    """Measured values of the first gene."""
    counts = table.X.toarray()
    return np.log1p(100 * counts[:, 0] / counts.sum(axis=1))


@pytest.mark.parametrize("matrix", [None, np.array([[0, -2.0, 500], [2.0, 0, 30], [0, 0, 1]])])
@pytest.mark.parametrize("size", [8, 16])
def test_measured_bins_are_where_they_are(size, matrix):
    """Also where image and bins are turned in their coordinate system."""
    sdata, _ = hd(matrix=matrix)
    table_key = f"square_{size:03}um"
    ax = draw(sdata, table_key=table_key, dpi=150)[0, 1]
    centres = shapely.get_coordinates(sdata.shapes[f"sample_{table_key}"].geometry.centroid.to_numpy()) * 0.5
    expected = log_normalised(sdata.tables[table_key])
    np.testing.assert_allclose([value_at(ax, x, y) for x, y in centres], expected, rtol=1e-5)
    assert len(np.unique(expected)) > 10
    a, b, c, d = to_um(ax)[:2, :2].ravel()
    np.testing.assert_allclose([np.hypot(a, c), np.hypot(b, d)], size, rtol=1e-6)
    assert np.arctan2(c, a) == pytest.approx(0.02, abs=1e-6)  # the lattice is turned, and so is the picture


def test_bins_finer_than_the_screen_are_averaged():
    sdata, _ = hd(bins=(8,))
    _, ax = plt.subplots(figsize=(0.1, 0.1), dpi=100)  # 7 pixels: 21 µm each, two bins
    draw(sdata, ax=ax, panels=["measured"], scalebar=False, colorbar_loc=None)
    bins = log_normalised(sdata.tables["square_008um"]).reshape(6, 2, 8, 2)
    np.testing.assert_allclose(shown(ax), bins.mean(axis=(1, 3)), rtol=1e-5)


def test_spots_are_circles():
    sdata = make_visium()
    add_map(sdata, "tissue_full_image", "global", mpp=0.5, genes=["GENE0"])
    ax = draw(sdata, vmin=0.5, vmax=2)[0, 1]
    (circles,) = ax.collections
    assert isinstance(circles, EllipseCollection)
    centres = shapely.get_coordinates(sdata.shapes["spots"].geometry.to_numpy())
    np.testing.assert_allclose(circles.get_offsets(), centres * 0.5)
    np.testing.assert_allclose(circles.get_widths(), sdata.shapes["spots"]["radius"])  # 2 radii of 0.5 µm/px
    np.testing.assert_allclose(circles.get_array(), log_normalised(sdata.tables["table"]), rtol=1e-5)
    assert circles.get_clim() == (0.5, 2)
    ax.figure.canvas.draw()


@pytest.mark.parametrize("labels", [False, True])
def test_cells_are_filled(labels):
    """Polygons, and labels without a lattice."""
    sdata, _ = hd(bins=(16,), labels=labels, angle=0.0)
    table_key = "square_016um" if labels else "counts"
    if labels:
        sdata.tables[table_key].obs = sdata.tables[table_key].obs.drop(columns=["array_row", "array_col"])
    else:
        frame = gpd.GeoDataFrame(geometry=[shapely.Point(60, 80).buffer(20), shapely.box(100, 100, 160, 130)])
        sdata.shapes["cells"] = ShapesModel.parse(frame, transformations={"sample": Identity()})
        sdata.tables[table_key] = make_table("cells", np.arange(2))
    ax, expected = draw(sdata, table_key=table_key)[0, 1], log_normalised(sdata.tables[table_key])
    if not labels:
        found = [value_at(ax, *at) for at in ((30, 40), (65, 57), (100, 100))]
        np.testing.assert_allclose(found, [*expected, np.nan], rtol=1e-5)
    values = shown(ax)[np.isfinite(shown(ax))]
    np.testing.assert_allclose(np.unique(values), np.unique(expected.astype(np.float32)), rtol=1e-6)


def test_limits_are_shared_or_not():
    sdata, _ = hd()
    shared = draw(sdata, vmax="p100", vmin="p0")[0]
    both = np.concatenate([shown(ax).ravel() for ax in shared[1:]])
    for ax in shared[1:]:
        assert limits(ax) == pytest.approx((np.nanmin(both), np.nanmax(both)))
    assert len(shared[0].figure.axes) == 3 + 1  # one colour bar
    own = draw(sdata, shared_limits=False)[0]
    for ax in own[1:]:
        assert limits(ax) == pytest.approx(np.nanpercentile(shown(ax), [1, 99]))
    assert [bar.get_ylabel() for bar in own[0].figure.axes[3:]] == ["log-normalised expression"] * 2
    sdata.attrs["pixnet_sd"]["maps"]["pixnet_map"]["aggregation"] = "sum"  # of logarithms: on another scale
    _, measured, predicted = draw(sdata)[0]
    assert limits(measured) != limits(predicted)


def test_genes_are_rows():
    sdata, values = hd()
    axes = draw(sdata, ["OTHER", "GENE1"], vmin=[None, 2], vmax=[None, "p50"], panels=["predicted", "measured"])
    assert axes.shape == (2, 2)
    for row, k in zip(axes, (2, 1), strict=True):
        np.testing.assert_array_equal(shown(row[0]), values[k])
    assert limits(axes[1, 0])[0] == 2
    # not in the table
    assert [text.get_text() for text in axes[0, 1].texts] == ["not measured"]
    assert not axes[0, 1].get_images()
    assert [len(ax.artists) for ax in axes.flat] == [1, 0, 1, 0]  # scale bars


def test_crop_and_level():
    """A crop is read alone; the level has a pixel for every one on the screen."""
    sdata, values = hd()
    ax = draw(sdata, crop_um=(31, -10, 62, 41))[0, 2]
    assert (ax.get_xlim(), ax.get_ylim()) == ((31, 62), (41, 0))  # clipped to the image
    np.testing.assert_array_equal(shown(ax), values[0][:21, 15:31])
    np.testing.assert_allclose(to_um(ax), [[2, 0, 30], [0, 2, 0], [0, 0, 1]], atol=1e-9)
    halved = values[0].reshape(30, 2, 40, 2).mean(axis=(1, 3))
    for options in ({"scale": "scale1"}, {"ax": plt.figure(figsize=(0.5, 0.5), dpi=80).add_subplot()}):
        ax = draw(sdata, panels=["predicted"], **options)
        np.testing.assert_allclose(shown(ax), halved, rtol=1e-6)
        np.testing.assert_allclose(to_um(ax), np.diag([4, 4, 1]), atol=1e-9)


def test_counts_are_densities():
    sdata, _ = hd(genes=("GENE0", "total_counts"), note={"objective": "nb_pcc", "aggregation": "sum"}, angle=0.0)
    axes = draw(sdata, ["GENE0", "total_counts"])
    counts = sdata.tables["square_016um"].X.toarray()
    for (_, measured, predicted), expected in zip(axes, (counts[:, 0], counts.sum(axis=1)), strict=True):
        np.testing.assert_allclose(np.ravel(shown(measured)), expected / 16**2, rtol=1e-5)
        assert limits(measured) == limits(predicted)
    assert {bar.get_ylabel() for bar in axes[0, 0].figure.axes[6:]} == {"counts per µm²"}


def test_reads_only_the_channels_and_the_crop(tmp_path, monkeypatch):
    sdata, store = hd()[0], tmp_path / "slide.zarr"
    sd.SpatialData(images={"he": sdata.images["sample_full_image"]}).write(store)
    add_map(sd.read_zarr(store), "he", "sample", mpp=0.5, genes=[f"G{k}" for k in range(20)])
    sdata, read, get = sd.read_zarr(store), {}, LocalStore.get

    async def noting(self, key, *arguments, **options):
        content = await get(self, key, *arguments, **options)
        if (path := self.root / key).is_relative_to(store / "images" / "pixnet_map") and "c" in path.parts:
            read[path] = read.get(path, 0) + len(content or b"")
        return content

    monkeypatch.setattr(LocalStore, "get", noting)
    draw(sdata, "G9", crop_um=(0, 0, 60, 60), dpi=200)
    ((path, n_bytes),) = read.items()  # the crop is in one block of one level, whose file has 8 of 20 genes a chunk
    assert path.parts[-4:] == ("c", "0", "0", "0")
    assert 0 < n_bytes < 0.6 * path.stat().st_size


def test_shown_saved_returned(tmp_path, monkeypatch):
    sdata, _ = hd()
    windows = []
    monkeypatch.setattr(plt, "show", lambda: windows.append(1))
    assert ps.pl.gene_map(sdata, "GENE0", save=tmp_path / "map.png") is None
    assert len(windows) == 1
    assert plt.imread(tmp_path / "map.png").shape[1] > 600
    assert isinstance(ps.pl.gene_map(sdata, "GENE0", return_fig=True), Figure)
    _, given = plt.subplots(1, 3)
    assert ps.pl.gene_map(sdata, "GENE0", ax=given).ravel().tolist() == given.tolist()
    assert ps.pl.gene_map(sdata, "GENE0", ax=given[0], panels="predicted") is given[0]
    assert len(windows) == 1
    assert ps.pl.gene_map(sdata, "GENE0", ax=given[0], panels="predicted", show=True) is None
    assert len(windows) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"genes": "GENE"}, DataError, "'GENE1'"),  # which is close
        ({"crop_um": (500, 0, 600, 5)}, PixNetError, "crop_um=.*160.*120"),
        ({"scale": "scale7"}, PixNetError, "scale=.*'scale0', 'scale1'"),
        ({"vmin": [1, 2]}, PixNetError, "vmin"),
        ({"figsize": (400, 3), "dpi": 1000}, PixNetError, "figsize=.*dpi="),
        ({"table_key": "nope"}, ElementError, "'nope'"),
        ({"ax": Figure().add_subplot()}, PixNetError, "ax=.*1.*3"),
    ],
)
def test_bad_input(arguments, error, says):
    sdata, _ = hd()
    with pytest.raises(error, match=says):
        draw(sdata, **arguments)
    assert not plt.get_fignums()  # none is left behind


def test_coordinate_system_was_renamed_since_or_the_image_is_gone():
    """The panels are the same as long as it is plain how image and regions lie."""
    sdata, _ = hd()
    expected = [shown(ax) for ax in draw(sdata)[0]]
    sdata.rename_coordinate_systems({"sample": "a", "sample_downscaled_hires": "b", "sample_downscaled_lowres": "c"})
    for ax, values in zip(draw(sdata)[0], expected, strict=True):
        np.testing.assert_array_equal(shown(ax), values)
    turned = Affine([[0, -1, 320], [1, 0, 0], [0, 0, 1]], ("x", "y"), ("x", "y"))
    set_transformation(sdata["sample_full_image"], turned, "b")
    with pytest.raises(ElementError, match=r"'sample'.*'pixnet_map'"):
        draw(sdata)
    del sdata.images["sample_full_image"]
    with pytest.raises(ElementError, match="'sample_full_image'.*'pixnet_map'"):
        draw(sdata)
