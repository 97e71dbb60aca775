"""Panels of `pl.gene_map`: what is drawn, where, in which colours, and how little is read for it."""

from __future__ import annotations

import dask.array as da
import geopandas as gpd
import matplotlib.pyplot as plt
import numpy as np
import pytest
import shapely
import spatialdata as sd
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib_scalebar.scalebar import ScaleBar
from spatialdata.models import ShapesModel
from spatialdata.transformations import Affine, Identity, get_transformation, set_transformation
from tests.pl.conftest import add_map
from tests.slide.conftest import make_table, make_visium
from zarr.storage import LocalStore

import pixnet_sd as ps
from pixnet_sd.errors import DataError, ElementError, PixNetError
from pixnet_sd.store.gene_map import FactorHead, factor_names, image_pyramid


def to_um(ax, artist) -> np.ndarray:
    """Map of (x, y, 1) from an image's pixels to µm."""
    return (artist.get_transform() - ax.transData).get_matrix()


def value_at(ax, artist, x_um: float, y_um: float) -> float:
    """What an image shows at a point; NaN for nothing."""
    col, row, _ = np.linalg.inv(to_um(ax, artist)) @ [x_um, y_um, 1]
    return float(np.ma.filled(artist.get_array(), np.nan)[int(row), int(col)])


def draw(sdata, genes="GENE0", **options):
    return ps.pl.gene_map(sdata, genes, show=False, **options)


def test_three_panels_in_um(hd):
    sdata, values = hd()
    axes = draw(sdata)
    assert axes.shape == (1, 3)
    titles = [ax.get_title() for ax in axes.flat]
    assert titles == ["H&E", "GENE0, measured (16 µm bins)", "GENE0, predicted"]
    for ax in axes.flat:
        assert ax.get_xlim() == (0, 160)
        assert ax.get_ylim() == (120, 0)
        assert ax.get_aspect() == 1
    (predicted,) = axes[0, 2].get_images()
    drawn = np.ma.filled(predicted.get_array(), np.nan)
    np.testing.assert_array_equal(drawn[:, :60], values[0][:, :60])
    assert np.isnan(drawn[:, 60:]).all()
    np.testing.assert_allclose(to_um(axes[0, 2], predicted), np.diag([2, 2, 1]), atol=1e-9)


def test_factors_draw_what_the_map_does(hd):
    sdata, _ = hd()
    expected = np.ma.filled(draw(sdata, panels=["predicted"]).get_images()[0].get_array(), np.nan)
    full, attrs = sdata.images.pop("pixnet_map"), sdata.attrs["pixnet_sd"]
    tissue = (full["scale0"]["image"].data[:1] != 0).astype(np.float32)
    factors = da.concatenate([full["scale0"]["image"].data, tissue])
    transforms = get_transformation(full, get_all=True)
    sdata.images["pixnet_factors"] = image_pyramid([factors], factor_names(3), transforms)
    head = FactorHead(["GENE0", "GENE1", "OTHER"], np.eye(3, dtype=np.float32), np.zeros(3, np.float32))
    sdata.tables["pixnet_factors_head"] = head.table("log", "of these factors")
    sdata.labels["pixnet_factors_tissue"] = sdata.labels.pop("pixnet_map_tissue")
    attrs["maps"]["pixnet_factors"] = attrs["maps"].pop("pixnet_map")
    ax = draw(sdata, panels=["predicted"])
    np.testing.assert_allclose(np.ma.filled(ax.get_images()[0].get_array(), np.nan), expected, rtol=1e-6)


