from __future__ import annotations

import json
import random

import numpy as np
import pytest
import spatialdata as sd
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

from pixnet_sd.errors import DataError, ElementError, StoreError
from pixnet_sd.store import work_folder
from pixnet_sd.store.gene_map import GeneMapWriter, _gene_map, image_transforms, open_map, tissue_labels
from pixnet_sd.store.gene_map import _writer as _map_sink
from pixnet_sd.store.gene_map._gene_map import read_block
from pixnet_sd.store.gene_map._writer import map_transforms

GENES = ["ERBB2", "a/b", "MT-CO1", "gène", "5"]
HEIGHT, WIDTH = 75, 105
PITCH = 4.0
VALUES = np.random.default_rng(1).random((len(GENES), HEIGHT, WIDTH), dtype=np.float32)


def start(sdata, *, block_px=32, fingerprint="f", key="pixnet_map", **options):
    return GeneMapWriter.open(
        sdata,
        key=key,
        genes=GENES,
        shape=(HEIGHT, WIDTH),
        pitch_image_px=PITCH,
        image_key="_full_image",
        fingerprint=fingerprint,
        block_px=block_px,
        **options,
    )


def part(block, values=VALUES):
    return values[:, block[0] : block[1], block[2] : block[3]]


def write_map(sdata, *, order=None, values=VALUES, **options):
    with start(sdata, **options) as writer:
        blocks = writer.pending
        if order is not None:
            random.Random(order).shuffle(blocks)
        for block in blocks:
            writer.write(block, part(block, values))
        writer.commit()


def level(sdata, k, key="pixnet_map"):
    return sdata.images[key][f"scale{k}"]["image"]


def assert_no_scratch(sdata):
    assert not work_folder(sdata.path.resolve()).exists()


def test_equals_what_spatialdata_writes_itself(slide, tmp_path):
    write_map(slide)
    padded = np.pad(VALUES, ((0, 0), (0, 1), (0, 1)))
    transforms = map_transforms(image_transforms(slide, "_full_image"), PITCH)
    parsed = Image2DModel.parse(
        padded, dims=("c", "y", "x"), c_coords=GENES, scale_factors=[2], transformations=transforms
    )
    sd.SpatialData(images={"pixnet_map": parsed}).write(tmp_path / "theirs.zarr")
    theirs, ours = sd.read_zarr(tmp_path / "theirs.zarr"), sd.read_zarr(slide.path)
    for sdata in (ours, slide):  # what is read again, and what the writer attached
        assert list(sdata.images["pixnet_map"].children) == ["scale0", "scale1"]
        for k in (0, 1):
            assert level(sdata, k).dtype == np.float32
            np.testing.assert_allclose(level(sdata, k).values, level(theirs, k).values, atol=1e-6)
            for axis in "cyx":
                assert level(sdata, k).coords[axis].values.tolist() == level(theirs, k).coords[axis].values.tolist()
    ours, theirs = (store / "images/pixnet_map/zarr.json" for store in (slide.path, tmp_path / "theirs.zarr"))
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
    assert_no_scratch(slide)


def test_consolidated_metadata_is_zarrs_own(slide):
    with start(slide) as writer:
        tissue = tissue_labels(VALUES[0] > 0.5, PITCH, image_transforms(slide, "_full_image"))
        writer.commit({"pixnet_map_tissue": tissue})
    ours = json.loads((slide.path / "zarr.json").read_text())
    slide.write_consolidated_metadata()
    assert ours == json.loads((slide.path / "zarr.json").read_text())


def test_a_store_without_consolidated_metadata_stays_so(in_memory, tmp_path):
    in_memory.write(tmp_path / "plain.zarr", consolidate_metadata=False)
    sdata = sd.read_zarr(tmp_path / "plain.zarr")
    write_map(sdata)
    assert not sdata.has_consolidated_metadata()
    np.testing.assert_array_equal(level(sd.read_zarr(sdata.path), 0).values[:, :HEIGHT, :WIDTH], VALUES)


def test_every_map_pixel_lies_on_its_image_pixels(slide):
    """Landmarks: the centre of a map pixel maps to the centre of the image pixels that it covers, in every system."""
    write_map(slide)
    image, gene_map = slide.images["_full_image"], slide.images["pixnet_map"]
    for system, to_system in get_transformation(image, get_all=True).items():
        from_map = get_transformation(gene_map, system).to_affine_matrix(("x", "y"), ("x", "y"))
        from_image = to_system.to_affine_matrix(("x", "y"), ("x", "y"))
        for x, y in [(0.5, 0.5), (10.5, 70.5), (104.5, 3.5)]:
            np.testing.assert_allclose(from_map @ [x, y, 1], from_image @ [PITCH * x, PITCH * y, 1])
    steps = [np.diff(level(slide, 1).coords[axis].values) for axis in "yx"]
    assert all((step == 2.0).all() for step in steps)


