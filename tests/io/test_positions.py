from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.errors import DataError
from pixnet_sd.io import _matrix, open_matrix
from pixnet_sd.io import _matrix as _positions
from pixnet_sd.io._matrix import open_positions, placed_bins


def barcode(number: int) -> str:
    return f"s_{'x' * (number % 3)}{number}-1"  # of different lengths


def write_matrix(path: Path, numbers: Sequence[int], *, variable_length: bool = False) -> None:
    names = [barcode(number) for number in numbers]
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = names if variable_length else np.array([name.encode() for name in names], dtype="S12")
        group["data"] = np.arange(len(names), dtype=np.int32)
        group["indices"] = np.zeros(len(names), dtype=np.int64)
        group["indptr"] = np.arange(len(names) + 1)
        group["shape"] = np.array([3, len(names)], dtype=np.int32)
        group.create_group("features")


def write_positions(path: Path, numbers: Sequence[int]) -> None:
    values = np.array(numbers, dtype=np.int64)
    columns = {
        "barcode": [barcode(number) for number in numbers],
        "in_tissue": np.ones(len(values), np.int64),
        "array_row": values * 2,
        "array_col": values * 3,
        "pxl_row_in_fullres": values * 0.5,
        "pxl_col_in_fullres": values * 0.25,
    }
    pq.write_table(pa.table(columns), path)


@st.composite
def subset_of_places(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Numbers of the rows of a matrix, and of the places, in any order or both sorted."""
    places = draw(st.lists(st.integers(0, 60), min_size=1, max_size=30, unique=True))
    rows = draw(st.lists(st.sampled_from(places), min_size=1, unique=True))
    return (sorted(rows), sorted(places)) if draw(st.booleans()) else (rows, places)


@settings(deadline=None, max_examples=30)
@given(numbers=subset_of_places(), piece=st.integers(1, 12), variable_length=st.booleans())
def test_every_row_gets_its_place(
    tmp_path_factory: pytest.TempPathFactory, numbers: tuple[list[int], list[int]], piece: int, variable_length: bool
) -> None:
    rows, places = numbers
    folder = tmp_path_factory.mktemp("join")
    write_matrix(folder / "m.h5", rows, variable_length=variable_length)
    write_positions(folder / "p.parquet", places)
    with pytest.MonkeyPatch.context() as patch, open_matrix(folder / "m.h5") as matrix:
        patch.setattr(_positions, "PIECE_ROWS", piece)
        pieces = list(placed_bins(matrix, folder / "p.parquet"))
    assert [name for part in pieces for name in part.barcodes.to_pylist()] == [barcode(number) for number in rows]
    np.testing.assert_array_equal(np.concatenate([part.columns["array_col"] for part in pieces]), 3 * np.array(rows))
    centres = np.concatenate([part.centres_px for part in pieces])
    np.testing.assert_array_equal(centres, np.outer(rows, [0.25, 0.5]))


@pytest.mark.parametrize(
    ("rows", "places", "message"),
    [
        ([1, 2, 3], [1, 3], "1 barcodes .* are not in"),
        ([1, 2], [2, 1, 2], "more than once"),
        ([3, 2, 2, 1], [1, 2, 3], "more than once"),
    ],
)
def test_missing_and_repeated_barcodes_are_refused(
    tmp_path: Path, rows: list[int], places: list[int], message: str
) -> None:
    write_matrix(tmp_path / "m.h5", rows)
    write_positions(tmp_path / "p.parquet", places)
    with open_matrix(tmp_path / "m.h5") as matrix, pytest.raises(DataError, match=message):
        list(placed_bins(matrix, tmp_path / "p.parquet"))


def test_other_columns_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"barcode": ["a"], "x": [1]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="has the columns barcode, x instead"):
        open_positions(tmp_path / "p.parquet")


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=40), entries=st.integers(1, 12), rows=st.integers(1, 9))
def test_pieces_of_a_matrix_cover_it_and_are_small(sizes: list[int], entries: int, rows: int) -> None:
    matrix = _matrix.CountMatrix(Path("m.h5"), {}, np.concatenate([[0], np.cumsum(sizes)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_matrix, "PIECE_ENTRIES", entries)
        patch.setattr(_matrix, "PIECE_ROWS", rows)
        pieces = list(matrix.pieces())
    assert [row for piece in pieces for row in range(*piece)] == list(range(len(sizes)))
    assert all(stop - start <= rows for start, stop in pieces)
    assert all(sum(sizes[start:stop]) <= entries or stop == start + 1 for start, stop in pieces)


def test_damaged_matrices_are_refused(tmp_path: Path) -> None:
    write_matrix(tmp_path / "m.h5", [1, 2])
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        del file["matrix/data"]
        file["matrix/data"] = np.zeros(1, np.int32)
    with pytest.raises(DataError, match="damaged"), open_matrix(tmp_path / "m.h5"):
        pass
    write_matrix(tmp_path / "empty.h5", [])
    with pytest.raises(DataError, match="holds no row"), open_matrix(tmp_path / "empty.h5"):
        pass
    with h5py.File(tmp_path / "other.h5", "w"):
        pass
    with pytest.raises(DataError, match="no count matrix"), open_matrix(tmp_path / "other.h5"):
        pass