def test_image_is_the_slide_also_beneath_and_without_expression(hd):
    sdata, _ = hd()
    _, ax = plt.subplots(figsize=(8, 6), dpi=100)
    draw(sdata, ax=ax, panels=["image"], crop_um=(20, 30, 60, 60))
    (picture,) = ax.get_images()
    pixels = sdata.images["sample_full_image"]["scale0"]["image"].values
    np.testing.assert_array_equal(picture.get_array(), pixels[:, 60:120, 40:120].transpose(1, 2, 0))
    np.testing.assert_allclose(to_um(ax, picture), [[0.5, 0, 20], [0, 0.5, 30], [0, 0, 1]], atol=1e-9)
    for ax in draw(sdata, alpha=0.4, cmap="magma")[0, 1:]:
        beneath, values = ax.get_images()
        assert beneath.get_array().shape[-1] == 3
        assert (values.get_alpha(), values.get_cmap().name) == (0.4, "magma")
    alone = sd.SpatialData(images=sdata.images, labels=sdata.labels, attrs=sdata.attrs)
    assert [ax.get_title() for ax in draw(alone).flat] == ["H&E", "GENE0, predicted"]
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
@pytest.mark.parametrize("table_key", ["square_008um", "square_016um"])
def test_measured_bins_are_where_they_are(hd, table_key, matrix):
    """Also where image and bins are turned in their coordinate system."""
    sdata, _ = hd(matrix=matrix)
    axes = draw(sdata, table_key=table_key, dpi=150)
    (image,) = axes[0, 1].get_images()
    expected = log_normalised(sdata.tables[table_key])
    shapes = sdata.shapes[f"sample_{table_key}"]
    centres = shapely.get_coordinates(shapes.geometry.centroid.to_numpy()) * 0.5
    shown = [value_at(axes[0, 1], image, x, y) for x, y in centres]
    np.testing.assert_allclose(shown, expected, rtol=1e-5)
    assert len(np.unique(expected)) > 10
    a, b, c, d = to_um(axes[0, 1], image)[:2, :2].ravel()
    size = int(table_key[7:10])
    np.testing.assert_allclose([np.hypot(a, c), np.hypot(b, d)], size, rtol=1e-6)
    assert np.arctan2(c, a) == pytest.approx(0.02, abs=1e-6)  # the lattice is turned, and so is the picture


def test_bins_finer_than_the_screen_are_averaged(hd):
    sdata, _ = hd(bins=(8,))
    _, ax = plt.subplots(figsize=(0.1, 0.1), dpi=100)  # 7 pixels: 21 µm each, two bins
    draw(sdata, ax=ax, panels=["measured"], scalebar=False, colorbar_loc=None)
    (image,) = ax.get_images()
    bins = log_normalised(sdata.tables["square_008um"]).reshape(12, 16)
    np.testing.assert_allclose(image.get_array(), bins.reshape(6, 2, 8, 2).mean(axis=(1, 3)), rtol=1e-5)


def test_spots_are_circles():
    sdata = make_visium()
    add_map(sdata, "tissue_full_image", "global", mpp=0.5, genes=["GENE0"])
    axes = draw(sdata, vmin=0.5, vmax=2)
    (circles,) = axes[0, 1].collections
    assert isinstance(circles, EllipseCollection)
    centres = shapely.get_coordinates(sdata.shapes["spots"].geometry.to_numpy())
    np.testing.assert_allclose(circles.get_offsets(), centres * 0.5)
    np.testing.assert_allclose(circles.get_widths(), sdata.shapes["spots"]["radius"])  # 2 radii of 0.5 µm/px
    np.testing.assert_allclose(circles.get_array(), log_normalised(sdata.tables["table"]), rtol=1e-5)
    assert circles.get_clim() == (0.5, 2)
    axes[0, 1].figure.canvas.draw()


@pytest.mark.parametrize("labels", [False, True])
def test_cells_are_filled(hd, labels):
    """Polygons, and labels without a lattice."""
    sdata, _ = hd(bins=(16,), labels=labels, angle=0.0)
    table_key = "square_016um" if labels else "counts"
    if labels:
        sdata.tables[table_key].obs = sdata.tables[table_key].obs.drop(columns=["array_row", "array_col"])
    else:
        frame = gpd.GeoDataFrame(geometry=[shapely.Point(60, 80).buffer(20), shapely.box(100, 100, 160, 130)])
        sdata.shapes["cells"] = ShapesModel.parse(frame, transformations={"sample": Identity()})
        sdata.tables[table_key] = make_table("cells", np.arange(2))
    axes = draw(sdata, table_key=table_key)
    (image,) = axes[0, 1].get_images()
    expected = log_normalised(sdata.tables[table_key])
    if not labels:
        assert value_at(axes[0, 1], image, 30, 40) == pytest.approx(expected[0], rel=1e-5)
        assert value_at(axes[0, 1], image, 65, 57) == pytest.approx(expected[1], rel=1e-5)
        assert np.isnan(value_at(axes[0, 1], image, 100, 100))
    shown = np.unique(image.get_array().compressed())
    np.testing.assert_allclose(shown, np.unique(expected.astype(np.float32)), rtol=1e-6)


