"""What a run trains on, of slides too large for memory: the same as of those that are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd

import pixnet_sd as ps
from pixnet_sd.slide.elements import open_store
from pixnet_sd.slide.tables import StoredTargets, targets_of

TABLES = ["square_002um", "square_008um", "square_016um"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no counts at all", "ignore:The model is worse than none", "ignore:zarr v3 autosharding"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bins") / "slide.zarr"
    ps.datasets.sample(size_um=120, mpp=1.0, bin_um=(2, 8, 16)).write(path)
    return path


@pytest.fixture
def on_disk(monkeypatch) -> None:
    """No memory for targets."""
    monkeypatch.setitem(targets_of.__kwdefaults__, "memory_bytes", 0)


def light(store: Path) -> sd.SpatialData:
    return sd.read_zarr(store, selection=("images",))


def test_same_data_either_way(store, run_of, request) -> None:
    dense = run_of(sd.read_zarr(store))
    request.getfixturevalue("on_disk")
    stored = run_of(light(store))
    for part in ("training", "held_out"):
        (one,), (other,) = getattr(dense, part), getattr(stored, part)
        assert [m.size_name for m in one.measured] == [m.size_name for m in other.measured] == TABLES
        for a, b in zip(one.measured, other.measured, strict=True):
            assert isinstance(b.values, StoredTargets)
            np.testing.assert_array_equal(b.values[np.arange(len(a.regions))], a.values)
            np.testing.assert_array_equal(b.regions.centre_xy, a.regions.centre_xy)


@pytest.mark.usefixtures("on_disk")
def test_the_fingerprint_says_what_is_trained_on_not_how_it_was_opened(store, run_of) -> None:
    changed = sd.read_zarr(store)
    changed.tables["square_002um"].X.data[7] += 1
    same = {run_of(s).fingerprint for s in (light(store), open_store(store))}
    others = {run_of(light(store), seed=1).fingerprint, run_of(changed, "changed").fingerprint}
    assert (len(same), len(others | same)) == (1, 3)


@pytest.mark.usefixtures("on_disk")
def test_fit_on_what_is_not_in_memory(store, fit, tmp_path) -> None:
    """The cache lies beside the checkpoint, and a second run with other settings writes no counts."""
    model = fit(light(store), checkpoint_dir=tmp_path / "model", max_epochs=1)
    described = model.record.slides["slide"]
    assert list(described["training_regions"]) == list(described["held_out_regions"]) == TABLES
    assert described["tables"]["square_002um"] == "sample_square_002um"
    cached = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pixnet_sd_cache").iterdir()}
    assert len(cached) == 3
    assert fit(light(store), checkpoint_dir=tmp_path / "other", max_epochs=1, lr=1e-3).genes == model.genes
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pixnet_sd_cache").iterdir()} == cached
