"""Counts, places and outlines read in pieces: files are large enough to be of several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pixnet_sd.errors import DataError
from pixnet_sd.io import open_matrix, placed_bins, read_outlines

PIECE_ROWS, PIECE_ENTRIES, BLOCK_CHARACTERS = 2**17, 2**21, 2**20
FEW, MANY = st.integers(0, 60), 2 * PIECE_ROWS + 5
RING = [[0.5, 1.25], [10.0, 1.0], [10.0, 12.0], [0.5, 1.25]]


def barcodes(numbers: Sequence[int]) -> list[str]:
    return [f"s_{'x' * (number % 3)}{number}-1" for number in numbers]  # of different lengths


def write_matrix(path: Path, numbers: Sequence[int], *, variable_length: bool = False) -> None:
    names, n = barcodes(numbers), len(numbers)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = names if variable_length else np.array([name.encode() for name in names], dtype="S12")
        group["data"] = np.arange(n, dtype=np.int32)
        group["indices"] = np.zeros(n, dtype=np.int64)
        group["indptr"] = np.arange(n + 1)
        group["shape"] = np.array([3, n], dtype=np.int32)
        group.create_group("features")


def write_positions(path: Path, numbers: Sequence[int]) -> None:
    at = np.array(numbers, dtype=np.int64)
    lattice = {"in_tissue": np.ones_like(at), "array_row": 2 * at, "array_col": 3 * at}
    pixels = {"pxl_row_in_fullres": 0.5 * at, "pxl_col_in_fullres": 0.25 * at}
    pq.write_table(pa.table({"barcode": barcodes(numbers), **lattice, **pixels}), path)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 60), n_in_order=FEW, n_left_out=FEW, sort=st.booleans(), variable_length=st.booleans(), seed=FEW
)
@example(n=MANY, n_in_order=PIECE_ROWS + 1000, n_left_out=1000, sort=True, variable_length=False, seed=0)
@example(n=MANY, n_in_order=MANY, n_left_out=1000, sort=True, variable_length=False, seed=0)
def test_every_row_gets_its_place(tmp_path_factory, n, n_in_order, n_left_out, sort, variable_length, seed):
    """Places are sorted as far as ``n_in_order``; rows are some of them, sorted or not."""
    folder, rng, places = tmp_path_factory.getbasetemp(), np.random.default_rng(seed), np.arange(n)
    places[n_in_order:] = rng.permutation(places[n_in_order:])
    rows = rng.choice(n, max(n - n_left_out, 1), replace=False)
    rows = np.sort(rows) if sort else rows
    write_matrix(folder / "m.h5", rows, variable_length=variable_length)
    write_positions(folder / "p.parquet", places)
    with open_matrix(folder / "m.h5") as matrix:
        pieces = list(placed_bins(matrix, folder / "p.parquet"))
    assert max(len(piece.barcodes) for piece in pieces) <= PIECE_ROWS
    assert [name for piece in pieces for name in piece.barcodes.to_pylist()] == barcodes(rows)
    np.testing.assert_array_equal(np.concatenate([piece.columns["array_col"] for piece in pieces]), 3 * rows)
    centres = np.concatenate([piece.centres_px for piece in pieces])
    np.testing.assert_array_equal(centres, np.outer(rows, [0.25, 0.5]))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3 * PIECE_ENTRIES), min_size=1, max_size=20),
    n_empty=st.integers(0, 3 * PIECE_ROWS),
    at=st.integers(0, 20),
)
def test_pieces_of_a_matrix_cover_it_and_are_small(tmp_path_factory, sizes, n_empty, at):
    path = tmp_path_factory.getbasetemp() / "pieces.h5"
    write_matrix(path, [1])
    sizes = np.insert(np.array(sizes), min(at, len(sizes)), np.zeros(n_empty, np.int64))
    with open_matrix(path) as matrix:
        large = replace(matrix, indptr=np.concatenate([[0], np.cumsum(sizes)]))
        starts, stops = zip(*large.pieces(), strict=True)
    assert (0, *stops) == (*starts, len(sizes))
    for start, stop in zip(starts, stops, strict=True):
        assert stop - start <= PIECE_ROWS
        assert sizes[start:stop].sum() <= PIECE_ENTRIES or stop == start + 1


def test_missing_and_repeated_barcodes_and_damaged_matrices_are_refused(tmp_path):
    for rows, places in (([1, 2, 3], [1, 3]), ([1, 2], [2, 1, 2]), ([3, 2, 2, 1], [1, 2, 3])):
        write_matrix(tmp_path / "m.h5", rows)
        write_positions(tmp_path / "p.parquet", places)
        with open_matrix(tmp_path / "m.h5") as matrix, pytest.raises(DataError, match=r"m\.h5.*p\.parquet"):
            list(placed_bins(matrix, tmp_path / "p.parquet"))
    for numbers, part in (([1, 2], "matrix/data"), ([1, 2], "matrix"), ([], "matrix/features")):
        write_matrix(tmp_path / "m.h5", numbers)
        with h5py.File(tmp_path / "m.h5", "r+") as file:
            del file[part]
            file[part] = np.zeros(1, np.int32)
        with pytest.raises(DataError, match="m.h5"), open_matrix(tmp_path / "m.h5"):
            pass


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 5), before=st.integers(0, 900), indent=st.sampled_from([None, 0, 2]), lost=st.integers(0, 500))
def test_outlines_are_read_wherever_a_block_ends_and_refused_when_cut_off(tmp_path_factory, n, before, indent, lost):
    shapes = [{"type": "Polygon", "coordinates": [[[x + i, y] for x, y in RING]]} for i in range(n)]
    about = [{"cell_id": i, "name": 'with "features": [ in it'} for i in range(n)]
    features = [{"geometry": shape, "properties": own} for shape, own in zip(shapes, about, strict=True)]
    padding = "x" * (BLOCK_CHARACTERS - before)
    text = json.dumps({"name": padding, "features": features, "end": {"more": [1]}}, indent=indent)
    path = tmp_path_factory.getbasetemp() / "cells.geojson"
    path.write_text(text)
    outlines = read_outlines(path)
    assert list(outlines) == [f"cellid_{i:09d}-1" for i in range(n)]
    for i, outline in enumerate(outlines.values()):
        assert list(outline.exterior.coords) == [(x + i, y) for x, y in RING]
    end = text.rindex("]", 0, text.index('"end"'))  # of the features
    path.write_text(text[: end - lost])
    with pytest.raises(DataError, match="cells.geojson"):
        read_outlines(path)
