"""Levels, files and pixels: files away are an error, never written is black, and other than 8 bits are converted."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
import zarr
from anndata.io import sparse_dataset, write_elem
from dask import delayed
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale, get_transformation

from pixnet_sd.errors import DataError, StoreError
from pixnet_sd.slide.image import GuardedArray, ImageLevel, ImagePyramid, loaded_px, stored_array
from pixnet_sd.slide.tables import Counts

SIDE, CHUNK = 256, 64
RGB = ["r", "g", "b"]
PIXELS = np.random.default_rng(0).integers(90, 220, (3, SIDE, SIDE), dtype=np.uint8)
PIXELS[:, : SIDE // 2, : SIDE // 2] = 0  # a quarter that was not scanned
DRAWN = np.moveaxis(PIXELS, 0, -1)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arrays") / "slide.zarr"
    image = Image2DModel.parse(PIXELS, c_coords=RGB, scale_factors=[2], chunks=(3, CHUNK, CHUNK))
    sd.SpatialData(images={"he": image}).write(path)
    return path


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "slide.zarr"))


def finest(image) -> ImageLevel:
    return ImagePyramid.of(image, "he").levels[0]


MISHAPS = {
    "store moved": lambda store: store.rename(store.with_name("moved.zarr")),
    "another image": lambda store: shutil.copytree((store / "images/he").rename(store / "was"), store / "images/he"),
    "one chunk deleted": lambda store: (store / "images/he/s0/c/0/3/3").unlink(),
    "an empty disk is mounted": lambda store: (shutil.rmtree(store), store.mkdir()),
}


@pytest.mark.parametrize("mishap", MISHAPS.values(), ids=MISHAPS)
@pytest.mark.parametrize("lazy", ["stored", "computed"])
def test_files_that_were_never_there_or_went_away(store: Path, mishap, lazy: str) -> None:
    assert not (store / "images/he/s0/c/0/0/0").exists()  # zarr leaves out what is black
    image, expected = sd.read_zarr(store)["he"]["scale0"]["image"], DRAWN
    if lazy == "computed":
        image, expected = image.isel(y=slice(5, None)).copy(data=255 - image.data[:, 5:]), 255 - DRAWN[5:]
    opened = pickle.loads(pickle.dumps(finest(image)))
    assert opened.pixels.is_stored == (lazy == "stored")
    np.testing.assert_array_equal(opened.read(10, 200, 0, 90), expected[10:200, :90])
    mishap(store)
    with pytest.raises(StoreError, match=r"slide\.zarr"):
        opened.read(150, 240, 150, 240)


def test_files_that_are_away_only_while_they_are_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that comes and goes: what was read as black is read again."""
    opened, real, away = finest(sd.read_zarr(store)["he"]), zarr.Array.__getitem__, [False, True]

    def flickering(self, key):
        values = real(self, key)
        return np.zeros_like(values) if away.pop() else values

    monkeypatch.setattr(zarr.Array, "__getitem__", flickering)
    np.testing.assert_array_equal(opened.read(128, 256, 0, 256), DRAWN[128:])
    assert not away


@pytest.mark.parametrize("lost", [["s0/c/0/2/2"], ["s1/c/0/1/1"], ["s0/c", "s1/c"]], ids=str)
def test_a_copy_in_part(store: Path, lost: list[str]) -> None:
    """Another level shows that pixels of a missing chunk are not black."""
    for path in (store / "images/he" / name for name in lost):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    image = sd.read_zarr(store)["he"]
    with pytest.raises(StoreError, match="'he'"):
        finest(image)
    store.rename(store.with_name("moved.zarr"))  # before the image is opened
    with pytest.raises(StoreError, match=r"slide\.zarr"):
        finest(image)


AS_V2 = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}


