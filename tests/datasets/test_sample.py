from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import spatialdata as sd
from scipy.ndimage import gaussian_filter
from spatialdata.transformations import Identity, get_transformation

from pixnet_sd import datasets
from pixnet_sd.datasets.drawn._expression import LIBRARY_FIELD_SIGMA, LIBRARY_PLACE_SIGMA
from pixnet_sd.errors import DataError

SMALL = {"size_um": 200.0, "seed": 4}
MIDDLE = {"size_um": 400.0, "seed": 1}


@pytest.fixture(scope="module")
def small() -> sd.SpatialData:
    return datasets.sample(**SMALL)


@pytest.fixture(scope="module")
def middle() -> sd.SpatialData:
    return datasets.sample(**MIDDLE)


def full_image(sdata: sd.SpatialData) -> np.ndarray:
    return sdata.images["sample_full_image"]["scale0"].image.to_numpy()


def darkness(sdata: sd.SpatialData, factor: int) -> np.ndarray:
    """Haematoxylin-like density per block of pixels: red light is what nuclei keep and eosin lets through."""
    red = -np.log((full_image(sdata)[0] + 1.0) / 256)
    size = red.shape[0] // factor
    return red.reshape(size, factor, size, factor).mean(axis=(1, 3))


def test_elements_are_named_as_the_reader_names_them(small):
    assert set(small.images) == {"sample_full_image", "sample_hires_image", "sample_lowres_image"}
    assert set(small.shapes) == {f"sample_square_{um:03d}um" for um in (2, 8, 16)}
    assert set(small.tables) == {f"square_{um:03d}um" for um in (2, 8, 16)}
    assert set(small.coordinate_systems) == {"sample", "sample_downscaled_hires", "sample_downscaled_lowres"}


def test_full_image_is_multiscale_rgb(small):
    image = small.images["sample_full_image"]
    level = image["scale0"].image
    assert level.dims == ("c", "y", "x")
    assert level.shape == (3, 400, 400)
    assert level.dtype == np.uint8
    assert list(level.coords["c"].values) == ["r", "g", "b"]
    assert len(image.children) > 1
    assert set(get_transformation(image, get_all=True)) == {"sample"}


@pytest.mark.parametrize("name", ["hires", "lowres"])
def test_previews_map_onto_the_full_image(small, name):
    preview = small.images[f"sample_{name}_image"]
    systems = get_transformation(preview, get_all=True)
    assert set(systems) == {"sample", f"sample_downscaled_{name}"}
    assert isinstance(systems[f"sample_downscaled_{name}"], Identity)
    scale = systems["sample"].to_affine_matrix(("x", "y"), ("x", "y"))[0, 0]
    assert preview.shape[2] * scale == pytest.approx(400)


def test_shapes_are_squares_in_three_systems(small):
    shapes = small.shapes["sample_square_008um"]
    assert list(shapes.columns) == ["geometry"]
    np.testing.assert_allclose(shapes.area, (8 / 0.5) ** 2)
    systems = get_transformation(shapes, get_all=True)
    assert set(systems) == {"sample", "sample_downscaled_hires", "sample_downscaled_lowres"}


def test_tables_annotate_their_shapes(small):
    table, shapes = small.tables["square_008um"], small.shapes["sample_square_008um"]
    attrs = table.uns["spatialdata_attrs"]
    assert attrs == {"region": "sample_square_008um", "region_key": "region", "instance_key": "location_id"}
    assert {"array_row", "array_col", "in_tissue"} <= set(table.obs)
    np.testing.assert_array_equal(table.obs["location_id"], shapes.index)
    centres = np.stack([shapes.centroid.x, shapes.centroid.y], axis=1)
    np.testing.assert_allclose(table.obsm["spatial"], centres)
    assert isinstance(table.X, sp.csr_matrix)
    assert table.X.dtype == np.float32
    assert table.obs_names.is_unique


def test_lattice_is_turned_by_half_a_degree(small):
    table = small.tables["square_002um"]
    step = np.linalg.lstsq(
        np.column_stack([table.obs[["array_col", "array_row"]].to_numpy(), np.ones(table.n_obs)]),
        table.obsm["spatial"],
        rcond=None,
    )[0]
    assert np.rad2deg(np.arctan2(step[0, 1], step[0, 0])) == pytest.approx(0.5)
    assert np.hypot(*step[0]) == pytest.approx(2 / 0.5)
    assert np.linalg.det(step[:2]) > 0


