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
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.errors import DataError
from pixnet_sd.io import open_matrix, open_positions, placed_bins, read_outlines

PIECE_ROWS, PIECE_ENTRIES, BLOCK_CHARACTERS = 2**17, 2**21, 2**20
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
    names = ("in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
    values = np.array(numbers, dtype=np.int64)
    columns = dict(zip(names, (values * 0 + 1, values * 2, values * 3, values * 0.5, values * 0.25), strict=True))
    pq.write_table(pa.table({"barcode": barcodes(values.tolist()), **columns}), path)


def check_join(folder: Path, rows: Sequence[int], places: Sequence[int], *, variable_length: bool = False) -> None:
    write_matrix(folder / "m.h5", rows, variable_length=variable_length)
    write_positions(folder / "p.parquet", places)
    with open_matrix(folder / "m.h5") as matrix:
        pieces = list(placed_bins(matrix, folder / "p.parquet"))
    assert max(len(piece.barcodes) for piece in pieces) <= PIECE_ROWS
    assert [name for piece in pieces for name in piece.barcodes.to_pylist()] == barcodes(rows)
    columns = np.concatenate([piece.columns["array_col"] for piece in pieces])
    np.testing.assert_array_equal(columns, 3 * np.array(rows))
    centres = np.concatenate([piece.centres_px for piece in pieces])
    np.testing.assert_array_equal(centres, np.outer(rows, [0.25, 0.5]))


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_every_row_gets_its_place(tmp_path_factory, data):
    places = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=30, unique=True))
    rows = data.draw(st.lists(st.sampled_from(places), min_size=1, unique=True))
    if data.draw(st.booleans()):
        rows, places = sorted(rows), sorted(places)
    check_join(tmp_path_factory.mktemp("join"), rows, places, variable_length=data.draw(st.booleans()))


@pytest.mark.parametrize("n_in_order", [PIECE_ROWS + 1000, 2 * PIECE_ROWS + 5])
def test_every_row_of_several_pieces_gets_its_place(tmp_path, n_in_order):
    """Rows in the order of the places as far as ``n_in_order``, in any order after that."""
    rng = np.random.default_rng(0)
    n = 2 * PIECE_ROWS + 5
    places = np.arange(n)
    places[n_in_order:] = rng.permutation(places[n_in_order:])
    rows = np.sort(rng.choice(n, n - 1000, replace=False))
    check_join(tmp_path, rows.tolist(), places.tolist())


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


def test_missing_and_repeated_barcodes_other_columns_and_damaged_matrices_are_refused(tmp_path):
    for rows, places in (([1, 2, 3], [1, 3]), ([1, 2], [2, 1, 2]), ([3, 2, 2, 1], [1, 2, 3])):
        write_matrix(tmp_path / "m.h5", rows)
        write_positions(tmp_path / "p.parquet", places)
        with open_matrix(tmp_path / "m.h5") as matrix, pytest.raises(DataError, match=r"m\.h5.*p\.parquet"):
            list(placed_bins(matrix, tmp_path / "p.parquet"))
    pq.write_table(pa.table({"barcode": ["a"], "x": [1]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="barcode, x"):
        open_positions(tmp_path / "p.parquet")
    for numbers, part in (([1, 2], "matrix/data"), ([1, 2], "matrix"), ([], "matrix/features")):
        write_matrix(tmp_path / "m.h5", numbers)
        with h5py.File(tmp_path / "m.h5", "r+") as file:
            del file[part]
            file[part] = np.zeros(1, np.int32)
        with pytest.raises(DataError, match="m.h5"), open_matrix(tmp_path / "m.h5"):
            pass


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 5), before=st.integers(0, 900), indent=st.sampled_from([None, 0, 2]))
def test_outlines_are_read_wherever_a_block_ends(tmp_path_factory, n, before, indent):
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


@pytest.mark.parametrize(
    "text", ["", "{}", '{"features": [', '{"features": [{"a": 1}', '{"features": [{"geometry": 1}]}']
)
def test_other_files_than_outlines_are_refused(tmp_path, text):
    (tmp_path / "cells.geojson").write_text(text)
    with pytest.raises(DataError, match="cells.geojson"):
        read_outlines(tmp_path / "cells.geojson")
