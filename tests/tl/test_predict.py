"""Every way to ask for regions, what comes out, and when the network is run again."""

from __future__ import annotations

import geopandas as gpd
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
import squidpy as sq
import torch
from anndata import AnnData
from scipy import stats
from spatialdata.models import Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale
from tests.tl.conftest import BINS, FULL, TABLE, content, in_memory, map_values
from torch.nn.functional import interpolate

import pixnet_sd as ps
from pixnet_sd.errors import DataError, StoreError
from pixnet_sd.geometry import Circles
from pixnet_sd.slide import open_slide, tissue_mask
from pixnet_sd.slide.elements import regions_of
from pixnet_sd.tl import predict_regions


def genes_of(sdata, key):
    return list(sdata.images[key]["scale0"].coords["c"].values)


def with_shapes(sdata, key, data, **options):
    sdata.shapes[key] = ShapesModel.parse(data, transformations={"sample": Identity()}, **options)
    sdata.write_element(key)


def with_regions(sdata) -> None:
    """Outlines, one with a hole, one across the tissue's border, one on glass, and labels on a coarser grid."""
    hole = shapely.Point(100, 100).buffer(30) - shapely.Point(95, 100).buffer(12)
    outlines = [hole, shapely.box(20, 80, 90, 88), shapely.Polygon([(120, 20), (190, 90), (150, 120)])]
    outlines.insert(1, shapely.box(8, 9, 13, 15))
    with_shapes(sdata, "outlines", gpd.GeoDataFrame(geometry=outlines, index=[5, 3, 2, 9]))
    labels = np.zeros((25, 25), dtype=np.int32)
    labels[10:14, 10:12], labels[5, 9], labels[18:22:2, 5:20], labels[0, 24] = 7, 3, 12, 4
    scale = Scale([8, 8], axes=("x", "y"))
    sdata.labels["cells"] = Labels2DModel.parse(labels, dims=("y", "x"), transformations={"sample": scale})
    sdata.write_element("cells")


SIDE, EDGE = 200, 192  # working pixels of the slide, and of the white around it


def resized(low: np.ndarray) -> np.ndarray:
    full = torch.from_numpy(low.astype(np.float64))[None]
    return interpolate(full, scale_factor=4, mode="bilinear", align_corners=False)[0].numpy()


