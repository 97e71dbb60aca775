"""Writing results: files of a store, notes, commits, sums and tables of regions."""

from __future__ import annotations

from pixnet_sd._notes import memory_note as recorded

from ._disk import (
    DISK_MARGIN,
    Partial,
    available_memory,
    hold_lock,
    local_store,
    plain_files,
    read_json,
    size_text,
    work_folder,
)
from ._notes import WRITTEN, attach_written, element_stamp, image_stamp, record, written_by
from ._regions import RegionWriter, estimate_table_bytes
from ._stream import Staged, TableArrays, chunks_as_given, consolidate, stretch, write_scratch_store, write_shapes
from ._sums import FileSums, MemorySums
from ._tables import (
    Express,
    Expressed,
    MakeShapes,
    RowInfo,
    circles_element,
    expression,
    region_table,
    spatial_library,
    squares_element,
    thumbnail,
)
from ._transaction import Transaction, recover

__all__ = [
    "DISK_MARGIN",
    "WRITTEN",
    "Express",
    "Expressed",
    "FileSums",
    "MakeShapes",
    "MemorySums",
    "Partial",
    "RegionWriter",
    "RowInfo",
    "Staged",
    "TableArrays",
    "Transaction",
    "attach_written",
    "available_memory",
    "chunks_as_given",
    "circles_element",
    "consolidate",
    "element_stamp",
    "estimate_table_bytes",
    "expression",
    "hold_lock",
    "image_stamp",
    "local_store",
    "plain_files",
    "read_json",
    "record",
    "recorded",
    "recover",
    "region_table",
    "size_text",
    "spatial_library",
    "squares_element",
    "stretch",
    "thumbnail",
    "work_folder",
    "write_scratch_store",
    "write_shapes",
    "written_by",
]
