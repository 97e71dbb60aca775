"""Gene maps: how they are laid out, written block by block, and read."""

from __future__ import annotations

import json
import random
import warnings
from math import prod

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from spatialdata.models import Image2DModel
from spatialdata.transformations import Identity
from tests.store.conftest import affines, assert_metadata_is_zarrs_own

from pixnet_sd.errors import DataError, ElementError, StoreError
from pixnet_sd.store import Transaction, chunks_as_given, work_folder
from pixnet_sd.store.gene_map import (
    GeneMapWriter,
    image_pyramid,
    image_transforms,
    map_layout,
    map_transforms,
    open_map,
    tissue_labels,
)

GENES = ["ERBB2", "a/b", "MT-CO1", "gène", "5", *(f"g{k}" for k in range(15))]
HEIGHT, WIDTH = 75, 105
PITCH = 4.0
VALUES = np.random.default_rng(1).random((len(GENES), HEIGHT, WIDTH), dtype=np.float32)
KEY = "pixnet_map"
BLOCKS = map_layout(len(GENES), (HEIGHT, WIDTH), 32).blocks()


def writer_of(out, block_px=32, fingerprint="f", genes=GENES, layout=None):
    layout = layout or map_layout(len(genes), (HEIGHT, WIDTH), block_px)
    options = {"transforms": image_transforms(out.sdata, "_full_image"), "pitch_image_px": PITCH}
    return GeneMapWriter(out, key=KEY, channels=genes, layout=layout, fingerprint=fingerprint, **options)


def part(block, values=VALUES):
    return values[:, block[0] : block[1], block[2] : block[3]]


def write_map(sdata, *, order=None, values=VALUES, stop_after=None, others=None, **options):
    """Write a map, or be cut off after some blocks."""
    names = {KEY: "images"} | dict.fromkeys(others or {}, "labels")
    with Transaction(sdata, names) as out, writer_of(out, **options) as writer:
        blocks = writer.pending
        if order is not None:
            random.Random(order).shuffle(blocks)
        for block in blocks[:stop_after]:
            writer.write(block, part(block, values))
        if stop_after is not None:
            raise InterruptedError
        out.commit({KEY: writer.element(), **(others or {})})


def cut_off(sdata, stop_after):
    with pytest.raises(InterruptedError):
        write_map(sdata, stop_after=stop_after)
    assert KEY not in sd.read_zarr(sdata.path)


def pending(sdata, **options):
    with Transaction(sdata, {KEY: "images"}) as out, writer_of(out, **options) as writer:
        return writer.pending


def level(sdata, k):
    return sdata.images[KEY][f"scale{k}"]["image"]


def files_of(sdata):
    return [p for p in (sdata.path / "images" / KEY).rglob("*") if p.is_file() and p.name != "zarr.json"]


def assert_same_level(one, other):
    np.testing.assert_allclose(one.values, other.values, atol=1e-6)
    assert one.dtype == other.dtype == np.float32
    assert all(one.coords[axis].values.tolist() == other.coords[axis].values.tolist() for axis in "cyx")
    assert affines(one) == affines(other)


