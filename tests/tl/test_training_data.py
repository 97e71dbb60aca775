"""Training data of slides too large for memory: the same as of those that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd

import pixnet_sd as ps
from pixnet_sd._fingerprint import fingerprint
from pixnet_sd.slide.elements import open_store
from pixnet_sd.slide.tables import StoredTargets, _targets
from pixnet_sd.tl import open_sources
from pixnet_sd.tl._training_data import TrainingData, data_parts, describe, training_data

OPEN: dict[str, Any] = {
    "image_key": None,
    "table_key": None,
    "coordinate_system": None,
    "mpp": None,
    "allow_any_mpp": False,
    "working_mpp": 1.0,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bins") / "slide.zarr"
    ps.datasets.sample(size_um=150, mpp=1.0, bin_um=(2, 8, 16)).write(path)
    return path


@pytest.fixture
def on_disk(monkeypatch) -> None:
    monkeypatch.setattr(_targets, "_DENSE_BYTES", 0)


def data_of(sdata: sd.SpatialData, cache: Path, **arguments: Any) -> TrainingData:
    choices: dict[str, Any] = {"genes": None, "n_genes": 6, "target_sum": 1e4, "objective": "mse_pcc"}
    choices |= {"validation": 0.25, "seed": 0}
    return training_data(open_sources({"slide": sdata}, **OPEN), cache=cache, **(choices | arguments))


def light(store: Path) -> sd.SpatialData:
    return sd.read_zarr(store, selection=("images",))


@pytest.mark.filterwarnings("ignore:.*no counts at all")
def test_same_data_either_way(store, tmp_path, monkeypatch) -> None:
    dense = data_of(sd.read_zarr(store), tmp_path)
    monkeypatch.setattr(_targets, "_DENSE_BYTES", 0)
    stored = data_of(light(store), tmp_path)
    assert list(dense.genes) == list(stored.genes)
    for part in ("training", "held_out"):
        (one,), (other,) = getattr(dense, part), getattr(stored, part)
        assert [m.size_name for m in one.measured] == [m.size_name for m in other.measured]
        for a, b in zip(one.measured, other.measured, strict=True):
            assert isinstance(b.values, StoredTargets)
            np.testing.assert_array_equal(b.values[np.arange(len(a.regions))], a.values)
            np.testing.assert_array_equal(b.regions.centre_xy, a.regions.centre_xy)


@pytest.mark.filterwarnings("ignore:.*no counts at all")
def data_hash(data: TrainingData) -> str:
    return fingerprint(data_parts(data))


@pytest.mark.usefixtures("on_disk")
def test_hash_says_what_is_trained_on_not_how_it_was_opened(store, tmp_path) -> None:
    same = {data_hash(data_of(s, tmp_path / "a")) for s in (light(store), sd.read_zarr(store), open_store(store))}
    assert len(same) == 1
    others = [{"genes": 5}, {"target_sum": 1e3}, {"seed": 1}, {"validation": None}]
    hashes = {data_hash(data_of(light(store), tmp_path / "b", **other)) for other in others}
    changed = sd.read_zarr(store)
    changed.tables["square_002um"].X[5, 30] += 1
    hashes.add(data_hash(data_of(changed, tmp_path / "c")))
    assert len(hashes | same) == 6


@pytest.mark.filterwarnings("ignore:.*no counts at all")
def test_hash_of_data_in_memory(store, tmp_path) -> None:
    same = {data_hash(data_of(s, tmp_path)) for s in (light(store), sd.read_zarr(store))}
    assert len(same) == 1
    changed = sd.read_zarr(store)
    changed.tables["square_016um"].X[5, 30] += 1
    assert data_hash(data_of(changed, tmp_path)) not in same


@pytest.mark.filterwarnings("ignore:.*no counts at all")
@pytest.mark.usefixtures("on_disk")
def test_fit_on_what_is_not_in_memory(store, fit, tmp_path, monkeypatch, caplog) -> None:
    """The cache lies beside the checkpoint, and a second run with other settings reads no counts."""
    model = fit(light(store), checkpoint_dir=tmp_path / "model", max_epochs=1)
    assert set(model.record.slides["slide"]["training_regions"]) == {"square_002um", "square_008um", "square_016um"}
    assert len(list((tmp_path / "pixnet_sd_cache").iterdir())) == 3
    monkeypatch.setattr("pixnet_sd.slide.tables._cache.write_counts", None)
    monkeypatch.setattr("pixnet_sd.slide.tables._cache.write_counts", None)
    caplog.set_level("INFO", "pixnet_sd")
    other = fit(light(store), checkpoint_dir=tmp_path / "other", max_epochs=1, lr=1e-3)
    assert other.genes == model.genes
    assert caplog.text.count("counts taken from the cache") == 3


@pytest.mark.filterwarnings("ignore:.*no counts at all")
def test_description(store, tmp_path) -> None:
    sources = open_sources({"slide": light(store)}, **OPEN)
    data = data_of(light(store), tmp_path)
    found = describe(sources, data)["slide"]
    assert found["tables"]["square_002um"] == "sample_square_002um"
    assert set(found["training_regions"]) == set(found["held_out_regions"]) == set(found["tables"])
