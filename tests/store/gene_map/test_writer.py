from __future__ import annotations

import json
import os
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import spatialdata as sd
import zarr
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

from pixnet_sd.errors import DataError, ElementError, StoreError
from pixnet_sd.store import Transaction, work_folder
from pixnet_sd.store.gene_map import (
    GeneMapWriter,
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


def writer_of(out, key=KEY, block_px=32, fingerprint="f", genes=GENES):
    layout = map_layout(len(genes), (HEIGHT, WIDTH), block_px)
    transforms = image_transforms(out.sdata, "_full_image")
    return GeneMapWriter(
        out,
        key=key,
        channels=genes,
        layout=layout,
        transforms=transforms,
        pitch_image_px=PITCH,
        fingerprint=fingerprint,
    )


def part(block, values=VALUES):
    return values[:, block[0] : block[1], block[2] : block[3]]


def write_map(sdata, *, key=KEY, order=None, values=VALUES, overwrite=False, stop_after=None, others=None, **options):
    """Write a map, or be cut off after some blocks."""
    names = {key: "images"} | dict.fromkeys(others or {}, "labels")
    with Transaction(sdata, names, overwrite=overwrite) as out, writer_of(out, key, **options) as writer:
        blocks = writer.pending
        if order is not None:
            random.Random(order).shuffle(blocks)
        for block in blocks[:stop_after]:
            writer.write(block, part(block, values))
        if stop_after is not None:
            raise InterruptedError
        out.commit({key: writer.element(), **(others or {})})


def cut_off(sdata, stop_after, **options):
    with pytest.raises(InterruptedError):
        write_map(sdata, stop_after=stop_after, **options)
    assert KEY not in sd.read_zarr(sdata.path)


def pending(sdata, **options):
    with Transaction(sdata, {KEY: "images"}) as out, writer_of(out, **options) as writer:
        return writer.pending


def level(sdata, k, key=KEY):
    return sdata.images[key][f"scale{k}"]["image"]


def files_of(sdata, key=KEY):
    return [p for p in (sdata.path / "images" / key).rglob("*") if p.is_file() and p.name != "zarr.json"]


def test_equals_what_spatialdata_writes_itself(slide, tmp_path):
    write_map(slide)
    transforms = map_transforms(image_transforms(slide, "_full_image"), PITCH)
    padded = np.pad(VALUES, ((0, 0), (0, 1), (0, 1)))
    parsed = Image2DModel.parse(
        padded, dims=("c", "y", "x"), c_coords=GENES, scale_factors=[2], transformations=transforms
    )
    sd.SpatialData(images={KEY: parsed}).write(tmp_path / "theirs.zarr")
    theirs, ours = sd.read_zarr(tmp_path / "theirs.zarr"), sd.read_zarr(slide.path)
    for sdata in (ours, slide):  # what is read again, and what the writer attached
        assert list(sdata.images[KEY].children) == ["scale0", "scale1"]
        for k in (0, 1):
            assert level(sdata, k).dtype == np.float32
            np.testing.assert_allclose(level(sdata, k).values, level(theirs, k).values, atol=1e-6)
            for axis in "cyx":
                assert level(sdata, k).coords[axis].values.tolist() == level(theirs, k).coords[axis].values.tolist()
    folders = [store / "images" / KEY for store in (slide.path, tmp_path / "theirs.zarr")]
    ours, theirs = (json.loads((folder / "zarr.json").read_text()) for folder in folders)
    assert ours == theirs
    ours, theirs = (zarr.open_array(str(folder / "s1"), mode="r") for folder in folders)
    assert ours.compressors == theirs.compressors
    assert ours.metadata.dimension_names == theirs.metadata.dimension_names
    assert not work_folder(slide.path).exists()


def test_one_file_a_block_and_level_whatever_the_genes(slide):
    """Also the chunks that dask sees hold a few genes, so that one is read without the others; and nobody warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_map(slide)
        finest = level(sd.read_zarr(slide.path), 0)
    assert len(files_of(slide)) == 2 * 3 * 4 == map_layout(len(GENES), (HEIGHT, WIDTH), 32).n_files
    assert finest.data.chunks[0] == (8, 8, 4)
    np.testing.assert_array_equal(finest.sel(c="g3").values[:HEIGHT, :WIDTH], VALUES[8])


@pytest.mark.parametrize("lacking", ["disk_usage", "statvfs"])
def test_too_little_disk_or_too_few_files_are_refused_before_any_block(slide, monkeypatch, lacking):
    if lacking == "disk_usage":
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000}))
    else:
        disk = SimpleNamespace(f_bavail=10**9, f_blocks=10**9, f_bfree=10**9, f_frsize=4096, f_files=1000, f_favail=5)
        monkeypatch.setattr(os, "statvfs", lambda path: disk)
    with (
        pytest.raises(StoreError, match="free|files"),
        Transaction(slide, {KEY: "images"}) as out,
        writer_of(out) as writer,
    ):
        out.check_room(writer.missing_bytes, writer.missing_files)
    assert not work_folder(slide.path).exists()


def test_consolidated_metadata_is_zarrs_own_and_tissue_covers_the_mask(slide):
    mask = VALUES[0] > 0.5
    write_map(slide, others={"tissue": tissue_labels(mask, PITCH, image_transforms(slide, "_full_image"))})
    ours = json.loads((slide.path / "zarr.json").read_text())
    slide.write_consolidated_metadata()
    assert ours == json.loads((slide.path / "zarr.json").read_text())
    tissue = sd.read_zarr(slide.path).labels["tissue"]["scale0"]["image"]
    assert tissue.dtype == np.uint8
    assert tissue.shape == level(slide, 0).shape[1:]
    np.testing.assert_array_equal(tissue.values[:HEIGHT, :WIDTH], mask)
    assert tissue.values[HEIGHT:].max() == tissue.values[:, WIDTH:].max() == 0
    assert_same_places(tissue, level(slide, 0))


def assert_same_places(one, other):
    matrices = [
        {system: t.to_affine_matrix(("x", "y"), ("x", "y")).tolist() for system, t in transforms.items()}
        for transforms in (get_transformation(each, get_all=True) for each in (one, other))
    ]
    assert matrices[0].keys() == matrices[1].keys()
    for system, matrix in matrices[0].items():
        np.testing.assert_allclose(matrix, matrices[1][system])


def test_every_map_pixel_lies_on_its_image_pixels(slide):
    """Landmarks: the centre of a map pixel maps to the centre of the image pixels that it covers, in every system."""
    write_map(slide)
    image, gene_map = slide.images["_full_image"], slide.images[KEY]
    for system, to_system in get_transformation(image, get_all=True).items():
        from_map = get_transformation(gene_map, system).to_affine_matrix(("x", "y"), ("x", "y"))
        from_image = to_system.to_affine_matrix(("x", "y"), ("x", "y"))
        for x, y in [(0.5, 0.5), (10.5, 70.5), (104.5, 3.5)]:
            np.testing.assert_allclose(from_map @ [x, y, 1], from_image @ [PITCH * x, PITCH * y, 1])
    assert all((np.diff(level(slide, 1).coords[axis].values) == 2.0).all() for axis in "yx")


@pytest.mark.parametrize(("block_px", "order"), [(256, None), (16, 2)])
def test_block_size_and_order_do_not_matter(slide, in_memory, block_px, order):
    """Nor does it matter whether the object is backed, and one in memory can be written later."""
    write_map(slide, block_px=block_px, order=order)
    write_map(in_memory, order=5)
    in_memory.write(slide.path.parent / "later.zarr")
    for other in (in_memory, sd.read_zarr(slide.path.parent / "later.zarr")):
        for k in (0, 1):
            ours, disk = level(other, k), level(slide, k)
            np.testing.assert_array_equal(ours.values, disk.values)
            assert all(ours.coords[axis].values.tolist() == disk.coords[axis].values.tolist() for axis in "cyx")
            assert_same_places(ours, disk)


def test_levels_are_means_of_two_by_two(in_memory):
    values = np.random.default_rng(0).random((1, 2000, 24), dtype=np.float32)
    layout = map_layout(1, (2000, 24), 64)
    with Transaction(in_memory, {KEY: "images"}) as out:
        transforms = image_transforms(in_memory, "_full_image")
        options = {"key": KEY, "channels": ["A"], "layout": layout, "fingerprint": ""}
        writer = GeneMapWriter(out, transforms=transforms, pitch_image_px=1.0, **options)
        for block in writer.pending:
            writer.write(block, part(block, values))
        out.commit({KEY: writer.element()})
    assert len(in_memory.images[KEY].children) == 3
    for k in (1, 2):
        below = level(in_memory, k - 1).values.astype(np.float64)
        means = below.reshape(1, below.shape[1] // 2, 2, below.shape[2] // 2, 2).mean((2, 4))
        np.testing.assert_allclose(level(in_memory, k).values, means, rtol=1e-6)


def test_blocks_never_written_are_zero_and_take_no_file(slide):
    with Transaction(slide, {KEY: "images"}) as out, writer_of(out) as writer:
        block = writer.pending[5]
        writer.write(block, part(block))
        out.commit({KEY: writer.element()})
    assert len(files_of(slide)) == 2
    values = level(slide, 0).values
    assert values[:, :32].max() == 0
    np.testing.assert_array_equal(part(block, values), part(block))


def test_resumed_equals_uninterrupted(slide):
    cut_off(slide, 4)
    blocks = map_layout(len(GENES), (HEIGHT, WIDTH), 32).blocks()
    assert pending(slide) == blocks[4:]
    write_map(slide)
    write_map(slide, key="whole")
    for k in (0, 1):
        np.testing.assert_array_equal(level(slide, k).values, level(slide, k, "whole").values)
    assert not work_folder(slide.path).exists()


@pytest.mark.parametrize("change", [{"fingerprint": "other model"}, {"block_px": 64}, {"genes": GENES[::-1]}])
def test_a_partial_map_of_other_settings_is_not_used(slide, change):
    cut_off(slide, 4)
    assert pending(slide, **change) == map_layout(len(GENES), (HEIGHT, WIDTH), change.get("block_px", 32)).blocks()


@pytest.mark.parametrize("damage", ["lost", "emptied", "torn log", "nonsense in the log"])
def test_only_blocks_that_are_logged_and_whole_are_believed(slide, damage):
    """As after a crash of the machine: the log reached the disk, a file did not; or the other way round."""
    cut_off(slide, 3)
    folder = work_folder(slide.path) / f"map-{KEY}"
    blocks = map_layout(len(GENES), (HEIGHT, WIDTH), 32).blocks()
    log = folder / "done.log"
    if damage == "torn log":
        log.write_text(log.read_text()[:-3])
        assert pending(slide) == blocks[2:]
    elif damage == "nonsense in the log":
        with log.open("ab") as file:
            file.write(b"\na b c .\n1 2 .\n-1 0 5 .\n\xff\x00 . . .\n")
        assert pending(slide) == blocks[3:]
    else:
        file = next((folder / f"map.zarr/images/{KEY}/s1/c").rglob("0/0/1"))
        file.unlink() if damage == "lost" else file.write_bytes(b"")
        assert pending(slide) == [blocks[1], *blocks[3:]]
    write_map(slide)
    np.testing.assert_array_equal(level(slide, 0).values[:, :HEIGHT, :WIDTH], VALUES)


def test_two_runs_cannot_write_one_map(slide):
    names = {KEY: "images"}
    with (
        Transaction(slide, names) as first,
        writer_of(first),
        Transaction(slide, names, wait_s=0.05) as second,
        pytest.raises(StoreError, match=KEY),
    ):
        writer_of(second)
    assert pending(slide)


def test_overwrite_replaces_the_map(slide):
    write_map(slide)
    with pytest.raises(StoreError, match=KEY):
        write_map(slide)
    write_map(slide, values=VALUES * 2, overwrite=True)
    for sdata in (slide, sd.read_zarr(slide.path)):
        np.testing.assert_array_equal(level(sdata, 0).values[:, :HEIGHT, :WIDTH], VALUES * 2)


@pytest.mark.parametrize(
    ("block", "values"),
    [
        ((0, 32, 0, 31), np.zeros((20, 32, 31))),
        ((0, 32, 0, 32), np.zeros((20, 32, 31))),
        ((0, 32, 0, 32), np.full((20, 32, 32), np.nan)),
        ((0, 32, 0, 32), np.full((20, 32, 32), -np.inf)),
    ],
)
def test_bad_blocks(in_memory, block, values):
    with Transaction(in_memory, {KEY: "images"}) as out, pytest.raises(DataError):
        writer_of(out).write(block, values.astype(np.float32))


def test_genes_named_twice_and_memory_too_small(in_memory, monkeypatch):
    with Transaction(in_memory, {KEY: "images"}) as out:
        with pytest.raises(DataError, match="ERBB2"):
            writer_of(out, genes=[*GENES[:-1], "ERBB2"])
        transforms, layout = image_transforms(in_memory, "_full_image"), map_layout(10**6, (10**5, 10**5))
        options = {"key": KEY, "channels": ["A"], "layout": layout, "fingerprint": ""}
        with pytest.raises(StoreError, match="memory"):
            GeneMapWriter(out, transforms=transforms, pitch_image_px=1.0, **options)


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


def test_reader_prefers_what_is_in_memory_over_a_stale_store(slide, in_memory):
    write_map(slide)
    write_map(in_memory, values=VALUES * 2)
    slide.images[KEY] = in_memory.images[KEY]
    np.testing.assert_array_equal(open_map(slide, KEY).read([3], (0, 5, 0, 5)), VALUES[3:4, :5, :5] * 2)
