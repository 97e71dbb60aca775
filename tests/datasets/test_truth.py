from __future__ import annotations

import numpy as np
import pytest

from pixnet_sd import datasets
from pixnet_sd.errors import DataError

SMALL = {"size_um": 150.0, "mpp": 1.0, "n_genes": 36, "seed": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("truth") / "out"
    return datasets.write_visium_hd(path, **SMALL, bin_um=(16,), cells=False)


@pytest.mark.parametrize("pitch_um", [1.0, 2.0, 7.0])
def test_truth_on_disk_is_that_of_the_sample(folder, pitch_um):
    ours, theirs = (
        datasets.visium_hd_truth(folder, pitch_um=pitch_um),
        datasets.sample_truth(**SMALL, pitch_um=pitch_um),
    )
    assert ours.dtype == np.float32
    assert ours.attrs == theirs.attrs
    assert list(ours["c"].values) == list(theirs["c"].values)
    np.testing.assert_allclose(ours["x"], theirs["x"])
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-9)


def test_a_window_is_part_of_the_whole(folder):
    whole = datasets.visium_hd_truth(folder, pitch_um=4.0)
    part = datasets.visium_hd_truth(folder, genes=["VIM", "ACTB"], pitch_um=4.0, window_um=(20, 33, 60, 150))
    assert part.dims == ("c", "y", "x")
    assert list(part["c"].values) == ["VIM", "ACTB"]
    assert part.attrs["spatially_varying"] == ["VIM"]
    expected = whole.sel(c=["VIM", "ACTB"])[:, 8:38, 5:15]
    np.testing.assert_allclose(part["y"], expected["y"])
    np.testing.assert_allclose(part["x"], expected["x"])
    np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"genes": ["VIM", "NOPE"]}, "NOPE"),
        ({"window_um": (200, 0, 300, 50)}, "does not meet the slide"),
        ({"pitch_um": 1e6}, "pitch_um"),
        ({"pitch_um": 1e-4}, "pitch_um"),
    ],
)
def test_what_is_not_there_is_refused(folder, wrong, found):
    with pytest.raises(DataError, match=found):
        datasets.visium_hd_truth(folder, **wrong)


def test_a_folder_without_truth_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"No truth.zarr"):
        datasets.visium_hd_truth(tmp_path)