@pytest.mark.parametrize("layout", [{"shards": (3, 128, 128)}, AS_V2, {"zarr_format": 2}, {"fill_value": 255}], ids=str)
def test_layouts(tmp_path: Path, layout: dict) -> None:
    pixels = PIXELS.copy()
    pixels[:, -60:, -60:] = 255
    zarr.create_array(tmp_path / "a", data=pixels, chunks=(3, 32, 32), **layout)
    opened = finest(Image2DModel.parse(da.from_zarr(str(tmp_path / "a")), c_coords=RGB))
    assert opened.pixels.is_stored
    np.testing.assert_array_equal(opened.read(0, SIDE, 0, SIDE), pixels.transpose(1, 2, 0))
    max((path for path in (tmp_path / "a").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size).unlink()
    with pytest.raises(StoreError):
        opened.read(0, SIDE, 0, SIDE)


@pytest.mark.parametrize(("make", "lost"), [(sparse.csr_matrix, "X/data/c"), (np.asarray, "X/c"), (np.asarray, "X")])
def test_counts(tmp_path: Path, make, lost: str) -> None:
    dense = sparse.random(400, 30, 0.3, random_state=0, dtype=np.float32).toarray()
    write_elem(zarr.open_group(tmp_path / "t.zarr", mode="w"), "X", make(dense))
    x = zarr.open_group(tmp_path / "t.zarr", mode="r")["X"]
    counts = Counts.of(x if isinstance(x, zarr.Array) else sparse_dataset(x), np.arange(400), "t")
    assert sum(block.sum() for _, block in counts.blocks()) == pytest.approx(dense.sum(), rel=1e-5)
    (tmp_path / "t.zarr" / lost).rename(tmp_path / "away")
    with pytest.raises(StoreError):
        list(counts.blocks())


def test_an_array_that_is_not_in_a_folder_is_read_as_it_is() -> None:
    array = zarr.create_array({}, data=np.arange(10).reshape(5, 2))
    assert GuardedArray(array)[1:3].tolist() == [[2, 3], [4, 5]]
    assert GuardedArray(array[:])[3:9, :1].tolist() == [[6], [8]]
    assert GuardedArray(array)[4:2].shape == (0, 2)


@pytest.mark.parametrize("change", [lambda x: 255 - x, lambda x: x[:, 7:], lambda x: x[::-1], lambda x: x[:, :, ::-1]])
def test_a_lazy_change_of_a_stored_element_is_honoured(store: Path, change) -> None:
    data = sd.read_zarr(store)["he"]["scale0"]["image"].data
    assert stored_array(data) is not None
    assert stored_array(change(data)) is None
    pixels = finest(Image2DModel.parse(change(data), c_coords=RGB)).read(120, 140, 120, 140)
    np.testing.assert_array_equal(pixels, change(PIXELS)[:, 120:140, 120:140].transpose(1, 2, 0))


def test_largest_block(store: Path) -> None:
    """Small chunks may be cut from a big block further down."""
    block = da.from_delayed(delayed(np.ones)((3, 600, 700), np.uint8), (3, 600, 700), np.uint8)
    lazy = [Image2DModel.parse(data, c_coords=RGB).data for data in (block.rechunk((3, 100, 100)), da.asarray(PIXELS))]
    stored = finest(sd.read_zarr(store)["he"]).pixels.data
    assert [loaded_px(data) for data in (*lazy, stored)] == [600 * 700, 0, CHUNK**2]


def test_levels_lie_where_their_pixels_were_averaged() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 301, 407), dtype=np.uint8)
    image = Image2DModel.parse(pixels, c_coords=RGB, scale_factors=[2, 2])
    pyramid = ImagePyramid.of(image, "multi")
    assert [level.shape for level in pyramid.levels] == [(301, 407), (150, 203), (75, 101)]
    assert [level.scale for level in pyramid.levels] == [(1, 1), (2, 2), (4, 4)]
    assert pyramid.levels[2].origin == (1, 3)  # what is left over from blocks of 4 is dropped from the start
    level = pyramid.levels[1]
    assert level.read(-5, 4, 200, 500).shape == (4, 3, 3)  # clipped
    assert level.read(150, 160, 0, 5).shape == (0, 5, 3)
    scales = {0.5: 1, 1.0: 1, 1.99: 1, 2.01: 2, 3.9: 2, 4.04: 4, 50.0: 4}  # the coarsest that is fine enough
    assert {scale: pyramid.level_for(scale).scale[0] for scale in scales} == scales
    # levels that are no whole reduction take the ratio of the shapes
    image["scale1"] = Image2DModel.parse(pixels[:, :120, :160], c_coords=RGB).to_dataset(name="image")
    level = ImagePyramid.of(image, "he").levels[1]
    assert (level.scale, level.origin) == ((301 / 120, 407 / 160), (0, 0))