def test_equals_what_spatialdata_writes_itself(slide, tmp_path):
    """But for chunks that hold a few genes, so that one is read without the others, in one file a block and level."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_map(slide)
        ours = sd.read_zarr(slide.path)
    transforms = map_transforms(image_transforms(slide, "_full_image"), PITCH)
    padded = np.pad(VALUES, ((0, 0), (0, 1), (0, 1)))
    parsed = Image2DModel.parse(
        padded, dims=("c", "y", "x"), c_coords=GENES, scale_factors=[2], transformations=transforms
    )
    sd.SpatialData(images={KEY: parsed}).write(tmp_path / "theirs.zarr")
    theirs = sd.read_zarr(tmp_path / "theirs.zarr")
    for sdata in (ours, slide):  # what is read again, and what the writer attached
        assert list(sdata.images[KEY].children) == ["scale0", "scale1"]
        for k in (0, 1):
            assert_same_level(level(sdata, k), level(theirs, k))
    assert level(ours, 0).data.chunks[0] == (8, 8, 4)
    assert len(files_of(slide)) == 2 * 3 * 4 == map_layout(len(GENES), (HEIGHT, WIDTH), 32).n_files
    folders = [store / "images" / KEY for store in (slide.path, tmp_path / "theirs.zarr")]
    ours, theirs = (json.loads((folder / "zarr.json").read_text()) for folder in folders)
    assert ours == theirs
    ours, theirs = (zarr.open_array(str(folder / "s1"), mode="r") for folder in folders)
    assert ours.metadata.dimension_names == theirs.metadata.dimension_names
    assert not work_folder(slide.path).exists()


def test_consolidated_metadata_is_zarrs_own_and_tissue_covers_the_mask(slide):
    mask = VALUES[0] > 0.5
    write_map(slide, others={"tissue": tissue_labels(mask, PITCH, image_transforms(slide, "_full_image"))})
    assert_metadata_is_zarrs_own(slide)
    tissue = sd.read_zarr(slide.path).labels["tissue"]["scale0"]["image"]
    assert tissue.dtype == np.uint8
    assert tissue.shape == level(slide, 0).shape[1:]
    np.testing.assert_array_equal(tissue.values[:HEIGHT, :WIDTH], mask)
    assert tissue.values[HEIGHT:].max() == tissue.values[:, WIDTH:].max() == 0
    assert affines(tissue) == affines(level(slide, 0))


def test_every_map_pixel_lies_on_its_image_pixels(in_memory):
    """Landmarks: the centre of a map pixel maps to the centre of the image pixels that it covers, in every system."""
    write_map(in_memory)
    from_map, from_image = affines(in_memory.images[KEY]), affines(in_memory.images["_full_image"])
    assert from_map.keys() == from_image.keys()
    for system, matrix in from_map.items():
        for x, y in [(0.5, 0.5), (10.5, 70.5), (104.5, 3.5)]:
            np.testing.assert_allclose(
                matrix @ np.array([x, y, 1]), from_image[system] @ np.array([PITCH * x, PITCH * y, 1])
            )
    assert all((np.diff(level(in_memory, 1).coords[axis].values) == 2.0).all() for axis in "yx")


@pytest.mark.parametrize(("block_px", "order"), [(256, None), (16, 2)])
def test_block_size_and_order_do_not_matter(slide, in_memory, block_px, order):
    """Nor does it matter whether the object is backed, and one in memory can be written later."""
    write_map(slide, block_px=block_px, order=order)
    write_map(in_memory, order=5)
    with chunks_as_given():
        in_memory.write(slide.path.parent / "later.zarr")
    for other in (in_memory, sd.read_zarr(slide.path.parent / "later.zarr")):
        for k in (0, 1):
            assert_same_level(level(other, k), level(slide, k))
            np.testing.assert_array_equal(level(other, k).values, level(slide, k).values)


def test_levels_are_means_of_two_by_two(in_memory):
    values = np.random.default_rng(0).random((1, 2000, 24), dtype=np.float32)
    write_map(in_memory, values=values, genes=["A"], layout=map_layout(1, (2000, 24), 64))
    assert len(in_memory.images[KEY].children) == 3
    for k in (1, 2):
        below = level(in_memory, k - 1).values.astype(np.float64)
        means = below.reshape(1, below.shape[1] // 2, 2, below.shape[2] // 2, 2).mean((2, 4))
        np.testing.assert_allclose(level(in_memory, k).values, means, rtol=1e-6)


def test_blocks_never_written_are_zero_and_take_no_file(slide):
    with Transaction(slide, {KEY: "images"}) as out, writer_of(out) as writer:
        writer.write(BLOCKS[5], part(BLOCKS[5]))
        out.commit({KEY: writer.element()})
    assert len(files_of(slide)) == 2
    values = level(slide, 0).values
    assert values[:, :32].max() == 0
    np.testing.assert_array_equal(part(BLOCKS[5], values), part(BLOCKS[5]))


@pytest.mark.parametrize("change", [{"fingerprint": "other model"}, {"block_px": 64}, {"genes": GENES[::-1]}])
def test_a_partial_map_of_other_settings_is_not_used(slide, change):
    cut_off(slide, 4)
    assert pending(slide, **change) == map_layout(len(GENES), (HEIGHT, WIDTH), change.get("block_px", 32)).blocks()


@pytest.mark.parametrize("damage", [None, "lost", "emptied", "torn log", "nonsense in the log"])
def test_only_blocks_that_are_logged_and_whole_are_believed(slide, damage):
    """As after a crash of the machine: the log reached the disk, a file did not; or the other way round."""
    cut_off(slide, 3)
    folder = work_folder(slide.path) / f"map-{KEY}"
    log, expected = folder / "done.log", BLOCKS[3:]
    if damage == "torn log":
        log.write_text(log.read_text()[:-3])
        expected = BLOCKS[2:]
    elif damage == "nonsense in the log":
        with log.open("ab") as file:
            file.write(b"\na b c .\n1 2 .\n-1 0 5 .\n\xff\x00 . . .\n")
    elif damage is not None:
        file = next((folder / f"map.zarr/images/{KEY}/s1/c").rglob("0/0/1"))
        file.unlink() if damage == "lost" else file.write_bytes(b"")
        expected = [BLOCKS[1], *BLOCKS[3:]]
    assert pending(slide) == expected
    write_map(slide)
    np.testing.assert_array_equal(level(slide, 0).values[:, :HEIGHT, :WIDTH], VALUES)
    assert not work_folder(slide.path).exists()


def test_refused(in_memory):
    with Transaction(in_memory, {KEY: "images"}) as out:
        for width, values in ((31, 0), (32, 0), (32, np.nan), (32, -np.inf)):
            with pytest.raises(DataError):
                writer_of(out).write((0, 32, 0, width), np.full((20, 32, 32 if values else 31), values, np.float32))
        with pytest.raises(DataError, match="ERBB2"):
            writer_of(out, genes=[*GENES[:-1], "ERBB2"])
        with pytest.raises(StoreError, match="memory"):
            writer_of(out, genes=["A"], layout=map_layout(10**6, (10**5, 10**5)))


@pytest.mark.parametrize("backed", [True, False])
def test_reader(slide, in_memory, backed):
    sdata = slide if backed else in_memory
    write_map(sdata)
    reader = open_map(sdata, KEY)
    assert (reader.genes, reader.shape) == (tuple(GENES), (76, 106))
    np.testing.assert_array_equal(reader.read(range(20), (20, 71, 30, 99)), VALUES[:, 20:71, 30:99])
    np.testing.assert_array_equal(reader.read([3, 1], (0, 5, 1, 2)), VALUES[[3, 1], 0:5, 1:2])
    with pytest.raises(DataError, match="77"):
        reader.read([0], (0, 77, 0, 5))
    with pytest.raises(ElementError, match="_full_image"):
        open_map(sdata, "cells")


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image * 2,
        lambda image: image[:, ::-1],
        lambda image: image[:, 8:40, 8:40],
        lambda image: image.copy(data=da.from_array(image.values * 2)),
    ],
)
def test_reader_takes_what_is_in_memory_over_a_stale_store(slide, change):
    """A stored map that was changed lazily still has no other files than the store's."""
    write_map(slide)
    changed = change(level(slide, 0))
    slide.images[KEY] = image_pyramid([changed.data], GENES, {"global": Identity()})
    assert open_map(slide, KEY).shape == changed.shape[1:]
    np.testing.assert_array_equal(open_map(slide, KEY).read([3], (0, 5, 0, 5)), changed.values[3:4, :5, :5])


