"""From SpatialData to slides: which image at which resolution, tiles of it, regions in pixels, measured expression."""

from __future__ import annotations

from ._bins import BinLattice, bin_lattice
from ._checks import check_regions_on_image
from ._content import PixelContent, check_same_pixels, ids_sha256, pixel_content, regions_sha256
from ._count_cache import content_key
from ._count_checks import checked_blocks, checked_totals
from ._counts import Counts
from ._genes import Genes, genes_of
from ._ids import check_instances
from ._image import ImageLevel, ImagePyramid
from ._measured import Measured, counts_of, measured
from ._mpp import find_mpp
from ._normalise import log_normalise
from ._on_disk import check_on_disk
from ._open_store import open_store
from ._picture import read_picture
from ._regions import regions_of
from ._select import select_image
from ._select_tables import measured_regions, measured_tables, select_tables
from ._slide import MAP_STRIDE, Slide, open_slide, slide_at
from ._stored_table import StoredTable, Table, obs_column, tables_of
from ._stored_targets import StoredTargets
from ._system import select_coordinate_system
from ._tables import TableLink, table_link
from ._targets import Targets, check_genes, choose_genes, targets_of
from ._tissue import tissue_mask
from ._transform import affine_matrix, similarity_scale

__all__ = [
    "MAP_STRIDE",
    "BinLattice",
    "Counts",
    "Genes",
    "ImageLevel",
    "ImagePyramid",
    "Measured",
    "PixelContent",
    "Slide",
    "StoredTable",
    "StoredTargets",
    "Table",
    "TableLink",
    "Targets",
    "affine_matrix",
    "bin_lattice",
    "check_genes",
    "check_instances",
    "check_on_disk",
    "check_regions_on_image",
    "check_same_pixels",
    "checked_blocks",
    "checked_totals",
    "choose_genes",
    "content_key",
    "counts_of",
    "find_mpp",
    "genes_of",
    "ids_sha256",
    "log_normalise",
    "measured",
    "measured_regions",
    "measured_tables",
    "obs_column",
    "open_slide",
    "open_store",
    "pixel_content",
    "read_picture",
    "regions_of",
    "regions_sha256",
    "select_coordinate_system",
    "select_image",
    "select_tables",
    "similarity_scale",
    "slide_at",
    "table_link",
    "tables_of",
    "targets_of",
    "tissue_mask",
]
