"""The slide: which image at which resolution, tiles and tissue of it, and what its content is."""

from __future__ import annotations

from ._content import PixelContent, check_on_disk, check_same_pixels, ids_sha256, pixel_content, regions_sha256
from ._find import find_mpp, other_slides, select_coordinate_system, select_image, size_of_bins
from ._slide import Slide, open_slide, read_picture, slide_at, tissue_mask

__all__ = [
    "PixelContent",
    "Slide",
    "check_on_disk",
    "check_same_pixels",
    "find_mpp",
    "ids_sha256",
    "open_slide",
    "other_slides",
    "pixel_content",
    "read_picture",
    "regions_sha256",
    "select_coordinate_system",
    "select_image",
    "size_of_bins",
    "slide_at",
    "tissue_mask",
]