def in_one_piece(sdata, model) -> np.ndarray:
    """Map of the whole slide in one pass over it, glass included."""
    assert model.record.halo_px <= EDGE
    slide = open_slide(sdata, working_mpp=model.record.working_mpp)
    image = slide.read(-EDGE, SIDE + 24 + EDGE, -EDGE, SIDE + 24 + EDGE)
    with torch.no_grad():
        features = model.network.eval()(torch.from_numpy(image).permute(2, 0, 1)[None].float())
        whole = model.network.gene_map(features)[0].numpy()
    inside = slice(EDGE // 4, (EDGE + SIDE) // 4)
    return whole[:, inside, inside]


def masks(sdata, table) -> list[np.ndarray]:
    """Pixels of the regions that a table annotates, by their definition."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    key, ids = table.uns["spatialdata_attrs"]["region"], table.obs["instance_id"]
    if key in sdata.labels:
        return [np.kron(sdata.labels[key].values, np.ones((8, 8))) == k for k in ids]
    frame = sdata.shapes[key].loc[ids]
    if "radius" in frame:
        return [(x - p.x) ** 2 + (y - p.y) ** 2 <= r**2 for p, r in zip(frame.geometry, frame.radius, strict=True)]
    return [shapely.contains_xy(outline, x, y) for outline in frame.geometry]


KINDS = [
    ({"shapes_key": "outlines"}, "outlines"),
    ({"shapes_key": "outlines", "radius_um": 10}, "outlines_circles_10um"),
    ({"shapes_key": "cells"}, "cells"),
    ({"radius_um": 8}, "circles_8um"),
    ({"bin_um": 16}, "bins_16um"),
]


@pytest.mark.parametrize(
    ("model_of", "backed", "write"),
    [
        ("fitted", True, None),
        ("fitted", False, "map"),
        ("fitted", True, "factors"),
        ("counted", False, None),
        ("counted", True, "map"),
        ("counted", False, "factors"),
    ],
)
def test_against_the_slide_in_one_piece(request, predict, forward_passes, model_of, backed, write):
    """Eq. 4-5 written out with masks: sums over tissue pixels of the map at full resolution, NaN without any."""
    sdata = request.getfixturevalue(model_of)
    with_regions(sdata)
    sdata = sdata if backed else in_memory(sdata)
    model = ps.PixNet.load(sdata.attrs["pixnet_sd"]["model"])
    n_passes = []
    for arguments, _ in KINDS:
        predict(sdata, write=write, **arguments)
        n_passes.append(len(forward_passes))
    assert write is None or n_passes == n_passes[:1] * len(KINDS)  # all but the first read the map

    whole = in_one_piece(sdata, model)
    if write is None:
        assert not {key for key in (*sdata.images, *sdata.labels) if key.startswith("pixnet")}
        tissue = tissue_mask(open_slide(sdata, working_mpp=model.record.working_mpp))
    else:
        tissue = sdata.labels[f"pixnet_{write}_tissue"]["scale0"]["image"].values == 1
        kept = ps.get.gene_map(sdata)["scale0"]["image"].values[: len(whole)]
        np.testing.assert_allclose(kept, (whole * tissue)[: len(kept)], atol=1e-5)
    assert 0.3 < tissue.mean() < 0.95
    on_tissue, seen = resized(whole * tissue), resized(tissue[None])[0]
    for arguments, name in KINDS:
        table = sdata.tables[f"pixnet_{name}"]
        inside = np.array(masks(sdata, table), float).reshape(len(table), -1)
        sums, n_px = inside @ on_tissue.reshape(len(whole), -1).T, inside @ seen.ravel()
        rows = n_px > 0
        assert rows.sum() >= 2
        assert rows.all() == ("shapes_key" not in arguments)  # grids lie on tissue
        assert list(table.obs["on_tissue"]) == list(rows)
        sums[~rows] = np.nan
        np.testing.assert_allclose(table.obs["area_um2"], inside.sum(axis=1), rtol=0.15)
        np.testing.assert_allclose(table.obs["tissue_area_um2"], n_px, rtol=1e-4)
        if model_of == "counted":
            np.testing.assert_allclose(counts(table), sums, rtol=1e-4, atol=1e-6)
            values = np.log1p(model.record.target_sum * sums[:, :-1] / sums[:, -1:])
        else:
            values = sums / np.where(rows, n_px, 1)[:, None]
        np.testing.assert_allclose(table.X, values, atol=1e-4)


def test_circles(fitted, predict, model):
    """Touching by default; at twice the mpp the slide is twice as wide, and holds as many as one of that size."""
    predict(fitted, radius_um=8)
    predict(fitted, radius_um=4, spacing_um=32, write=None)
    with pytest.warns(UserWarning, match="mpp = 2"):
        predict(fitted, radius_um=8, mpp=2, key_added="wide")
    for key, radius, pitch, mpp in (("pixnet", 8, 16, 1), ("pixnet", 4, 32, 1), ("wide", 8, 16, 2)):
        tissue = fitted.labels[f"{key}_map_tissue"]["scale0"]["image"].values
        key = f"{key}_circles_{radius}um"
        table, shapes = fitted.tables[key], fitted.shapes[f"{key}_shapes"]
        assert (list(table.var_names), table.X.dtype) == (model.genes, np.float32)
        np.testing.assert_array_equal(table.var["held_out_pcc"].to_numpy(float), model.record.var["held_out_pcc"])
        assert (shapes["radius"] * mpp == radius).all()
        centres = shapely.get_coordinates(shapes.geometry.to_numpy())
        np.testing.assert_array_equal(table.obsm["spatial"], centres)
        assert (centres * mpp % pitch == pitch / 2).all()
        assert set(np.diff(np.unique(centres[:, 0]))) == {pitch / mpp}
        assert len(np.unique(centres, axis=0)) == len(centres)
        col, row = (centres * mpp // 4).T.astype(int)
        assert tissue[row, col].all()
    assert len(fitted.tables["wide_circles_8um"]) > 3 * len(fitted.tables["pixnet_circles_8um"])


def test_some_genes(fitted, predict, model):
    predict(fitted, bin_um=16)
    two = [model.genes[4], model.genes[1]]
    predict(fitted, bin_um=16, genes=two, key_added="two")
    table = fitted.tables["two_bins_16um"]
    assert genes_of(fitted, "two_map") == list(table.var_names) == two
    np.testing.assert_allclose(map_values(fitted, "two_map"), map_values(fitted)[[4, 1]], rtol=1e-5)
    np.testing.assert_allclose(table.X, fitted.tables["pixnet_bins_16um"].X[:, [4, 1]], atol=1e-6)
    assert table.var["held_out_pcc"].iloc[0] == pytest.approx(model.record.held_out_pcc[4], nan_ok=True)
    predict(fitted, genes=two[0], key_added="one")
    assert genes_of(fitted, "one_map") == two[:1]


@pytest.mark.parametrize("model_of", ["fitted", "counted"])
def test_regions_in_memory_are_those_of_the_table(request, predict, model_of):
    """As cross-validation predicts them: nothing is written, a region on glass or off the slide is NaN."""
    sdata = request.getfixturevalue(model_of)
    model = ps.PixNet.load(sdata.attrs["pixnet_sd"]["model"])
    slide = open_slide(sdata, working_mpp=model.record.working_mpp)
    systems = {"coordinate_system": slide.coordinate_system, "from_system": slide.working_from_system}
    regions, _ = regions_of(sdata, BINS, **systems)
    assert not regions.is_aligned  # squares of the array, turned as it is, which their outlines are not
    found = predict_regions(model, slide, regions, device="cpu", show_progress_bar=False)
    assert not sdata.tables.keys() - {TABLE}
    predict(sdata, shapes_key=BINS, write=None)
    np.testing.assert_allclose(found, sdata.tables[f"pixnet_{BINS}"].X, atol=1e-6)
    off = Circles([[-500.0, 50.0], [100.0, 100.0], [3.0, 3.0]], [5.0, 5.0, 3.0])
    rows = predict_regions(model, slide, off, device="cpu", show_progress_bar=False)
    assert np.isnan(rows).all(axis=1).tolist() == np.isnan(rows).any(axis=1).tolist() == [True, False, True]
    with pytest.raises(DataError):
        predict_regions(model, slide, off.subset([0, 2]), device="cpu", show_progress_bar=False)


def counts(table: AnnData) -> np.ndarray:
    """Expected counts of the genes, and of all."""
    return np.column_stack([table.layers["expected_counts"], table.obs["expected_total_counts"]])


def test_counts(counted, predict):
    """They say what they are; totals are not those of each bin after two epochs, but of all together."""
    predict(counted, shapes_key=BINS)
    key = f"pixnet_{BINS}"
    table, of_map = counted.tables[key], counted.attrs["pixnet_sd"]["maps"]["pixnet_map"]
    expected = counts(table)
    np.testing.assert_allclose(counts(sd.read_zarr(counted.path).tables[key]), expected, rtol=1e-6)
    assert (expected > 0).all()
    assert expected[:, -1].sum() == pytest.approx(counted.tables[TABLE].X.sum(), rel=0.25)
    assert of_map["units"] == "counts per µm²"
    assert genes_of(counted, "pixnet_map") == [*table.var_names, "total_counts"]
    said = table.uns["pixnet_sd"]
    assert said["objective"] == "nb_pcc"
    assert "log1p(10000 * expected_counts / sum)" in said["X"]
    assert "add up" in said["layers"]["expected_counts"]
    assert ps.tl.evaluate(counted, table_key=TABLE, predicted_key=key).attrs["MSE"] < 20
    genes = list(table.var_names[[4, 1]])
    predict(counted, shapes_key=BINS, write=None, genes=genes, key_added="two")
    np.testing.assert_allclose(counted.tables[f"two_{BINS}"].X, table[:, genes].X, rtol=1e-5)


def test_intervals_are_of_counts_at_the_expected_depth(counted, predict):
    """Whole counts, in the units of X, of which a share lies below the upper end and not below the lower one."""
    predict(counted, shapes_key=BINS, write=None, interval=0.8)
    table = counted.tables[f"pixnet_{BINS}"]
    total = table.obs["expected_total_counts"].to_numpy(float)[:, None]
    low, high = (np.expm1(table.layers[name].astype(float)) * total / 1e4 for name in ("lower", "upper"))
    np.testing.assert_allclose(low, np.rint(low), atol=1e-2)
    (alpha,) = (table.var[name].to_numpy() for name in table.var if name.startswith("dispersion_"))
    of = stats.nbinom(1 / alpha, 1 / (1 + alpha * table.layers["expected_counts"].astype(float)))
    for found, probability in ((low, 0.1), (high, 0.9)):
        np.testing.assert_allclose(found, of.ppf(probability), rtol=0.02, atol=1.01)
    assert (high > low).any()
    assert set(table.uns["pixnet_sd"]["layers"]) == {"expected_counts", "lower", "upper"}
    predict(counted, shapes_key=BINS, write=None, interval=None, overwrite=True)
    again = counted.tables[f"pixnet_{BINS}"]
    assert set(again.layers) == {"expected_counts"}
    np.testing.assert_array_equal(again.X, table.X)


class TestReuse:
    """A second call reads the map instead of running the network."""

    @pytest.mark.parametrize("arguments", [{"map_um": 8}, {"write": "factors", "radius_um": 16}, {"bin_um": 16}])
    def test_the_same_call_finds_its_results(self, fitted, predict, forward_passes, arguments):
        predict(fitted, **arguments)
        del forward_passes[:]
        again = sd.read_zarr(fitted.path)
        for sdata in (fitted, again):
            predict(sdata, **arguments)
        assert forward_passes == []
        table = next((key for key in again.tables if key.startswith("pixnet_") and "um" in key), None)
        if table is None:
            return
        again.tables[table].X[:] = 0  # nor is it taken for its own when someone else wrote it
        again.delete_element_from_disk(table)
        again.write_element(table)
        with pytest.raises(StoreError, match=table):
            predict(again, **arguments)

    def test_what_a_map_does_not_have(self, fitted, predict, model, forward_passes):
        predict(fitted, map_um=8)
        predict(fitted, bin_um=16, write=None)  # a coarser map is not enough
        predict(fitted, genes=model.genes[:2], key_added="two")
        predict(fitted, bin_um=16, write=None, key_added="two")  # nor are fewer genes
        assert len(forward_passes) == 4
        predict(fitted, overwrite=True)
        predict(fitted, bin_um=16, genes=model.genes[2:4], overwrite=True)  # a part of its genes is
        assert len(forward_passes) == 5
        assert list(fitted.tables["pixnet_bins_16um"].var_names) == model.genes[2:4]
        assert genes_of(fitted, "pixnet_map") == model.genes

    def test_of_another_model_or_averaged(self, fitted, predict, model, forward_passes):
        predict(fitted)
        del forward_passes[:]
        torch.nn.init.ones_(model.network.head.bias)  # its record still has the hash of before
        for arguments in ({"model": model}, {"n_symmetries": 4}):
            with pytest.raises(StoreError, match="pixnet_map"):
                predict(fitted, bin_um=16, **arguments)
        assert forward_passes == []
        predict(fitted, bin_um=16, n_symmetries=4, overwrite=True)
        assert forward_passes


def test_overwrite(fitted, predict, model):
    predict(fitted, bin_um=16, write=None)
    first = fitted.tables["pixnet_bins_16um"].X.copy()
    with pytest.raises(StoreError, match="pixnet_bins_16um"):
        predict(fitted, bin_um=16, write=None, genes=model.genes[:2])
    fitted.tables["pixnet_bins_16um"].X[:] = -1
    predict(fitted, bin_um=16, write=None, overwrite=True)
    for sdata in (fitted, sd.read_zarr(fitted.path)):
        np.testing.assert_array_equal(sdata.tables["pixnet_bins_16um"].X, first)
    predict(fitted, bin_um=16, genes=model.genes[:2], n_symmetries=4, overwrite=True)
    again = sd.read_zarr(fitted.path)
    assert genes_of(again, "pixnet_map") == list(again.tables["pixnet_bins_16um"].var_names) == model.genes[:2]


def test_shapes_partly_off_the_image_and_smaller_than_a_pixel(fitted, predict):
    """A dot gets the pixel that it lies in, a region beside the image NaN."""
    for key, x, radius in (("spots", [100, 198, 500], 5), ("dots", [100, 100.4], 0.05)):
        xy = np.column_stack([x, np.full(len(x), 100.0)])
        with_shapes(fitted, key, xy, geometry=0, radius=radius, index=np.arange(5, 5 + len(x)))
    with pytest.warns(UserWarning, match="1 of 3 regions"):
        predict(fitted, shapes_key="spots", radius_um=5, write=None)
    predict(fitted, shapes_key="dots", write=None)
    for name, on_tissue in (("spots_circles_5um", [True, True, False]), ("dots", [True, True])):
        table = fitted.tables[f"pixnet_{name}"]
        assert list(table.obs["instance_id"]) == [5, 6, 7][: len(on_tissue)]
        assert list(table.obs["on_tissue"]) == on_tissue
        np.testing.assert_array_equal(np.isnan(table.X).any(axis=1), ~table.obs["on_tissue"])
    assert list(fitted.shapes["pixnet_spots_circles_5um_shapes"].index) == [5, 6, 7]


def test_regions_without_tissue(fitted, predict, model, forward_passes):
    """No tile is run for them; they take no part in scores, and do not keep the others from being drawn."""
    with_shapes(fitted, "rim", np.array([[3.0, 3], [100, 100], [197, 3], [110, 90]]), geometry=0, radius=3)
    predict(fitted, shapes_key="rim", write=None, tile_px=64)
    assert forward_passes == [1]
    table = sd.read_zarr(fitted.path).tables["pixnet_rim"]
    assert list(table.obs["on_tissue"]) == [False, True, False, True]
    sq.pl.spatial_scatter(table, color=model.genes[0])
    (circles,) = plt.gcf().axes[0].collections
    assert len(circles.get_paths()) == 4
    np.testing.assert_allclose(np.ma.filled(circles.get_array(), np.nan), table.X[:, 0], rtol=1e-6)
    plt.close("all")
    obs = pd.DataFrame({"region": pd.Categorical(["rim"] * 4), "id": range(4)}, index=list("abcd"))
    measured = AnnData(np.arange(24.0).reshape(4, 6), obs=obs, var=pd.DataFrame(index=model.genes))
    keys = {"table_key": "measured", "predicted_key": "pixnet_rim"}
    for rows, n_regions in ((slice(None), 2), ([0, 1], 1)):
        part = TableModel.parse(measured[rows].copy(), region="rim", region_key="region", instance_key="id")
        fitted.tables["measured"] = part
        scores = ps.tl.evaluate(fitted, **keys)
        assert scores.attrs["n_regions"] == n_regions
        assert np.isfinite(scores["mse"]).all()


@pytest.mark.parametrize("on_slide", [True, False])
def test_no_region_has_tissue(fitted, predict, forward_passes, on_slide):
    """It is said before the network runs, and nothing is written; the ring's box has tissue, and the ring has none."""
    ring = shapely.box(0, 0, 200, 200) - shapely.box(2, 2, 198, 198)
    with_shapes(fitted, "rim", gpd.GeoDataFrame(geometry=[shapely.box(0, 0, 7, 7), *[ring] * on_slide]))
    before = content(fitted.path)
    for arguments in ({"shapes_key": "rim"}, {"shapes_key": "rim", "write": None}):
        with pytest.raises(DataError):
            predict(fitted, **arguments)
    assert forward_passes == []
    assert content(fitted.path) == before


def test_what_was_taken_is_said_and_recorded(fitted, predict, model, caplog):
    caplog.set_level("INFO", "pixnet_sd")
    predict(fitted, bin_um=16)
    taken = {"image": FULL, "image_px": [200, 200], "channels": [*"rgb"], "coordinate_system": "sample", "mpp": 1.0}
    notes = fitted.attrs["pixnet_sd"]
    written = [notes["maps"]["pixnet_map"], notes["tables"]["pixnet_bins_16um"]]
    written.append(sd.read_zarr(fitted.path).tables["pixnet_bins_16um"].uns["pixnet_sd"])
    for note in (model.record.slides["slide"], *written):
        assert all(np.array_equal(note[key], taken[key]) for key in taken)
        assert BINS in note["mpp_rule"]
    for note in written:
        known = (note["model_sha256"], note["target_sum"], note["log_base"])
        assert known == (model.record.weights_sha256, 1e4, "e")
    assert model.record.slides["slide"]["tables"] == {"square_008um": BINS}
    assert any(all(word in line for word in (FULL, "r, g, b", "'sample'", BINS)) for line in caplog.messages)
    assert len(caplog.messages) <= 10
