"""Arrays of a full size from arrays of a tiny element.

spatialdata and anndata decide how an element lies on disk: they write a tiny one of the same kind, and its arrays are
then given the full shape. Codecs, names and attributes stay theirs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zarr

from pixnet_sd._errors import StoreError

from ._disk import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zarr.codecs import BloscCodec

__all__ = ["stretch"]


def stretch(path: Path, shape: Sequence[int], chunks: Sequence[int], compressor: BloscCodec | None = None) -> Any:
    """Change shape and chunks of an array, and empty it.

    Parameters
    ----------
    path
        Folder of the array.
    shape, chunks
        Of the full array.
    compressor
        In place of the library's.

    Returns
    -------
    The array, for writing.

    Raises
    ------
    StoreError
        When its chunks or its fill value are of a kind that is not known here.
    """
    shutil.rmtree(path / "c", ignore_errors=True)
    metadata = read_json(path / "zarr.json")
    if metadata["chunk_grid"]["name"] != "regular" or metadata["fill_value"] not in (0, ""):
        raise StoreError(
            f"The installed version of zarr lays {path.name!r} out in a way that pixnet_sd does not know yet. Install "
            "an older one, or predict into an object in memory and write that."
        )
    for codec in metadata["codecs"]:
        if codec["name"] == "sharding_indexed":  # one file a chunk suits us
            metadata["codecs"] = codec["configuration"]["codecs"]
    if compressor is not None:
        plain = [codec for codec in metadata["codecs"] if codec["name"] == "bytes"]
        metadata["codecs"] = [*plain, compressor.to_dict()]
    metadata["shape"] = list(shape)
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = list(chunks)
    write_json(path / "zarr.json", metadata, scratch=path)
    return zarr.open_array(str(path), mode="r+")