def test_limits_are_shared_or_not(hd):
    sdata, _ = hd()
    shared = draw(sdata, vmax="p100", vmin="p0")
    measured, predicted = (ax.get_images()[0] for ax in shared[0, 1:])
    both = [np.ma.masked_invalid(image.get_array()) for image in (measured, predicted)]
    expected = (min(v.min() for v in both), max(v.max() for v in both))
    assert measured.get_clim() == predicted.get_clim() == pytest.approx(expected)
    assert len(shared[0, 0].figure.axes) == 3 + 1  # one colour bar
    own = draw(sdata, shared_limits=False)
    for image in (ax.get_images()[0] for ax in own[0, 1:]):
        values = np.ma.masked_invalid(image.get_array()).compressed()
        assert image.get_clim() == pytest.approx(np.percentile(values, [1, 99]))
    bars = own[0, 0].figure.axes[3:]
    assert [bar.get_ylabel() for bar in bars] == ["log-normalised expression"] * 2
    sdata.attrs["pixnet_sd"]["maps"]["pixnet_map"]["aggregation"] = "sum"  # of logarithms: on another scale
    measured, predicted = (ax.get_images()[0].get_clim() for ax in draw(sdata)[0, 1:])
    assert measured != predicted


def test_genes_are_rows(hd):
    sdata, values = hd()
    axes = draw(sdata, ["OTHER", "GENE1"], vmin=[None, 2], vmax=[None, "p50"], panels=["predicted", "measured"])
    assert axes.shape == (2, 2)
    for row, k in zip(axes, (2, 1), strict=True):
        drawn = np.ma.masked_invalid(row[0].get_images()[0].get_array())
        np.testing.assert_array_equal(drawn[:, :60], values[k][:, :60])
    assert axes[1, 0].get_images()[0].get_clim()[0] == 2
    # not in the table
    assert [text.get_text() for text in axes[0, 1].texts] == ["not measured"]
    assert not axes[0, 1].get_images()
    assert [sum(isinstance(a, ScaleBar) for a in ax.artists) for ax in axes.flat] == [1, 0, 1, 0]


def test_crop_and_level(hd):
    """A crop is read alone; the level has a pixel for every one on the screen."""
    sdata, values = hd()
    axes = draw(sdata, crop_um=(31, -10, 62, 41))
    assert axes[0, 0].get_xlim() == (31, 62)
    assert axes[0, 0].get_ylim() == (41, 0)  # clipped to the image
    (finest,) = axes[0, 2].get_images()
    np.testing.assert_array_equal(finest.get_array(), values[0][:21, 15:31])
    np.testing.assert_allclose(to_um(axes[0, 2], finest), [[2, 0, 30], [0, 2, 0], [0, 0, 1]], atol=1e-9)
    halved = values[0].reshape(30, 2, 40, 2).mean(axis=(1, 3))
    for options in ({"scale": "scale1"}, {"ax": plt.figure(figsize=(0.5, 0.5), dpi=80).add_subplot()}):
        ax = draw(sdata, panels=["predicted"], **options)
        (coarse,) = ax.get_images()
        np.testing.assert_allclose(coarse.get_array()[:, :30], halved[:, :30], rtol=1e-6)
        np.testing.assert_allclose(to_um(ax, coarse), np.diag([4, 4, 1]), atol=1e-9)
        assert coarse.get_array().mask[:, 30:].all()


def test_counts_are_densities(hd):
    sdata, _ = hd(genes=("GENE0", "total_counts"), note={"objective": "poisson", "aggregation": "sum"}, angle=0.0)
    axes = draw(sdata, ["GENE0", "total_counts"])
    counts = sdata.tables["square_016um"].X.toarray()
    for row, expected in zip(axes, (counts[:, 0], counts.sum(axis=1)), strict=True):
        drawn = row[1].get_images()[0].get_array()
        np.testing.assert_allclose(np.ravel(drawn), expected / 16**2, rtol=1e-5)
        assert row[1].get_images()[0].get_clim() == row[2].get_images()[0].get_clim()
    assert {bar.get_ylabel() for bar in axes[0, 0].figure.axes[6:]} == {"counts per µm²"}


