"""Every way to ask for regions, what comes out, and when the network is run again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import shapely
import spatialdata as sd
import torch
from scipy import ndimage
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel
from spatialdata.transformations import Identity, Scale, get_transformation, set_transformation

import pixnet_sd as ps
from pixnet_sd.errors import PixNetError, StoreError
from pixnet_sd.geometry import Circles
from pixnet_sd.slide import open_slide
from pixnet_sd.slide.elements import regions_of
from pixnet_sd.tl import predict_regions

FULL, BINS, TABLE = "sample_full_image", "sample_square_008um", "square_008um"


def genes_of(sdata, key):
    return list(sdata.images[key]["scale0"].coords["c"].values)


def centres_of(sdata, key):
    return shapely.get_coordinates(shapely.centroid(sdata.shapes[key].geometry.to_numpy()))


def in_memory(sdata: sd.SpatialData) -> sd.SpatialData:
    """The same object without a store: of a backed one, what is only in memory is refused."""
    elements = {name: element for _, name, element in sdata.gen_elements()}
    return sd.SpatialData.init_from_elements(elements, attrs=sdata.attrs)


def with_circles(sdata, key, xy, radius, **options):
    transformations = {"sample": Identity()}
    circles = ShapesModel.parse(
        np.array(xy, float), geometry=0, radius=radius, transformations=transformations, **options
    )
    sdata.shapes[key] = circles
    sdata.write_element(key)


def test_circles(fitted, predict, model):
    predict(fitted, radius_um=8)
    key = "pixnet_circles_8um"
    table, shapes = fitted.tables[key], fitted.shapes[f"{key}_shapes"]
    assert table.shape == (len(shapes), 6)
    assert list(table.var_names) == model.genes
    assert table.X.dtype == np.float32
    assert np.isfinite(table.X).all()
    assert (shapes["radius"] == 8).all()
    centres = centres_of(fitted, f"{key}_shapes")
    assert set(np.diff(np.unique(centres[:, 0]))) == {16}  # touching
    assert (centres[:, 0] % 16 == 8).all()
    np.testing.assert_array_equal(table.obsm["spatial"], centres)
    np.testing.assert_allclose(table.obs["area_um2"], np.pi * 64)
    # tissue pixels, of which a small circle has a few more or less than its area
    assert table.obs["tissue_area_um2"].between(0, 1.1 * np.pi * 64).all()
    np.testing.assert_array_equal(table.var["held_out_pcc"].to_numpy(float), model.record.var["held_out_pcc"])
    tissue = fitted.labels["pixnet_map_tissue"]["scale0"]["image"].values
    col, row = (centres // 4).T.astype(int)
    assert tissue[row, col].all()
    assert 0.3 < tissue.mean() < 0.95
    predict(fitted, radius_um=4, spacing_um=32, write=None)
    apart = centres_of(fitted, "pixnet_circles_4um_shapes")
    assert (apart % 32 == 16).all()
    assert len(np.unique(apart, axis=0)) == len(apart)


def test_bins(fitted, predict, map_values):
    """Bins of two map pixels: their values are means of the map, but for the bilinear resize at their rims."""
    predict(fitted, bin_um=8)
    table, shapes = fitted.tables["pixnet_bins_8um"], fitted.shapes["pixnet_bins_8um_shapes"]
    assert (shapely.area(shapes.geometry.to_numpy()) == 64).all()
    np.testing.assert_allclose(table.obs["area_um2"], 64)
    values, tissue = map_values(fitted), fitted.labels["pixnet_map_tissue"]["scale0"]["image"].values
    col, row = (np.floor(table.obsm["spatial"] / 8).astype(int)).T
    inner = ndimage.minimum_filter(tissue, 4)[2 * row + 1, 2 * col + 1] == 1
    assert inner.sum() > 50
    means = values.reshape(len(values), 25, 2, 25, 2).mean(axis=(2, 4))[:, row, col].T
    for gene in range(values.shape[0]):
        assert np.corrcoef(means[inner, gene], table.X[inner, gene])[0, 1] > 0.95


def test_shapes_and_circles_at_them(fitted, predict):
    predict(fitted, shapes_key=BINS, write=None)
    predict(fitted, shapes_key=BINS, radius_um=10, write=None)
    assert not fitted.labels
    assert "pixnet_map" not in fitted.images
    table = fitted.tables[f"pixnet_{BINS}"]
    assert table.uns["spatialdata_attrs"]["region"] == BINS
    assert list(table.obs["instance_id"]) == list(fitted.shapes[BINS].index)
    np.testing.assert_allclose(table.obs["area_um2"], 64)
    key = f"pixnet_{BINS}_circles_10um"
    assert list(fitted.shapes[f"{key}_shapes"].index) == list(fitted.shapes[BINS].index)
    assert (fitted.shapes[f"{key}_shapes"]["radius"] == 10).all()
    np.testing.assert_allclose(centres_of(fitted, f"{key}_shapes"), centres_of(fitted, BINS), atol=1e-9)
    assert fitted.tables[key].uns["spatialdata_attrs"]["region"] == f"{key}_shapes"


def test_labels(fitted, predict):
    """A labels element on a coarser grid, against the same squares as shapes."""
    labels = np.zeros((25, 25), dtype=np.int32)
    labels[10:14, 10:12], labels[5, 9] = 7, 3
    element = Labels2DModel.parse(labels, dims=("y", "x"), transformations={"sample": Scale([8, 8], axes=("x", "y"))})
    fitted.labels["cells"] = element
    frame = fitted.shapes[BINS].iloc[:2].set_geometry(shapely.box([72, 80], [40, 80], [80, 96], [48, 112]))
    frame.attrs = {}
    fitted.shapes["squares"] = ShapesModel.parse(frame, transformations={"sample": Identity()})
    fitted.write_element(["cells", "squares"])
    predict(fitted, shapes_key="cells", write=None)
    predict(fitted, shapes_key="squares", write=None)
    table = fitted.tables["pixnet_cells"]
    assert list(table.obs["instance_id"]) == [3, 7]
    assert table.uns["spatialdata_attrs"]["region"] == "cells"
    np.testing.assert_allclose(table.X, fitted.tables["pixnet_squares"].X, atol=1e-5)


def test_some_genes(fitted, predict, model, map_values):
    predict(fitted, bin_um=16)
    two = [model.genes[4], model.genes[1]]
    predict(fitted, bin_um=16, genes=two, key_added="two")
    assert genes_of(fitted, "two_map") == two
    np.testing.assert_allclose(map_values(fitted, "two_map"), map_values(fitted)[[4, 1]], rtol=1e-5)
    table = fitted.tables["two_bins_16um"]
    assert list(table.var_names) == two
    np.testing.assert_allclose(table.X, fitted.tables["pixnet_bins_16um"].X[:, [4, 1]], atol=1e-6)
    assert table.var["held_out_pcc"].iloc[0] == pytest.approx(model.record.held_out_pcc[4], nan_ok=True)
    predict(fitted, genes=two[0], key_added="one")
    assert genes_of(fitted, "one_map") == two[:1]


def test_coarser_map(fitted, predict, map_values):
    predict(fitted)
    predict(fitted, map_um=12, key_added="coarse")
    native = np.pad(map_values(fitted), ((0, 0), (0, 1), (0, 1)))[:, :51, :51]
    means = native.reshape(len(native), 17, 3, 17, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(map_values(fitted, "coarse_map")[:, :17, :17], means, atol=1e-5)
    to_native, to_coarse = (
        get_transformation(fitted.images[key], "sample").to_affine_matrix(("x", "y"), ("x", "y"))
        for key in ("pixnet_map", "coarse_map")
    )
    np.testing.assert_allclose(to_coarse, to_native @ np.diag([3, 3, 1]))


@pytest.mark.parametrize("model_of", ["fitted", "counted"])
def test_regions_in_memory_are_those_of_the_table(request, predict, model_of):
    """As cross-validation predicts them: nothing is written, a region off the slide is NaN."""
    sdata = request.getfixturevalue(model_of)
    model = ps.PixNet.load(sdata.attrs["pixnet_sd"]["model"])
    slide = open_slide(sdata, working_mpp=model.record.working_mpp)
    systems = {"coordinate_system": slide.coordinate_system, "from_system": slide.working_from_system}
    regions, _ = regions_of(sdata, BINS, **systems)
    found = predict_regions(model, slide, regions, device="cpu", show_progress_bar=False)
    assert not sdata.tables.keys() - {TABLE}
    predict(sdata, shapes_key=BINS, write=None)
    np.testing.assert_allclose(found, sdata.tables[f"pixnet_{BINS}"].X, atol=1e-6)
    off = Circles([[-500.0, 50.0], [100.0, 100.0]], [5.0, 5.0])
    rows = predict_regions(model, slide, off, device="cpu", show_progress_bar=False)
    assert np.isnan(rows).all(axis=1).tolist() == [True, False]


def test_a_cut_off_run_goes_on(fitted, model, predict, forward_passes):
    """At a third of the resolution the slide is larger than a tile; windows that are summed are not run again."""
    sharp = ps.PixNet(model.network, replace(model.record, working_mpp=1 / 3))
    predict(fitted, sharp, radius_um=8, write=None, key_added="whole")
    n_whole = len(forward_passes)

    def stop(*_):
        if len(forward_passes) == n_whole + 5:
            raise KeyboardInterrupt

    handle = sharp.network.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        predict(fitted, sharp, radius_um=8, write=None)
    handle.remove()
    again = sd.read_zarr(fitted.path)
    assert "pixnet_circles_8um" not in again.tables
    predict(again, sharp, radius_um=8, write=None)
    assert len(forward_passes) < n_whole + 5 + n_whole
    np.testing.assert_array_equal(again.tables["pixnet_circles_8um"].X, fitted.tables["whole_circles_8um"].X)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"write": None}, "write=None"),
        ({"radius_um": 8, "bin_um": 8}, "bin_um"),
        ({"spacing_um": 8}, "radius_um"),
        ({"radius_um": 1e-9}, "radius_um=1e-09"),
        ({"radius_um": 8, "spacing_um": 1e-6}, "spacing_um=1e-06"),
        ({"bin_um": 1e-300}, "bin_um=1e-300"),
        ({"bin_um": 0.2}, "bin_um=0.2.*bin_um=0.5"),
        ({"radius_um": 1e-3, "shapes_key": BINS}, "radius_um=0.001"),
        ({"radius_um": 1e9, "shapes_key": BINS}, r"radius_um=1e\+09"),
        ({"map_um": 10}, "map_um=8"),
        ({"map_um": 2}, "map_um=4"),
        ({"map_um": 1e9}, "map_um=200"),
        ({"map_um": 400}, "map_um=200"),
        ({"map_um": 8, "write": "factors"}, "map_um=8"),
        ({"tile_px": 2**20}, "tile_px=1048576"),
        ({"batch_size": 2**16}, "batch_size=65536"),
        ({"mpp": 1e9, "allow_any_mpp": True}, "mpp=1e"),
        ({"mpp": 1e-9, "allow_any_mpp": True}, "mpp=1e-09"),
        ({"image_key": "he"}, "image_key="),
        ({"coordinate_system": "microns"}, "coordinate_system="),
        ({"radius_um": 4000}, "radius_um=4000"),
        ({"shapes_key": "cells"}, "shapes_key="),
    ],
)
@pytest.mark.filterwarnings("ignore:mpp = ")
def test_arguments_that_do_not_fit(fitted, predict, forward_passes, arguments, names):
    with pytest.raises(PixNetError, match=names):
        predict(fitted, **arguments)
    assert forward_passes == []
    assert not fitted.labels


class TestReuse:
    """A second call reads the map instead of running the network."""

    def test_values_are_the_same(self, fitted, predict, forward_passes, model):
        predict(fitted, shapes_key=BINS, write=None, key_added="run")
        predict(fitted, map_um=8)
        n_passes = len(forward_passes)
        predict(fitted, bin_um=16, write=None)  # a coarser map is not enough
        assert len(forward_passes) == n_passes + 1
        predict(fitted, overwrite=True)
        del forward_passes[:]
        predict(fitted)  # nothing is left to do
        predict(fitted, shapes_key=BINS)
        predict(sd.read_zarr(fitted.path), radius_um=8)
        predict(fitted, bin_um=16, genes=model.genes[2:4], overwrite=True)
        assert forward_passes == []
        run, read = (fitted.tables[f"{key}_{BINS}"].X for key in ("run", "pixnet"))
        np.testing.assert_allclose(read, run, atol=1e-5)
        assert list(fitted.tables["pixnet_bins_16um"].var_names) == model.genes[2:4]
        assert genes_of(fitted, "pixnet_map") == model.genes

    def test_more_genes_than_the_map_has(self, fitted, predict, model, forward_passes):
        predict(fitted, genes=model.genes[:2])
        predict(fitted, bin_um=16, write=None)
        assert forward_passes == [1, 1]

    def test_regions_on_glass_are_run(self, fitted, predict, forward_passes):
        predict(fitted)
        with_circles(fitted, "corner", [[3.0, 3.0], [100.0, 100.0]], 3)
        predict(fitted, shapes_key="corner")
        assert forward_passes == [1, 1]
        table = fitted.tables["pixnet_corner"]
        assert np.isfinite(table.X).all()
        assert list(table.obs["tissue_area_um2"] > 0) == [False, True]

    @pytest.mark.parametrize("change", ["model", "image", "symmetries"])
    def test_something_else(self, fitted, predict, model, forward_passes, change):
        fitted = in_memory(fitted)
        predict(fitted)
        del forward_passes[:]
        arguments = {}
        if change == "model":
            torch.nn.init.ones_(model.network.head.bias)  # its record still has the hash of before
            arguments["model"] = model
        elif change == "image":
            fitted.images[FULL]["scale0"]["image"].data = 255 - fitted.images[FULL]["scale0"]["image"].data // 2
        else:
            arguments["n_symmetries"] = 4
        with pytest.raises(StoreError, match="pixnet_map"):
            predict(fitted, bin_um=16, **arguments)
        assert forward_passes == []
        predict(fitted, bin_um=16, overwrite=True, **arguments)
        assert forward_passes

    def test_map_stays_where_the_image_was(self, fitted, predict):
        """A map written before its image was aligned anew lies elsewhere: it cannot stand for a new one."""
        predict(fitted)
        del fitted.images["sample_hires_image"], fitted.images["sample_lowres_image"]  # which are not moved
        for element in (fitted.images[FULL], fitted.shapes[BINS]):
            set_transformation(element, Scale([2, 2], axes=("x", "y")), "sample")
        fitted.write_transformations()
        with pytest.raises(StoreError, match="pixnet_map"):
            predict(fitted)


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


@pytest.mark.parametrize("arguments", [{"map_um": 8}, {"write": "factors", "radius_um": 16}, {"bin_um": 16}])
def test_the_same_call_finds_its_results(fitted, predict, forward_passes, arguments):
    predict(fitted, **arguments)
    del forward_passes[:]
    again = sd.read_zarr(fitted.path)
    for sdata in (fitted, again):
        predict(sdata, **arguments)
    assert forward_passes == []
    table = next((key for key in again.tables if key.startswith("pixnet_") and "um" in key), None)
    if table:  # nor is it taken for its own when someone else wrote it
        again.tables[table].X[:] = 0
        again.delete_element_from_disk(table)
        again.write_element(table)
        with pytest.raises(StoreError, match=table):
            predict(again, **arguments)


def test_in_memory_and_with_only_an_image(fitted, checkpoint, model, predict, map_values, tmp_path):
    predict(fitted, radius_um=8)
    memory = sd.SpatialData(images={FULL: fitted.images[FULL]}, shapes={BINS: fitted.shapes[BINS]})
    sd.SpatialData(images={"he": fitted.images[FULL]}).write(tmp_path / "other.zarr")
    other = sd.read_zarr(tmp_path / "other.zarr")
    predict(memory, model, radius_um=8)
    predict(other, str(checkpoint), radius_um=8, mpp=1.0)
    for sdata in (memory, other):
        np.testing.assert_array_equal(map_values(sdata), map_values(fitted))
        np.testing.assert_array_equal(sdata.tables["pixnet_circles_8um"].X, fitted.tables["pixnet_circles_8um"].X)
    predict(memory, model, shapes_key=BINS)
    assert memory.attrs["pixnet_sd"]["tables"][f"pixnet_{BINS}"]["image"] == FULL
    assert other.attrs["pixnet_sd"]["maps"]["pixnet_map"]["mpp"] == 1.0


def test_other_resolution(fitted, predict):
    """At twice the mpp the slide is twice as wide: as many circles as on a slide of that size."""
    predict(fitted, radius_um=8, write=None)
    fewer = fitted.tables["pixnet_circles_8um"].n_obs
    with pytest.warns(UserWarning, match="mpp = 2"):
        predict(fitted, radius_um=8, mpp=2, write=None, overwrite=True)
    assert fitted.tables["pixnet_circles_8um"].n_obs > 3 * fewer
    assert (fitted.shapes["pixnet_circles_8um_shapes"]["radius"] == 4).all()


def test_alpha_is_left_out(fitted, predict):
    fitted = in_memory(fitted)
    predict(fitted, bin_um=16, write=None)
    pixels = fitted.images[FULL]["scale0"]["image"].values
    fitted.images[FULL] = Image2DModel.parse(
        np.concatenate([pixels, np.full_like(pixels[:1], 255)]),
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b", "a"],
        transformations={"sample": Identity()},
        scale_factors=[2] * (len(fitted.images[FULL]) - 1),
    )
    predict(fitted, bin_um=16, write=None, key_added="rgba", image_key=FULL)
    np.testing.assert_array_equal(fitted.tables["rgba_bins_16um"].X, fitted.tables["pixnet_bins_16um"].X)


def test_shapes_partly_off_the_image_and_smaller_than_a_pixel(fitted, predict):
    with_circles(fitted, "spots", [[100, 100], [198, 100], [500, 100]], 5, index=np.array([5, 6, 7]))
    with pytest.warns(UserWarning, match="1 of 3 regions"):
        predict(fitted, shapes_key="spots", radius_um=5, write=None)
    assert list(fitted.tables["pixnet_spots_circles_5um"].obs["instance_id"]) == [5, 6]
    assert list(fitted.shapes["pixnet_spots_circles_5um_shapes"].index) == [5, 6]
    with_circles(fitted, "dots", [[100.0, 100.0], [100.4, 100.4]], 0.05)  # each gets the pixel that it lies in
    predict(fitted, shapes_key="dots", write=None)
    assert np.isfinite(fitted.tables["pixnet_dots"].X).all()
    assert fitted.tables["pixnet_dots"].n_obs == 2


def test_what_was_taken_is_said_and_recorded(fitted, predict, model, caplog):
    caplog.set_level("INFO", "pixnet_sd")
    predict(fitted, bin_um=16)
    taken = {"image": FULL, "image_px": [200, 200], "channels": ["r", "g", "b"], "coordinate_system": "sample"}
    notes = fitted.attrs["pixnet_sd"]
    for note in (model.record.slides["slide"], notes["maps"]["pixnet_map"], notes["tables"]["pixnet_bins_16um"]):
        assert {key: note[key] for key in taken} == taken
        assert BINS in note["mpp_rule"]
    assert model.record.slides["slide"]["tables"] == {"square_008um": BINS}
    assert any(all(word in line for word in (FULL, "r, g, b", "'sample'", BINS)) for line in caplog.messages)
    assert len(caplog.messages) <= 10
