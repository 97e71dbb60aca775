"""Writing results: checkpoints, the gene map as an image element, regions as shapes and a table."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._commit import check_target, commit, recover
from ._disk import hold_lock, size_text
from ._factors import FactorHead, factor_names, factors_key, head_key, read_head
from ._gene_map import GeneMapReader, GeneMapWriter, check_not_rewritten, estimate_bytes, is_as_written, open_map
from ._memory import available_memory
from ._provenance import record, recorded, stored_note
from ._raster import image_pyramid, image_transforms, map_key, tissue_labels
from ._region_writer import RegionResults, RegionWriter, estimate_table_bytes
from ._rows import Express, Expressed, MemoryRows, RowInfo, Rows, expression
from ._shapes import circles_element, squares_element
from ._shapes_writer import MakeShapes
from ._table import region_table
from ._thumbnail import thumbnail
from ._written import attach_written, written_by

if TYPE_CHECKING:
    from ._checksums import CHECKSUMS
    from ._pixnet import PixNet
    from ._record import ModelRecord, library_versions, link_of, outputs_of, read_record

__all__ = [
    "CHECKSUMS",
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
    "attach_written",
    "available_memory",
    "check_not_rewritten",
    "check_target",
    "circles_element",
    "commit",
    "estimate_bytes",
    "estimate_table_bytes",
    "expression",
    "factor_names",
    "factors_key",
    "head_key",
    "hold_lock",
    "image_pyramid",
    "image_transforms",
    "is_as_written",
    "library_versions",
    "link_of",
    "map_key",
    "open_map",
    "outputs_of",
    "read_head",
    "read_record",
    "record",
    "recorded",
    "recover",
    "region_table",
    "size_text",
    "squares_element",
    "stored_note",
    "thumbnail",
    "tissue_labels",
    "written_by",
]

_LATER = {
    "CHECKSUMS": "_checksums",
    "PixNet": "_pixnet",
    "ModelRecord": "_record",
    "library_versions": "_record",
    "link_of": "_record",
    "outputs_of": "_record",
    "read_record": "_record",
}


def __getattr__(name: str) -> Any:
    """What needs torch or pydantic comes when it is asked for: a store can be written without."""
    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