layouts = st.builds(
    map_layout,
    st.integers(1, 40_000),
    st.tuples(st.integers(1, 40_000), st.integers(1, 40_000)),
    st.none() | st.sampled_from([2, 32, 256]),
    whole_channels=st.booleans(),
)


@pytest.mark.parametrize(
    ("n_genes", "shape", "block_px", "n_levels"),
    [
        (1, (3250, 3250), 512, 4),
        (64, (3250, 3250), 512, 4),
        (250, (25_000, 9_000), 512, 7),
        (1000, (3250, 3250), 128, 4),
        (5000, (3250, 3250), 64, 4),
        (250, (100, 80), 256, 2),
    ],
)
def test_blocks_stay_within_64_mib_where_files_are_few_and_levels_end_near_512(n_genes, shape, block_px, n_levels):
    layout = map_layout(n_genes, shape)
    assert (layout.block_px, layout.n_levels) == (block_px, n_levels)
    assert map_layout(n_genes, shape, whole_channels=True).block_px <= block_px


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_levels_halve_exactly_blocks_fall_on_files_and_files_are_few(layout):
    n_files = 0
    for level in range(layout.n_levels):
        n_genes, height, width = layout.level_shape(level)
        assert (height << level, width << level) == layout.padded
        chunk = layout.level_chunks(level)
        file = layout.level_shards(level) or chunk
        assert file[0] >= n_genes
        assert all(whole % part == 0 for whole, part in zip(file, chunk, strict=True))
        for side, part in zip(layout.padded, file[1:], strict=True):
            assert part << level == min(layout.block_px, side)
        n_files += prod(-(-side // part) for side, part in zip(layout.level_shape(level), file, strict=True))
    assert n_files <= layout.n_files < 20_000
    areas = [(row1 - row0) * (col1 - col0) for row0, row1, col0, col1 in layout.blocks()]
    assert sum(areas) == layout.height * layout.width
    assert layout.whole_channels or prod(layout.level_chunks(0)) * 4 <= 4 * 2**20


def test_bytes_are_of_all_levels():
    assert map_layout(10, (1024, 1024)).nbytes == 10 * 4 * (1024**2 + 512**2)


@pytest.mark.parametrize(("shape", "block_px"), [((0, 5), 32), ((5, 5), 48), ((5, 5), 1)])
def test_layouts_that_cannot_be(shape, block_px):
    with pytest.raises(StoreError):
        map_layout(1, shape, block_px)