@pytest.mark.parametrize("bin_um", [8, 16])
def test_large_bins_are_sums_of_small_ones(small, bin_um):
    base, table = small.tables["square_002um"], small.tables[f"square_{bin_um:03d}um"]
    step = bin_um // 2
    owner = dict(zip(zip(table.obs["array_row"], table.obs["array_col"], strict=True), range(table.n_obs), strict=True))
    summed = np.zeros(table.shape)
    parts = np.zeros(table.n_obs, dtype=int)
    values = base.X.toarray()
    for k, key in enumerate(zip(base.obs["array_row"] // step, base.obs["array_col"] // step, strict=True)):
        if key in owner:
            summed[owner[key]] += values[k]
            parts[owner[key]] += 1
    np.testing.assert_array_equal(table.X.toarray(), summed)
    assert (parts == step**2).all()


def test_same_arguments_same_bytes(small):
    again = datasets.sample(**SMALL)
    np.testing.assert_array_equal(full_image(again), full_image(small))
    for key, table in small.tables.items():
        assert (again.tables[key].X != table.X).nnz == 0
        assert again.tables[key].obs.equals(table.obs)


def test_another_seed_draws_other_tissue_with_the_same_genes(small):
    other = datasets.sample(size_um=200, seed=5)
    assert (full_image(other) != full_image(small)).mean() > 0.3
    assert other.tables["square_008um"].var.equals(small.tables["square_008um"].var)


def test_stains_do_not_depend_on_the_seed(middle):
    other = datasets.sample(size_um=400, seed=2, bin_um=(16,))
    for channel in range(3):
        one, two = (np.percentile(full_image(s)[channel][full_image(s)[1] < 225], [5, 50]) for s in (middle, other))
        np.testing.assert_allclose(one, two, atol=25)


def test_a_longer_panel_changes_no_marker(small):
    longer = datasets.sample(**SMALL, n_genes=60, bin_um=(8,)).tables["square_008um"]
    table = small.tables["square_008um"]
    assert longer.n_vars == 60
    markers = [name for name in table.var_names if not name.startswith("GENE")]
    assert (longer[:, markers].X != table[:, markers].X).nnz == 0
    # however many fillers: a fifth of the budget is theirs
    assert longer.X.sum() == pytest.approx(table[:, markers].X.sum() / 0.8, rel=0.05)


def test_totals_are_those_of_visium_hd(middle):
    total = np.asarray(middle.tables["square_008um"].X.sum(axis=1)).ravel()
    assert 30 < np.median(total) < 60


def test_counts_are_poisson_draws_around_the_truth(middle):
    table = middle.tables["square_016um"]
    means = datasets.sample_truth_bins(16, **MIDDLE)
    assert list(means.index) == list(table.obs_names)
    assert list(means.columns) == list(table.var_names)
    expected = means.sum().to_numpy()
    deviation = (np.asarray(table.X.sum(axis=0)).ravel() - expected) / np.sqrt(expected)
    assert np.abs(deviation).max() < 4.5
    # a Poisson variable's variance is its mean
    scatter = ((table.X.toarray() - means.to_numpy()) ** 2).sum() / means.to_numpy().sum()
    assert scatter == pytest.approx(1, abs=0.05)


def test_bins_catch_more_or_less_than_lies_in_them(middle):
    total = np.asarray(middle.tables["square_002um"].X.sum(axis=1)).ravel()
    lies_there = datasets.sample_truth_bins(2, **MIDDLE, library_size=False).sum(axis=1).to_numpy()
    # of a Poisson variable nothing would be left; of a log-normal factor its squared coefficient of variation
    excess = ((total - lies_there) ** 2 - total).sum() / (lies_there**2).sum()
    assert excess == pytest.approx(np.exp(LIBRARY_PLACE_SIGMA**2 + LIBRARY_FIELD_SIGMA**2) - 1, rel=0.35)
    assert total.sum() == pytest.approx(lies_there.sum(), rel=0.15)


def test_truth_map_and_truth_of_bins_agree(middle):
    table = middle.tables["square_016um"]
    means = datasets.sample_truth_bins(16, **MIDDLE, library_size=False).to_numpy()
    truth = datasets.sample_truth(**MIDDLE, pitch_um=1.0).to_numpy()
    centre = np.floor(table.obsm["spatial"] * 0.5).astype(int)
    summed = np.stack([truth[:, y - 8 : y + 8, x - 8 : x + 8].sum(axis=(1, 2)) for x, y in centre])
    # the map's windows are neither turned nor centred on the bins to better than half a pixel
    assert np.abs(summed.sum(axis=1) / means.sum(axis=1) - 1).mean() < 0.03
    np.testing.assert_allclose(summed.sum(axis=(0, 1)), means.sum(), rtol=0.005)
    assert np.corrcoef(summed.ravel(), means.ravel())[0, 1] > 0.999


def test_truth_sums_are_the_same_at_any_pitch():
    fine, native, odd = (datasets.sample_truth(**SMALL, pitch_um=pitch) for pitch in (1.0, 2.0, 7.0))
    assert native.dims == ("c", "y", "x")
    assert native.dtype == np.float32
    assert odd.shape[1:] == (29, 29)
    by_two = fine.to_numpy().reshape(len(fine), 100, 2, 100, 2).sum(axis=(2, 4))
    np.testing.assert_allclose(native, by_two, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(odd.sum(("x", "y")), fine.sum(("x", "y")), rtol=2e-3)


@pytest.mark.parametrize("size_um", [100, 116])
def test_smallest_slides_have_counts_all_over(size_um):
    means = datasets.sample_truth_bins(8, size_um=size_um, library_size=False).sum(axis=1)
    truth = datasets.sample_truth(size_um=size_um, pitch_um=8).sum("c").to_numpy()
    assert len(means) > 30
    assert means.mean() == pytest.approx(truth[truth > truth.max() / 4].mean(), rel=0.3)
    assert means.min() > 0


def test_truth_says_what_varies(middle):
    truth = datasets.sample_truth(**MIDDLE, pitch_um=8.0)
    varying = truth.attrs["spatially_varying"]
    flags = middle.tables["square_008um"].var["spatially_varying"]
    assert varying == list(flags.index[flags])
    assert 24 <= len(varying) < 40
    inside = datasets.sample_truth_bins(8, **MIDDLE)
    spread = inside.std() / inside.mean()
    assert spread[varying].min() > 3 * spread.drop(varying).max()


def test_truth_lies_on_the_drawn_nuclei(middle):
    truth = datasets.sample_truth(**MIDDLE, pitch_um=4.0)
    made_by_dense_nuclei = truth.sel(c=["ERBB2", "KRT8", "MS4A1", "CD79A", "PTPRC", "EPCAM"]).sum("c").to_numpy()
    dark = gaussian_filter(darkness(middle, 8), 1)

    def agreement(shift: tuple[int, int]) -> float:
        return float(np.corrcoef(np.roll(made_by_dense_nuclei, shift, (0, 1)).ravel(), dark.ravel())[0, 1])

    here = agreement((0, 0))
    assert here > 0.6
    for shift in ((2, 0), (-2, 0), (0, 2), (0, -2)):
        assert agreement(shift) < here


def test_context_decides_what_alike_nuclei_express(middle):
    means = datasets.sample_truth_bins(8, **MIDDLE)
    assert means[["CD68", "MS4A1"]].corr().iloc[0, 1] < 0.3
    assert means[["VEGFA", "MKI67"]].corr().iloc[0, 1] < 0.8


def test_glass_has_no_bins(middle):
    table = middle.tables["square_002um"]
    image = full_image(middle)
    # glass all around: the border is white, and tissue is not
    border = np.concatenate([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], axis=1)
    assert (border > 225).all()
    smooth = gaussian_filter(image[1].astype(np.float32), 12)
    col, row = np.floor(table.obsm["spatial"]).astype(int).T
    # holes in glands are white too, so single bins may lie on white
    assert (smooth[row, col] > 238).mean() < 0.02
    inside = np.zeros(image.shape[1:], dtype=bool)
    inside[row, col] = True
    assert inside.mean() * 16 < 0.9


def test_roundtrip_through_a_store(small, tmp_path):
    small.write(tmp_path / "sample.zarr")
    back = sd.read_zarr(tmp_path / "sample.zarr")
    np.testing.assert_array_equal(full_image(back), full_image(small))
    assert (back.tables["square_002um"].X != small.tables["square_002um"].X).nnz == 0
    assert set(back.coordinate_systems) == set(small.coordinate_systems)
    assert back.tables["square_008um"].var["spatially_varying"].dtype == bool


def test_other_names_bins_and_resolution():
    sdata = datasets.sample(size_um=150, mpp=0.4, bin_um=[8], n_genes=5, dataset_id="other", seed=3)
    assert set(sdata.shapes) == {"other_square_008um"}
    assert sdata.tables["square_008um"].n_vars == 5
    np.testing.assert_allclose(sdata.shapes["other_square_008um"].area, 400)


@pytest.mark.parametrize(
    ("verb", "wrong"),
    [
        (datasets.sample, {"size_um": 1e5}),
        (datasets.sample_truth, {"size_um": 1e5}),
        (datasets.sample_truth, {"pitch_um": 1e-4}),
        (datasets.sample_truth, {"pitch_um": 1e4}),
        (datasets.sample_truth_bins, {"size_um": 1e5}),
        (datasets.sample_truth_bins, {"n_genes": 10**6, "bin_um": 2}),
    ],
)
def test_what_memory_does_not_hold_is_refused_at_once(verb, wrong, monkeypatch):
    monkeypatch.setattr("pixnet_sd.store._disk.available_memory", lambda: 2**36)
    with pytest.raises(DataError, match=next(iter(wrong))):
        verb(**wrong)
