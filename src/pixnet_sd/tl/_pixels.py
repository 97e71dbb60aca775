"""Pixels of a slide as part of what an answer depends on."""

from __future__ import annotations

from typing import Any

from spatialdata import SpatialData

from pixnet_sd.slide import PixelContent, Slide, pixel_content
from pixnet_sd.store import stored_note

__all__ = ["pixels_of", "slide_parts"]


def pixels_of(sdata: SpatialData, slide: Slide) -> PixelContent:
    """Hash the pixels of a slide, or take the hash that was noted in the object for files that have not changed."""
    return pixel_content(slide, stored_note(sdata, "content", slide.image_key))


def slide_parts(slide: Slide, pixels: PixelContent) -> dict[str, Any]:
    """Parts of a slide that the network reads: pixels, and the resolution at which they are read."""
    return {
        "pixels": pixels.sha256,
        "size_px": [slide.height_px, slide.width_px],
        "mpp": slide.mpp,
        "working_mpp": slide.working_mpp,
    }
