"""Shapes of any number of regions, written chunk by chunk into a scratch store.

spatialdata writes the shape of one region; its parquet file is then replaced by one of the same schema with all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._commit import Staged, write_scratch_store
from ._disk import explain_disk_errors
from ._rows import Describe, RowInfo
from ._table_writer import batches

if TYPE_CHECKING:
    import geopandas as gpd
    import pyarrow as pa
    from numpy.typing import NDArray

__all__ = ["MakeShapes", "memory_shapes", "write_shapes"]

MakeShapes = Callable[..., "gpd.GeoDataFrame"]
"""`circles_element` or `squares_element` with everything given but the centres and ``index``."""

GROUP_ROWS = 2**16

_GEO = b"geo"


def memory_shapes(describe: Describe, keep: NDArray[np.bool_], make: MakeShapes) -> gpd.GeoDataFrame:
    """The whole element at once; arguments as in `write_shapes`."""
    return _made(make, _described(describe, keep, 0, len(keep)))


def write_shapes(path: Path, name: str, describe: Describe, keep: NDArray[np.bool_], make: MakeShapes) -> Staged:
    """Write the shapes of the regions that ``keep`` says, in their order.

    Parameters
    ----------
    path
        Scratch store to make; must not be there.
    name
        Of the element.
    describe
        Ids and centres by range of regions.
    keep
        (n,) which regions, at least one.
    make
        Makes the element of a few regions (`MakeShapes`).

    Returns
    -------
    The element, complete with metadata, ready for `commit`.

    Raises
    ------
    StoreError
        When the disk is full.
    """
    import pyarrow.parquet as pq

    first = int(np.argmax(keep))
    with explain_disk_errors("Writing the shapes", path.parent):
        (staged,) = write_scratch_store(path, {name: _made(make, _described(describe, keep, first, first + 1))})
        file = path / "shapes" / name / "shapes.parquet"
        schema = pq.read_schema(file)
        geo = json.loads(schema.metadata[_GEO])
        geo["columns"][geo["primary_column"]]["bbox"] = _bounds(describe, keep, make)
        schema = schema.with_metadata({**schema.metadata, _GEO: json.dumps(geo).encode()})
        with pq.ParquetWriter(file, schema) as writer:
            for pieces in batches(keep, GROUP_ROWS):
                info = RowInfo.joined([_described(describe, keep, *piece) for piece in pieces])
                writer.write_table(_arrow(_made(make, info), schema, geo))
    return staged


def _described(describe: Describe, keep: NDArray[np.bool_], start: int, stop: int) -> RowInfo:
    return describe(start, stop, None).subset(keep[start:stop])


def _made(make: MakeShapes, info: RowInfo) -> gpd.GeoDataFrame:
    return make(info.centres_px, index=info.ids)


def _arrow(frame: gpd.GeoDataFrame, schema: pa.Schema, geo: dict[str, Any]) -> pa.Table:
    """A chunk in the encoding that spatialdata chose for the element."""
    import pyarrow as pa

    encoding = geo["columns"][geo["primary_column"]]["encoding"]
    kind = "WKB" if encoding == "WKB" else "geoarrow"
    table = pa.table(frame.to_arrow(index=True, geometry_encoding=kind, interleaved=False))
    return table.rename_columns(schema.names).cast(schema)


def _bounds(describe: Describe, keep: NDArray[np.bool_], make: MakeShapes) -> list[float]:
    """Box around all shapes: they are of one size, so those furthest out by their centres tell."""
    outermost = [
        info.subset(np.isin(np.arange(len(xy)), [*xy.argmin(axis=0), *xy.argmax(axis=0)]))
        for pieces in batches(keep, GROUP_ROWS)
        for info in (RowInfo.joined([_described(describe, keep, *piece) for piece in pieces]),)
        for xy in (info.centres_px,)
    ]
    return [float(side) for side in _made(make, RowInfo.joined(outermost)).total_bounds]
