"""Writing results: checkpoints, the gene map as an image element, regions as shapes and a table."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._commit import check_target, commit
from ._disk import size_text
from ._factors import FactorHead, factor_names, factors_key, head_key, read_head
from ._gene_map import GeneMapReader, GeneMapWriter, estimate_bytes, open_map
from ._memory import available_memory
from ._provenance import record, recorded
from ._raster import image_pyramid, image_transforms, map_key, tissue_labels
from ._region_writer import RegionResults, RegionWriter, estimate_table_bytes
from ._rows import Express, Expressed, MemoryRows, RowInfo, Rows, expression
from ._shapes import circles_element, squares_element
from ._shapes_writer import MakeShapes
from ._table import region_table
from ._thumbnail import thumbnail

if TYPE_CHECKING:
    from ._pixnet import PixNet
    from ._record import ModelRecord, library_versions, link_of, outputs_of

__all__ = [
    "Express",
    "Expressed",
    "FactorHead",
    "GeneMapReader",
    "GeneMapWriter",
    "MakeShapes",
    "MemoryRows",
    "ModelRecord",
    "PixNet",
    "RegionResults",
    "RegionWriter",
    "RowInfo",
    "Rows",
    "available_memory",
    "check_target",
    "circles_element",
    "commit",
    "estimate_bytes",
    "estimate_table_bytes",
    "expression",
    "factor_names",
    "factors_key",
    "head_key",
    "image_pyramid",
    "image_transforms",
    "library_versions",
    "link_of",
    "map_key",
    "open_map",
    "outputs_of",
    "read_head",
    "record",
    "recorded",
    "region_table",
    "size_text",
    "squares_element",
    "thumbnail",
    "tissue_labels",
]

_WITH_TORCH = {
    "PixNet": "_pixnet",
    "ModelRecord": "_record",
    "library_versions": "_record",
    "link_of": "_record",
    "outputs_of": "_record",
}


def __getattr__(name: str) -> Any:
    """What needs torch comes when it is asked for: a store can be written without."""
    if name in _WITH_TORCH:
        return getattr(import_module(f".{_WITH_TORCH[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
