"""Files of an image, labels or counts that are away are an error; files that were never written are black."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
import zarr
from scipy import sparse
from spatialdata.models import Image2DModel, Labels2DModel

from pixnet_sd.errors import StoreError
from pixnet_sd.slide import open_slide, tissue_mask
from pixnet_sd.slide.elements import LazyLabels
from pixnet_sd.slide.image import GuardedArray, ImagePyramid
from pixnet_sd.slide.tables import Counts

SIDE, CHUNK = 256, 64


def drawn() -> np.ndarray:
    """Pink noise, with a quarter that was not scanned."""
    pixels = np.random.default_rng(0).integers(90, 220, (3, SIDE, SIDE), dtype=np.uint8)
    pixels[:, : SIDE // 2, : SIDE // 2] = 0
    return pixels


@pytest.fixture
def store(tmp_path) -> Path:
    image = Image2DModel.parse(drawn(), dims=("c", "y", "x"), scale_factors=[2], chunks=(3, CHUNK, CHUNK))
    labels = np.repeat(np.repeat(np.arange(16, dtype=np.int32).reshape(4, 4), CHUNK, 0), CHUNK, 1)
    labels = Labels2DModel.parse(da.from_array(labels, chunks=CHUNK), dims=("y", "x"))
    sd.SpatialData(images={"he": image}, labels={"cells": labels}).write(tmp_path / "slide.zarr")
    return tmp_path / "slide.zarr"


def level(store: Path, k: int = 0):
    return ImagePyramid.of(sd.read_zarr(store).images["he"], "he").levels[k]


def test_black_padding_is_read(store):
    assert not (store / "images/he/s0/c/0/0/0").exists()  # zarr leaves it out
    np.testing.assert_array_equal(level(store).read(0, SIDE, 0, SIDE), np.moveaxis(drawn(), 0, -1))
    copy = pickle.loads(pickle.dumps(level(store)))
    np.testing.assert_array_equal(copy.read(10, 200, 0, 90), np.moveaxis(drawn(), 0, -1)[10:200, :90])


MISHAPS = {
    "store moved": lambda store: store.rename(store.with_name("moved.zarr")),
    "image moved": lambda store: (store / "images/he").rename(store / "he"),
    "level deleted": lambda store: shutil.rmtree(store / "images/he/s0"),
    "another image": lambda store: (
        shutil.copytree(store / "images/he", store / "copy"),
        shutil.rmtree(store / "images/he"),
        (store / "copy").rename(store / "images/he"),
    ),
    "chunks deleted": lambda store: shutil.rmtree(store / "images/he/s0/c"),
    "one chunk deleted": lambda store: (store / "images/he/s0/c/0/3/3").unlink(),
    "an empty disk is mounted": lambda store: (shutil.rmtree(store), store.mkdir()),
}


@pytest.mark.parametrize("mishap", MISHAPS.values(), ids=MISHAPS)
@pytest.mark.parametrize("lazy", ["stored", "cropped", "computed"])
def test_files_that_went_away(store, mishap, lazy):
    image = sd.read_zarr(store).images["he"]["scale0"]["image"]
    if lazy == "cropped":
        image = image.isel(y=slice(5, None))
    elif lazy == "computed":
        image = image.copy(data=255 - image.data)
    opened = pickle.loads(pickle.dumps(ImagePyramid.of(image, "he").levels[0]))
    assert opened.read(100, 200, 100, 200).any()
    mishap(store)
    with pytest.raises(StoreError, match=r"slide\.zarr"):
        opened.read(150, 240, 150, 240)


def test_files_that_are_away_when_the_image_is_opened(store):
    sdata = sd.read_zarr(store)
    store.rename(store.with_name("moved.zarr"))
    with pytest.raises(StoreError, match=r"slide\.zarr"):
        tissue_mask(open_slide(sdata, image_key="he", mpp=0.5))


def test_files_that_are_away_only_while_they_are_read(store, monkeypatch):
    """A disk that comes and goes: what was read as black is read again."""
    opened, real, away = level(store), zarr.Array.__getitem__, [True]

    def flickering(self, key):
        values = real(self, key)
        return np.zeros_like(values) if away.pop() else values

    away[:] = [False, True]
    monkeypatch.setattr(zarr.Array, "__getitem__", flickering)
    np.testing.assert_array_equal(opened.read(128, 256, 0, 256), np.moveaxis(drawn(), 0, -1)[128:])
    assert not away


@pytest.mark.parametrize("which", ["s0/c/0/2/2", "s0/c/0/0/3", "s1/c/0/1/1"])
def test_a_copy_in_part(store, which):
    """Another level shows that pixels of a missing chunk are not black."""
    (store / "images/he" / which).unlink()
    with pytest.raises(StoreError, match="he"):
        level(store)


def test_no_file_at_all(store):
    shutil.rmtree(store / "images/he/s0/c")
    shutil.rmtree(store / "images/he/s1/c")
    with pytest.raises(StoreError, match="he"):
        level(store)


@pytest.mark.parametrize(
    "layout",
    [
        {"shards": (3, 128, 128)},
        {"chunk_key_encoding": {"name": "default", "separator": "."}},
        {"chunk_key_encoding": {"name": "v2", "separator": "."}},
        {"chunk_key_encoding": {"name": "v2", "separator": "/"}},
        {"zarr_format": 2},
        {"fill_value": 255},
    ],
    ids=["shards", "dots", "as v2", "as v2, nested", "v2", "white"],
)
def test_layouts(tmp_path, layout):
    pixels = drawn()
    pixels[:, -60:, -60:] = 255
    array = zarr.create_array(tmp_path / "a", shape=pixels.shape, chunks=(3, 32, 32), dtype="u1", **layout)
    array[:] = pixels
    image = Image2DModel.parse(da.from_zarr(str(tmp_path / "a")), dims=("c", "y", "x"))
    opened = ImagePyramid.of(image, "he").levels[0]
    assert opened.is_backed
    np.testing.assert_array_equal(opened.read(0, SIDE, 0, SIDE), np.moveaxis(pixels, 0, -1))
    (largest,) = sorted((p for p in (tmp_path / "a").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)[-1:]
    largest.unlink()
    with pytest.raises(StoreError):
        opened.read(0, SIDE, 0, SIDE)


@pytest.mark.parametrize("computed", [False, True])
def test_labels(store, computed):
    data = sd.read_zarr(store).labels["cells"].data
    labels = LazyLabels(data + 0 if computed else data)
    assert (labels[200:210, 200:] == 15).all()
    assert (labels[:9] == np.repeat(np.arange(4), CHUNK)).all()  # the background has no file
    shutil.rmtree(store / "labels/cells/s0/c/3")
    with pytest.raises(StoreError, match="cells"):
        labels[200:210, 200:]


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("lost", ["file", "folder"])
def test_counts(tmp_path, kind, lost):
    from anndata.io import sparse_dataset, write_elem

    matrix = sparse.random(400, 30, 0.3, format="csr", random_state=0, dtype=np.float32)
    group = zarr.open_group(tmp_path / "t.zarr", mode="w")
    write_elem(group, "X", matrix if kind == "sparse" else matrix.toarray())
    x = group["X"]
    counts = Counts.of(sparse_dataset(x) if kind == "sparse" else x, np.arange(400), "t")
    assert sum(block.sum() for _, block in counts.blocks()) == pytest.approx(matrix.sum(), rel=1e-5)
    folder = tmp_path / "t.zarr" / "X"
    if lost == "folder":
        folder.rename(tmp_path / "away")
    else:
        next(path for path in (folder / ("data/c" if kind == "sparse" else "c")).rglob("*") if path.is_file()).unlink()
    with pytest.raises(StoreError):
        list(counts.blocks())


def test_rows_of_a_remote_array_are_read_as_they_are():
    array = zarr.create_array(zarr.storage.MemoryStore(), shape=(5, 2), dtype="i4")
    array[:] = np.arange(10).reshape(5, 2)
    assert GuardedArray(array)[1:3].tolist() == [[2, 3], [4, 5]]
