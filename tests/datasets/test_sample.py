from __future__ import annotations

import numpy as np
import pytest
import spatialdata as sd
from scipy.ndimage import gaussian_filter

from pixnet_sd import datasets
from pixnet_sd.errors import DataError

MIDDLE = {"size_um": 560.0, "seed": 1}  # two blocks of bins along each side
SMALLEST = {"size_um": 100.0}


@pytest.fixture(scope="module")
def middle():
    return datasets.sample(**MIDDLE)


def full_image(sdata: sd.SpatialData) -> np.ndarray:
    return sdata.images["sample_full_image"]["scale0"].image.to_numpy()


@pytest.mark.parametrize("bin_um", [8, 16])
def test_large_bins_are_sums_of_whole_sets_of_small_ones(middle, bin_um):
    base, table = middle.tables["square_002um"], middle.tables[f"square_{bin_um:03d}um"]
    step = bin_um // 2
    groups = base.to_df().groupby((base.obs["array_row"] // step * 1000 + base.obs["array_col"] // step).to_numpy())
    key = table.obs["array_row"] * 1000 + table.obs["array_col"]
    np.testing.assert_array_equal(groups.sum().loc[key], table.to_df())
    sizes = groups.size()
    assert set(sizes.index[sizes == step**2]) == set(key)


def test_another_seed_draws_other_tissue_with_the_same_genes_and_stains(middle):
    other = datasets.sample(size_um=560, seed=2, bin_um=(16,))
    assert (full_image(other) != full_image(middle)).mean() > 0.3
    assert other.tables["square_016um"].var.equals(middle.tables["square_016um"].var)
    for channel in range(3):
        one, two = (np.percentile(full_image(s)[channel][full_image(s)[1] < 225], [5, 50]) for s in (middle, other))
        np.testing.assert_allclose(one, two, atol=25)


def test_counts_are_poisson_draws_around_the_truth(middle):
    table = middle.tables["square_016um"]
    means = datasets.sample_truth_bins(16, **MIDDLE)
    assert list(means.index) == list(table.obs_names)
    assert list(means.columns) == list(table.var_names)
    assert 30 < np.median(np.asarray(middle.tables["square_008um"].X.sum(axis=1))) < 60  # as of Visium HD
    expected = means.sum().to_numpy()
    deviation = (np.asarray(table.X.sum(axis=0)).ravel() - expected) / np.sqrt(expected)
    assert np.abs(deviation).max() < 4.5
    # a Poisson variable's variance is its mean; counts in another order, of one block or of all, would scatter more
    table, means = middle.tables["square_002um"], datasets.sample_truth_bins(2, **MIDDLE).to_numpy()
    at_the_end = (table.obs[["array_row", "array_col"]].max(axis=1) >= 256).to_numpy()
    scatter = (table.X.toarray() - means) ** 2
    for block in (at_the_end, ~at_the_end):
        assert scatter[block].sum() / means[block].sum() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("bin_um", "slide"), [(16, MIDDLE), (8, SMALLEST)])
def test_truth_map_and_truth_of_bins_agree(middle, bin_um, slide):
    sdata = middle if slide is MIDDLE else datasets.sample(**slide)
    means = datasets.sample_truth_bins(bin_um, **slide, library_size=False).to_numpy()
    assert len(means) > 30
    assert means.sum(axis=1).min() > 0
    truth = datasets.sample_truth(**slide, pitch_um=bin_um / 16).to_numpy()
    centre = np.floor(sdata.tables[f"square_{bin_um:03d}um"].obsm["spatial"] * 8 / bin_um).astype(int)
    summed = np.stack([truth[:, y - 8 : y + 8, x - 8 : x + 8].sum(axis=(1, 2)) for x, y in centre])
    # the map's windows are neither turned nor centred on the bins to better than half a pixel
    assert np.abs(summed.sum(axis=1) / means.sum(axis=1) - 1).mean() < 0.03
    np.testing.assert_allclose(summed.sum(axis=(0, 1)), means.sum(), rtol=0.005)
    assert np.corrcoef(summed.ravel(), means.ravel())[0, 1] > 0.999


def test_truth_says_what_varies_and_context_decides_what_alike_nuclei_express(middle):
    varying = datasets.sample_truth(**MIDDLE, pitch_um=8.0).attrs["spatially_varying"]
    flags = middle.tables["square_008um"].var["spatially_varying"]
    assert varying == list(flags.index[flags])
    assert 24 <= len(varying) < 40
    means = datasets.sample_truth_bins(8, **MIDDLE)
    spread = means.std() / means.mean()
    assert spread[varying].min() > 3 * spread.drop(varying).max()
    assert means[["CD68", "MS4A1"]].corr().iloc[0, 1] < 0.3
    assert means[["VEGFA", "MKI67"]].corr().iloc[0, 1] < 0.8


def test_truth_lies_on_the_drawn_nuclei(middle):
    truth = datasets.sample_truth(**MIDDLE, pitch_um=4.0)
    made_by_dense_nuclei = truth.sel(c=["ERBB2", "KRT8", "MS4A1", "CD79A", "PTPRC", "EPCAM"]).sum("c").to_numpy()
    # nuclei keep red light, which eosin lets through
    haematoxylin = -np.log((full_image(middle)[0] + 1.0) / 256).reshape(140, 8, 140, 8).mean(axis=(1, 3))
    dark = gaussian_filter(haematoxylin, 1).ravel()

    def agreement(shift: tuple[int, int]) -> float:
        return float(np.corrcoef(np.roll(made_by_dense_nuclei, shift, (0, 1)).ravel(), dark)[0, 1])

    assert agreement((0, 0)) > 0.6
    assert all(agreement(shift) < agreement((0, 0)) for shift in ((2, 0), (-2, 0), (0, 2), (0, -2)))


def test_glass_has_no_bins(middle):
    image = full_image(middle)
    # glass all around: the border is white, and tissue is not
    border = np.concatenate([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], axis=1)
    assert (border > 225).all()
    smooth = gaussian_filter(image[1].astype(np.float32), 12)
    col, row = np.floor(middle.tables["square_002um"].obsm["spatial"]).astype(int).T
    # holes in glands are white too, so single bins may lie on white
    assert (smooth[row, col] > 238).mean() < 0.02
    assert len(row) * 16 < 0.9 * image[0].size


@pytest.mark.parametrize(
    ("verb", "wrong"),
    [
        *((verb, {"size_um": 1e5}) for verb in (datasets.sample, datasets.sample_truth, datasets.sample_truth_bins)),
        (datasets.sample_truth, {"pitch_um": 1e-4}),
        (datasets.sample_truth, {"pitch_um": 1e4}),
        (datasets.sample_truth_bins, {"n_genes": 10**6, "bin_um": 2}),
    ],
)
def test_what_memory_does_not_hold_is_refused_at_once(verb, wrong, monkeypatch):
    monkeypatch.setattr("pixnet_sd.store.available_memory", lambda: 2**36)
    with pytest.raises(DataError, match=next(iter(wrong))):
        verb(**wrong)