def he() -> np.ndarray:
    """A bright image with a dark middle, 0 to 1."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    tissue = np.exp(-((x**2 + y**2) / 0.05))
    pixels = 0.96 - tissue[None] * np.array([0.45, 0.75, 0.35])[:, None, None]
    return pixels + np.random.default_rng(0).normal(0, 0.01, pixels.shape)


def with_values(pixels: np.ndarray, *values: float) -> np.ndarray:
    pixels = pixels.copy()
    for k, value in enumerate(values):
        pixels[:, 3 + k, 5 : 5 + 4 * (k + 1)] = value
    return pixels


KINDS: dict[str, np.ndarray] = {
    "uint16": (he() * 65535).clip(0, 65535).astype(np.uint16),
    "12 of 16 bits, hot pixels": with_values((he() * 4095).clip(0, 4095), 65535.0).astype(np.uint16),
    "8 of 16 bits": (he() * 255).clip(0, 255).astype(np.uint16),
    "int16, offset": (he() * 60000 - 30000).astype(np.int16),
    "int32": (he() * 1e6).astype(np.int32),
    "float": he().astype(np.float32),
    "float, infinite and missing": with_values(he(), np.inf, -np.inf, np.nan).astype(np.float32),
    "float from -1": (he() * 2 - 1).astype(np.float32),
    "float, hot pixels": with_values(he(), 1e6).astype(np.float32),
    "float16 to 65504": (he() * 65000).astype(np.float16),
}


def converted(pixels: np.ndarray, scale_factors: list[int] | None = None) -> SpatialData:
    """An object with the image, and with that which the proposed lines make of it."""
    options = {"scale_factors": scale_factors, "transformations": {"um": Scale([0.5, 0.5], axes=("x", "y"))}}
    sdata = SpatialData(images={"he": Image2DModel.parse(pixels, c_coords=RGB, **options)})
    with pytest.raises(DataError, match=f"'he' has {pixels.dtype} pixels.*'he_uint8'") as caught:
        ImagePyramid.of(sdata["he"], "he")
    exec(str(caught.value).partition(":\n")[2], {"sdata": sdata})
    assert get_transformation(sdata["he_uint8"], get_all=True).keys() == {"um"}
    return sdata


@pytest.mark.parametrize(("kind", "scale_factors"), [(kind, ([2, 2], None)[k % 2]) for k, kind in enumerate(KINDS)])
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:image 'he' is dark")
def test_proposed_lines_give_a_picture(kind: str, scale_factors: list[int] | None) -> None:
    """Neither black nor clipped, and the same picture."""
    sdata = converted(KINDS[kind], scale_factors)
    whole = ImagePyramid.of(sdata["he_uint8"], "he_uint8").levels[0].read(0, SIDE, 0, SIDE).transpose(2, 0, 1)
    pixels, expected = whole[:, 12:].astype(float), he()[:, 12:]
    assert np.corrcoef(pixels.ravel(), expected.ravel())[0, 1] > 0.999
    assert np.percentile(pixels, 95) > 200
    assert pixels.std() > 0.1 * 255
    assert max((pixels == end).mean() for end in (0, 255)) < 0.01
    if kind == "8 of 16 bits":
        np.testing.assert_array_equal(whole, KINDS[kind])
    elif kind == "float, infinite and missing":
        assert list(whole[0, 3:6, 5]) == [255, 0, 255]


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_nothing_to_go_by(value: float) -> None:
    assert converted(np.full((3, 64, 64), value))["he_uint8"]["scale0"].image.dtype == np.uint8
