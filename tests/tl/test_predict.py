"""Every way to ask for regions, what comes out, and when the network is run again."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import shapely
import spatialdata as sd
import torch
from scipy import ndimage
from spatialdata.models import Labels2DModel
from spatialdata.transformations import Identity, Scale, set_transformation

from pixnet_sd.errors import PixNetError, StoreError

FULL, BINS, TABLE = "sample_full_image", "sample_square_008um", "square_008um"


def genes_of(sdata, key):
    return list(sdata.images[key]["scale0"].coords["c"].values)


def test_circles(fitted, predict, model):
    predict(fitted, radius_um=8)
    table, shapes = fitted.tables["pixnet_circles_8um"], fitted.shapes["pixnet_circles_8um_shapes"]
    assert table.shape == (len(shapes), 6)
    assert list(table.var_names) == model.genes
    assert table.X.dtype == np.float32
    assert np.isfinite(table.X).all()
    assert (shapes["radius"] == 8).all()
    centres = shapely.get_coordinates(shapes.geometry.to_numpy())
    assert set(np.diff(np.unique(centres[:, 0]))) == {16}  # touching
    assert (centres[:, 0] % 16 == 8).all()
    np.testing.assert_array_equal(table.obsm["spatial"], centres)
    np.testing.assert_allclose(table.obs["area_um2"], np.pi * 64)
    # tissue pixels, of which a small circle has a few more or less than its area
    assert table.obs["tissue_area_um2"].between(0, 1.1 * np.pi * 64).all()
    np.testing.assert_array_equal(table.var["held_out_pcc"].to_numpy(float), model.record.var["held_out_pcc"])


def test_circles_lie_on_tissue(fitted, predict):
    predict(fitted, radius_um=8)
    tissue = fitted.labels["pixnet_map_tissue"]["scale0"]["image"].values
    col, row = (shapely.get_coordinates(fitted.shapes["pixnet_circles_8um_shapes"].geometry.to_numpy()) // 4).T
    assert tissue[row.astype(int), col.astype(int)].all()
    assert 0.3 < tissue.mean() < 0.95


def test_spacing(fitted, predict):
    predict(fitted, radius_um=4, spacing_um=32, write=None)
    centres = shapely.get_coordinates(fitted.shapes["pixnet_circles_4um_shapes"].geometry.to_numpy())
    assert (centres % 32 == 16).all()
    assert len(np.unique(centres, axis=0)) == len(centres)


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


def test_shapes(fitted, predict):
    predict(fitted, shapes_key=BINS, write=None)
    table = fitted.tables[f"pixnet_{BINS}"]
    assert table.uns["spatialdata_attrs"]["region"] == BINS
    assert list(table.obs["instance_id"]) == list(fitted.shapes[BINS].index)
    assert "pixnet_map" not in fitted.images
    np.testing.assert_allclose(table.obs["area_um2"], 64)


def test_circles_at_shapes(fitted, predict):
    predict(fitted, shapes_key=BINS, radius_um=10, write=None)
    key = f"pixnet_{BINS}_circles_10um"
    table, circles = fitted.tables[key], fitted.shapes[f"{key}_shapes"]
    assert list(circles.index) == list(fitted.shapes[BINS].index)
    assert (circles["radius"] == 10).all()
    centroids = shapely.get_coordinates(shapely.centroid(fitted.shapes[BINS].geometry.to_numpy()))
    np.testing.assert_allclose(shapely.get_coordinates(circles.geometry.to_numpy()), centroids, atol=1e-9)
    assert table.uns["spatialdata_attrs"]["region"] == f"{key}_shapes"


def in_memory(sdata: sd.SpatialData) -> sd.SpatialData:
    """The same object without a store: of a backed one, what is only in memory is refused."""
    elements = {name: element for _, name, element in sdata.gen_elements()}
    return sd.SpatialData.init_from_elements(elements, attrs=sdata.attrs)


def test_labels(fitted, predict, model):
    """A labels element on a coarser grid, against the same squares as shapes."""
    labels = np.zeros((25, 25), dtype=np.int32)
    labels[10:14, 10:12], labels[5, 9] = 7, 3
    element = Labels2DModel.parse(labels, dims=("y", "x"), transformations={"sample": Scale([8, 8], axes=("x", "y"))})
    fitted.labels["cells"] = element
    squares = shapely.box([72, 80], [40, 80], [80, 96], [48, 112])
    frame = fitted.shapes[BINS].iloc[:2].set_geometry(squares)
    frame.attrs = {}
    fitted.shapes["squares"] = sd.models.ShapesModel.parse(frame, transformations={"sample": Identity()})
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
    native, coarse = map_values(fitted), map_values(fitted, "coarse_map")
    padded = np.pad(native, ((0, 0), (0, 1), (0, 1)))[:, :51, :51]
    np.testing.assert_allclose(
        coarse[:, :17, :17], padded.reshape(len(native), 17, 3, 17, 3).mean(axis=(2, 4)), atol=1e-5
    )
    to_native, to_coarse = (
        sd.transformations.get_transformation(fitted.images[key], "sample").to_affine_matrix(("x", "y"), ("x", "y"))
        for key in ("pixnet_map", "coarse_map")
    )
    np.testing.assert_allclose(to_coarse, to_native @ np.diag([3, 3, 1]))


@pytest.mark.parametrize(("map_um", "advice"), [(10, "map_um=8"), (2, "map_um=4")])
def test_map_that_would_have_to_be_interpolated(fitted, predict, map_um, advice):
    with pytest.raises(PixNetError, match=f"whole multiples of the native 4 µm. Give {advice}"):
        predict(fitted, map_um=map_um)


def test_without_map(fitted, predict):
    predict(fitted, radius_um=8, write=None)
    assert not fitted.labels
    assert "pixnet_map" not in fitted.images
    assert "pixnet_circles_8um" in fitted.tables


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"write": None}, "Nothing to predict: write=None and no radius_um, bin_um or shapes_key"),
        ({"radius_um": 8, "bin_um": 8}, "leave out radius_um and shapes_key, or call twice"),
        ({"spacing_um": 8}, "give it with radius_um"),
        ({"radius_um": 1e-9}, r"radius_um=1e-09: these are about \d"),
        ({"radius_um": 8, "spacing_um": 1e-6}, "spacing_um=1e-06"),
        ({"bin_um": 1e-300}, "bin_um=1e-300"),
        ({"bin_um": 0.2}, "bin_um=0.2.* Give bin_um=0.5"),
        ({"radius_um": 1e-3, "shapes_key": BINS}, "radius_um=0.001"),
        ({"radius_um": 1e9, "shapes_key": BINS}, r"radius_um=1e\+09"),
        ({"map_um": 1e9}, "Give map_um=200 at most"),
        ({"map_um": 400}, "Give map_um=200 at most"),
        ({"tile_px": 2**20}, "tile_px=1048576"),
        ({"batch_size": 2**16}, "batch_size=65536"),
        ({"mpp": 1e9, "allow_any_mpp": True}, "mpp=1e"),
        ({"mpp": 1e-9, "allow_any_mpp": True}, "mpp=1e-09"),
        ({"image_key": "he"}, "image_key="),
        ({"coordinate_system": "microns"}, "coordinate_system="),
        ({"radius_um": 4000}, "radius_um=4000, spacing_um=8000 gives no region: the slide is 200 x 200 µm"),
        ({"shapes_key": "cells"}, "There is no shapes or labels element 'cells'.*shapes_key="),
    ],
)
@pytest.mark.filterwarnings("ignore:mpp = ")
def test_arguments_that_do_not_fit(fitted, predict, forward_passes, monkeypatch, arguments, message):
    monkeypatch.setattr("pixnet_sd.tl._checks.available_memory", lambda: 2**32)
    with pytest.raises(PixNetError, match=message):
        predict(fitted, **arguments)
    assert forward_passes == []
    assert not fitted.labels


class TestReuse:
    """A second call reads the map instead of running the network, and says so."""

    def test_values_are_the_same(self, fitted, predict, forward_passes, caplog):
        predict(fitted, shapes_key=BINS, write=None, key_added="run")
        predict(fitted)
        del forward_passes[:]
        caplog.set_level("INFO", "pixnet_sd")
        predict(fitted, shapes_key=BINS)
        assert forward_passes == []
        assert "gene map 'pixnet_map' reused for the regions: 0 tiles run, 1 windows read back" in caplog.text
        run, read = (fitted.tables[f"{key}_{BINS}"].X for key in ("run", "pixnet"))
        np.testing.assert_allclose(read, run, atol=1e-5)

    def test_after_reading_the_store_anew(self, fitted, predict, forward_passes):
        predict(fitted)
        del forward_passes[:]
        predict(sd.read_zarr(fitted.path), bin_um=16)
        assert forward_passes == []

    def test_nothing_left_to_do(self, fitted, predict, forward_passes, caplog):
        predict(fitted)
        del forward_passes[:]
        caplog.set_level("INFO", "pixnet_sd")
        predict(fitted)
        assert forward_passes == []
        assert "'pixnet_map' of this model and slide is there already" in caplog.text

    def test_fewer_genes(self, fitted, predict, model, forward_passes):
        predict(fitted, bin_um=16)
        del forward_passes[:]
        predict(fitted, bin_um=16, genes=model.genes[2:4], overwrite=True)
        assert forward_passes == []
        assert list(fitted.tables["pixnet_bins_16um"].var_names) == model.genes[2:4]
        assert genes_of(fitted, "pixnet_map") == model.genes

    def test_more_genes_than_the_map_has(self, fitted, predict, model, forward_passes):
        predict(fitted, genes=model.genes[:2])
        del forward_passes[:]
        predict(fitted, bin_um=16, write=None)
        assert forward_passes == [1]

    def test_regions_on_glass_are_run(self, fitted, predict, forward_passes, caplog):
        predict(fitted)
        del forward_passes[:]
        corner = sd.models.ShapesModel.parse(
            np.array([[3.0, 3.0], [100.0, 100.0]]), geometry=0, radius=3, transformations={"sample": Identity()}
        )
        fitted.shapes["corner"] = corner
        fitted.write_element("corner")
        caplog.set_level("INFO", "pixnet_sd")
        predict(fitted, shapes_key="corner")
        assert forward_passes == [1]
        assert "1 regions lie off tissue, where the map is 0: their tiles are run" in caplog.text
        table = fitted.tables["pixnet_corner"]
        assert np.isfinite(table.X).all()
        assert list(table.obs["tissue_area_um2"] > 0) == [False, True]

    def test_a_coarser_map_is_not_enough(self, fitted, predict, forward_passes):
        predict(fitted, map_um=8)
        del forward_passes[:]
        predict(fitted, bin_um=16, write=None)
        assert forward_passes == [1]

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
        with pytest.raises(StoreError, match=r"images\['pixnet_map'\] exists already. Pass `overwrite=True`"):
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
        with pytest.raises(StoreError, match="exists already"):
            predict(fitted)


def test_existing_table(fitted, predict, model):
    predict(fitted, bin_um=16, write=None)
    first = fitted.tables["pixnet_bins_16um"].X.copy()
    with pytest.raises(StoreError, match=r"tables\['pixnet_bins_16um'\] exists already. Pass `overwrite=True`"):
        predict(fitted, bin_um=16, write=None, genes=model.genes[:2])
    fitted.tables["pixnet_bins_16um"].X[:] = -1
    predict(fitted, bin_um=16, write=None, overwrite=True)
    for sdata in (fitted, sd.read_zarr(fitted.path)):
        np.testing.assert_array_equal(sdata.tables["pixnet_bins_16um"].X, first)


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
        with pytest.raises(StoreError, match="exists already"):
            predict(again, **arguments)


def test_overwrite_with_other_genes(fitted, predict, model):
    predict(fitted, radius_um=16)
    predict(fitted, radius_um=16, genes=model.genes[:2], n_symmetries=4, overwrite=True)
    again = sd.read_zarr(fitted.path)
    assert genes_of(again, "pixnet_map") == model.genes[:2]
    assert list(again.tables["pixnet_circles_16um"].var_names) == model.genes[:2]


def test_in_memory(fitted, model, predict, map_values):
    predict(fitted, radius_um=8)
    memory = sd.SpatialData(images={FULL: fitted.images[FULL]}, shapes={BINS: fitted.shapes[BINS]})
    predict(memory, model, radius_um=8)
    np.testing.assert_array_equal(map_values(memory), map_values(fitted))
    np.testing.assert_array_equal(memory.tables["pixnet_circles_8um"].X, fitted.tables["pixnet_circles_8um"].X)
    predict(memory, model, shapes_key=BINS)
    assert memory.attrs["pixnet_sd"]["tables"][f"pixnet_{BINS}"]["image"] == FULL


def test_slide_with_only_an_image(fitted, checkpoint, predict, tmp_path):
    image = fitted.images[FULL]
    sd.SpatialData(images={"he": image}).write(tmp_path / "other.zarr")
    other = sd.read_zarr(tmp_path / "other.zarr")
    predict(other, checkpoint, radius_um=8, mpp=1.0)
    predict(fitted, radius_um=8)
    np.testing.assert_array_equal(other.tables["pixnet_circles_8um"].X, fitted.tables["pixnet_circles_8um"].X)
    assert other.attrs["pixnet_sd"]["maps"]["pixnet_map"]["mpp"] == 1.0


def test_other_resolution(fitted, model, predict):
    """At twice the mpp the slide is twice as wide: as many circles as on a slide of that size."""
    predict(fitted, radius_um=8, write=None)
    fewer = fitted.tables["pixnet_circles_8um"].n_obs
    with pytest.warns(UserWarning, match=r"mpp = 2 µm/px .* disagrees with 1 µm/px"):
        predict(fitted, radius_um=8, mpp=2, write=None, overwrite=True)
    assert fitted.tables["pixnet_circles_8um"].n_obs > 3 * fewer
    assert (fitted.shapes["pixnet_circles_8um_shapes"]["radius"] == 4).all()


def test_model_given_as_text(fitted, checkpoint, predict, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    del fitted.attrs["pixnet_sd"]
    predict(fitted, str(tmp_path / "copy"), bin_um=16, write=None)
    assert "pixnet_bins_16um" in fitted.tables


def test_alpha_is_left_out(fitted, predict):
    fitted = in_memory(fitted)
    predict(fitted, bin_um=16, write=None)
    pixels = fitted.images[FULL]["scale0"]["image"].values
    fitted.images[FULL] = sd.models.Image2DModel.parse(
        np.concatenate([pixels, np.full_like(pixels[:1], 255)]),
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b", "a"],
        transformations={"sample": Identity()},
        scale_factors=[2] * (len(fitted.images[FULL]) - 1),
    )
    predict(fitted, bin_um=16, write=None, key_added="rgba", image_key=FULL)
    np.testing.assert_array_equal(fitted.tables["rgba_bins_16um"].X, fitted.tables["pixnet_bins_16um"].X)


def test_shapes_partly_off_the_image(fitted, predict):
    xy = np.array([[100.0, 100.0], [198.0, 100.0], [500.0, 100.0]])
    fitted.shapes["spots"] = sd.models.ShapesModel.parse(
        xy, geometry=0, radius=5, index=np.array([5, 6, 7]), transformations={"sample": Identity()}
    )
    fitted.write_element("spots")
    with pytest.warns(UserWarning, match="1 of 3 regions lie wholly outside the image"):
        predict(fitted, shapes_key="spots", radius_um=5, write=None)
    assert list(fitted.tables["pixnet_spots_circles_5um"].obs["instance_id"]) == [5, 6]
    assert list(fitted.shapes["pixnet_spots_circles_5um_shapes"].index) == [5, 6]


def test_region_too_small_for_a_pixel(fitted, predict):
    """It is given the pixel that it lies in."""
    xy = np.array([[100.0, 100.0], [100.4, 100.4]])
    for key, radius in (("dots", 0.05), ("spots", 0.75)):
        fitted.shapes[key] = sd.models.ShapesModel.parse(
            xy, geometry=0, radius=radius, transformations={"sample": Identity()}
        )
        fitted.write_element(key)
        predict(fitted, shapes_key=key, write=None)
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
