"""Count matrices in the HDF5 format of Space Ranger, written a few rows at a time."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ._expression import Panel

if TYPE_CHECKING:
    import h5py

__all__ = ["MatrixFile"]

_CHUNK = 1 << 16


class MatrixFile:
    """``filtered_feature_bc_matrix.h5``: a context in which rows are appended; read by ``scanpy.read_10x_h5``.

    Beside what Space Ranger writes, its features have ``spatially_varying``, which scanpy puts into ``var``.
    """

    def __init__(self, path: Path, panel: Panel, library_id: str) -> None:
        import h5py

        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = h5py.File(path, "w")
        self._file.attrs.update(
            {"filetype": "matrix", "version": 2, "chemistry_description": "drawn", "software_version": "pixnet_sd"}
        )
        self._file.attrs["library_ids"] = np.array([library_id.encode() or b"drawn"])
        self._n_genes = len(panel.names)
        self._matrix = self._file.create_group("matrix")
        self._write_features(panel)
        self._data = self._growing("data", "i4")
        self._indices = self._growing("indices", "i8")
        self._indptr = self._growing("indptr", "i8")
        self._barcodes: h5py.Dataset | None = None
        _append(self._indptr, np.zeros(1, dtype=np.int64))

    def append(self, barcodes: NDArray[np.bytes_], counts: sp.csr_matrix) -> None:
        """Write rows, (n, genes)."""
        if not counts.has_sorted_indices:
            counts = counts.sorted_indices()
        if self._barcodes is None:
            self._barcodes = self._growing("barcodes", barcodes.dtype)
        start = len(self._data)
        _append(self._barcodes, barcodes)
        _append(self._data, counts.data.astype(np.int32))
        _append(self._indices, counts.indices.astype(np.int64))
        _append(self._indptr, counts.indptr[1:].astype(np.int64) + start)

    def close(self) -> None:
        """Write the shape and close the file."""
        if self._barcodes is None:
            self._barcodes = self._growing("barcodes", "S1")
        self._matrix["shape"] = np.array([self._n_genes, len(self._barcodes)], dtype=np.int32)
        self._file.close()

    def __enter__(self) -> MatrixFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write_features(self, panel: Panel) -> None:
        features = self._matrix.create_group("features")
        columns = panel.var
        features["name"] = np.array(panel.names, dtype="S")
        features["id"] = np.array(columns["gene_ids"], dtype="S")
        features["feature_type"] = np.array(columns["feature_types"], dtype="S")
        features["genome"] = np.array(columns["genome"], dtype="S")
        features["spatially_varying"] = panel.varying
        features["_all_tag_keys"] = np.array([b"genome"])

    def _growing(self, name: str, dtype: Any) -> h5py.Dataset:
        return self._matrix.create_dataset(
            name,
            (0,),
            maxshape=(None,),
            dtype=dtype,
            chunks=(_CHUNK,),
            compression="gzip",
            compression_opts=1,
            shuffle=True,
        )


def _append(dataset: h5py.Dataset, values: NDArray[Any]) -> None:
    start = len(dataset)
    dataset.resize((start + len(values),))
    dataset[start:] = values