@pytest.mark.parametrize(("block_px", "order"), [(64, None), (256, None), (16, 2)])
def test_block_size_and_order_do_not_matter(slide, block_px, order):
    write_map(slide, block_px=block_px, order=order)
    write_map(slide, key="again", block_px=32, order=5)
    for k in (0, 1):
        np.testing.assert_array_equal(level(slide, k).values, level(slide, k, "again").values)


def test_levels_are_means_of_two_by_two(slide, monkeypatch):
    monkeypatch.setattr("pixnet_sd.store.gene_map._layout.COARSEST_PX", 16)
    write_map(slide, block_px=16)
    assert len(slide.images["pixnet_map"].children) == 4
    for k in (1, 2, 3):
        below = level(slide, k - 1).values.astype(np.float64)
        means = below.reshape(len(GENES), below.shape[1] // 2, 2, below.shape[2] // 2, 2).mean((2, 4))
        np.testing.assert_allclose(level(slide, k).values, means, rtol=1e-6)


def test_blocks_never_written_are_zero_and_take_no_file(slide):
    with start(slide) as writer:
        block = writer.blocks[5]
        writer.write(block, part(block))
        writer.commit()
    chunks = [p for p in (slide.path / "images/pixnet_map").rglob("*") if p.is_file() and p.name != "zarr.json"]
    assert len(chunks) == 2
    values = level(slide, 0).values
    assert values[:, :32].max() == 0
    np.testing.assert_array_equal(part(block, values), part(block))


def write_some(sdata, n_blocks, **options):
    with start(sdata, **options) as writer:
        for block in writer.pending[:n_blocks]:
            writer.write(block, part(block))
        raise RuntimeError("interrupted")


def interrupted(sdata, after, **options):
    with pytest.raises(RuntimeError, match="interrupted"):
        write_some(sdata, after, **options)


def test_resumed_equals_uninterrupted(slide):
    interrupted(slide, after=4)
    assert "pixnet_map" not in sd.read_zarr(slide.path)
    with start(slide) as writer:
        assert writer.resumed
        assert writer.pending == writer.blocks[4:]
        for block in writer.pending:
            writer.write(block, part(block))
        writer.commit()
    write_map(slide, key="whole")
    for k in (0, 1):
        np.testing.assert_array_equal(level(slide, k).values, level(slide, k, "whole").values)
    assert_no_scratch(slide)


@pytest.mark.parametrize("change", [{"fingerprint": "other model"}, {"block_px": 64}])
def test_a_partial_map_of_other_settings_is_not_used(slide, change):
    interrupted(slide, after=4)
    with start(slide, **change) as writer:
        assert not writer.resumed
        assert writer.pending == writer.blocks
        writer.abort()
    assert_no_scratch(slide)


def test_a_logged_block_whose_files_were_lost_is_pending_again(slide):
    """As after a crash of the machine: the log reached the disk, a chunk did not."""
    interrupted(slide, after=3)
    chunk = next((work_folder(slide.path) / "map-pixnet_map/map.zarr/images/pixnet_map/s1/c").rglob("0/0/1"))
    chunk.write_bytes(b"")
    with start(slide) as writer:
        assert writer.pending == [writer.blocks[1], *writer.blocks[3:]]


def test_a_torn_log_line_is_skipped(slide):
    interrupted(slide, after=3)
    log = work_folder(slide.path) / "map-pixnet_map" / "done.log"
    log.write_text(log.read_text()[:-3])
    with start(slide) as writer:
        assert writer.pending == writer.blocks[2:]
        writer.write(writer.blocks[2], part(writer.blocks[2]))
    with start(slide) as writer:
        assert writer.pending == writer.blocks[3:]


def test_two_runs_cannot_write_one_map(slide, monkeypatch):
    monkeypatch.setattr(_gene_map, "LOCK_WAIT_S", 0.05)
    with start(slide), pytest.raises(StoreError, match="Another run is writing the gene map"):
        start(slide)
    start(slide).close()


def test_overwrite_replaces_the_map(slide):
    write_map(slide)
    with pytest.raises(StoreError, match="exists already"):
        start(slide)
    write_map(slide, values=VALUES * 2, overwrite=True)
    for sdata in (slide, sd.read_zarr(slide.path)):
        np.testing.assert_array_equal(level(sdata, 0).values[:, :HEIGHT, :WIDTH], VALUES * 2)
    assert_no_scratch(slide)


@pytest.mark.parametrize(
    ("block", "values", "message"),
    [
        ((0, 32, 0, 31), np.zeros((5, 32, 31)), "not one of the blocks"),
        ((0, 32, 0, 32), np.zeros((5, 32, 31)), "shape"),
        ((0, 32, 0, 32), np.full((5, 32, 32), np.nan), "not finite"),
        ((0, 32, 0, 32), np.full((5, 32, 32), -np.inf), "not finite"),
    ],
)
def test_bad_blocks(slide, block, values, message):
    with start(slide) as writer, pytest.raises(DataError, match=message):
        writer.write(block, values.astype(np.float32))


def test_genes_named_twice(slide):
    options = {"shape": (9, 9), "pitch_image_px": 1.0, "image_key": "_full_image", "fingerprint": ""}
    with pytest.raises(DataError, match="twice: A"):
        GeneMapWriter.open(slide, key="m", genes=["A", "B", "A"], **options)


def test_too_little_disk_is_refused_before_any_block(slide, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match="MB are free"):
        start(slide)


def test_in_memory_map_equals_the_one_on_disk(slide, in_memory):
    write_map(slide)
    write_map(in_memory, order=3)
    assert in_memory.path is None
    for k in (0, 1):
        ours, disk = level(in_memory, k), level(slide, k)
        np.testing.assert_array_equal(ours.values, disk.values)
        assert all(ours.coords[axis].values.tolist() == disk.coords[axis].values.tolist() for axis in "cyx")
        for system, transform in get_transformation(disk, get_all=True).items():
            other = get_transformation(ours, system)
            matrices = [t.to_affine_matrix(("x", "y"), ("x", "y")) for t in (transform, other)]
            np.testing.assert_allclose(*matrices)


def test_in_memory_map_can_be_written_later(in_memory, tmp_path):
    write_map(in_memory)
    in_memory.write(tmp_path / "later.zarr")
    again = sd.read_zarr(tmp_path / "later.zarr")
    np.testing.assert_array_equal(level(again, 1).values, level(in_memory, 1).values)


def test_memory_too_small(in_memory, monkeypatch):
    monkeypatch.setattr(_map_sink, "available_memory", lambda: 10**5)
    with pytest.raises(StoreError, match="Write the object to disk first"):
        start(in_memory)


@pytest.mark.parametrize("backed", [True, False])
def test_read_block(slide, in_memory, backed):
    sdata = slide if backed else in_memory
    write_map(sdata)
    np.testing.assert_array_equal(read_block(sdata, "pixnet_map", 20, 71, 30, 99), VALUES[:, 20:71, 30:99])
    np.testing.assert_array_equal(read_block(sdata, "pixnet_map", 0, 5, 1, 2, [3, 1]), VALUES[[3, 1], 0:5, 1:2])
    reader = open_map(sdata, "pixnet_map")
    assert reader.genes == tuple(GENES)
    assert reader.shape == (76, 106)
    with pytest.raises(DataError, match="leave the map"):
        reader.read(0, 77, 0, 5)


def test_read_block_prefers_what_is_in_memory_over_a_stale_store(slide, in_memory):
    write_map(slide)
    write_map(in_memory, values=VALUES * 2)
    slide.images["pixnet_map"] = in_memory.images["pixnet_map"]
    np.testing.assert_array_equal(read_block(slide, "pixnet_map", 0, 5, 0, 5), VALUES[:, :5, :5] * 2)


def test_open_map_of_something_else(slide):
    with pytest.raises(ElementError, match=r"not a gene map.*_full_image"):
        open_map(slide, "cells")


def test_tissue_labels_cover_the_mask(slide):
    mask = VALUES[0] > 0.5
    with start(slide) as writer:
        writer.commit({"pixnet_map_tissue": tissue_labels(mask, PITCH, image_transforms(slide, "_full_image"))})
    tissue = sd.read_zarr(slide.path).labels["pixnet_map_tissue"]["scale0"]["image"]
    assert tissue.dtype == np.uint8
    assert tissue.shape == level(slide, 0).shape[1:]
    np.testing.assert_array_equal(tissue.values[:HEIGHT, :WIDTH], mask)
    assert tissue.values[HEIGHT:].max() == tissue.values[:, WIDTH:].max() == 0
    for system, transform in get_transformation(level(slide, 0), get_all=True).items():
        assert (
            get_transformation(tissue, system).to_affine_matrix(("x", "y"), ("x", "y"))
            == transform.to_affine_matrix(("x", "y"), ("x", "y"))
        ).all()