def test_reads_only_the_channels_and_the_crop(hd, tmp_path, monkeypatch):
    sdata, _ = hd()
    sdata = sd.SpatialData(images={"he": sdata.images["sample_full_image"]})
    sdata.write(tmp_path / "slide.zarr")
    sdata = sd.read_zarr(tmp_path / "slide.zarr")
    add_map(sdata, "he", "sample", mpp=0.5, genes=[f"G{k}" for k in range(20)])
    sdata = sd.read_zarr(tmp_path / "slide.zarr")
    store, read, get = tmp_path / "slide.zarr" / "images" / "pixnet_map", {}, LocalStore.get

    async def noting(self, key, *arguments, **options):
        content = await get(self, key, *arguments, **options)
        if (path := self.root / key).is_relative_to(store) and "c" in path.parts:
            read[path] = read.get(path, 0) + len(content or b"")
        return content

    monkeypatch.setattr(LocalStore, "get", noting)
    draw(sdata, "G9", crop_um=(0, 0, 60, 60), dpi=200)
    ((path, n_bytes),) = read.items()  # the crop is in one block of one level, whose file has 8 of 20 genes a chunk
    assert path.parts[-4:] == ("c", "0", "0", "0")
    assert 0 < n_bytes < 0.6 * path.stat().st_size


def test_shown_saved_returned(hd, tmp_path, monkeypatch):
    sdata, _ = hd()
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(1))
    assert ps.pl.gene_map(sdata, "GENE0", save=tmp_path / "map.png") is None
    assert len(shown) == 1
    assert plt.imread(tmp_path / "map.png").shape[1] > 600
    assert isinstance(ps.pl.gene_map(sdata, "GENE0", return_fig=True), Figure)
    _, given = plt.subplots(1, 3)
    assert ps.pl.gene_map(sdata, "GENE0", ax=given).ravel().tolist() == given.tolist()
    ax = plt.figure().add_subplot()
    assert ps.pl.gene_map(sdata, "GENE0", ax=ax, panels="predicted") is ax
    assert len(shown) == 1
    assert ps.pl.gene_map(sdata, "GENE0", ax=ax, panels="predicted", show=True) is None
    assert len(shown) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"genes": "GENE"}, DataError, "'GENE1'"),  # which is close
        ({"key_added": "mine"}, ElementError, "'mine_map'.*'sample_full_image'"),
        ({"crop_um": (500, 0, 600, 5)}, PixNetError, "crop_um=.*160.*120"),
        ({"scale": "scale7"}, PixNetError, "scale=.*'scale0', 'scale1'"),
        ({"vmin": [1, 2]}, PixNetError, "vmin"),
        ({"figsize": (400, 3), "dpi": 1000}, PixNetError, "figsize=.*dpi="),
        ({"table_key": "nope"}, ElementError, "'nope'"),
        ({"ax": "one"}, PixNetError, "ax=.*1.*3"),
    ],
)
def test_bad_input(hd, arguments, error, says):
    sdata, _ = hd()
    if arguments.get("ax") == "one":
        arguments = {"ax": plt.figure().add_subplot()}
    figures = plt.get_fignums()
    with pytest.raises(error, match=says):
        ps.pl.gene_map(sdata, **({"genes": "GENE0", "show": False} | arguments))
    assert plt.get_fignums() == figures  # none is left behind


def test_coordinate_system_was_renamed_since_or_the_image_is_gone(hd):
    """The panels are the same as long as it is plain how image and regions lie."""
    sdata, _ = hd()
    expected = [ax.get_images()[-1].get_array() for ax in draw(sdata)[0]]
    sdata.rename_coordinate_systems({"sample": "a", "sample_downscaled_hires": "b", "sample_downscaled_lowres": "c"})
    for ax, values in zip(draw(sdata)[0], expected, strict=True):
        np.testing.assert_array_equal(ax.get_images()[-1].get_array(), values)
    turned = Affine([[0, -1, 320], [1, 0, 0], [0, 0, 1]], ("x", "y"), ("x", "y"))
    set_transformation(sdata["sample_full_image"], turned, "b")
    with pytest.raises(ElementError, match=r"'sample'.*'pixnet_map'"):
        draw(sdata)
    del sdata.images["sample_full_image"]
    with pytest.raises(ElementError, match="'sample_full_image'.*'pixnet_map'"):
        draw(sdata)
