"""Whether a prediction still belongs to the image and the regions that are there now."""

from __future__ import annotations

from typing import Any

from spatialdata import SpatialData

from pixnet_sd._errors import DataError
from pixnet_sd._fingerprint import differing_parts
from pixnet_sd._logging import logger
from pixnet_sd.slide import Table, slide_at

from ._pixels import pixels_of
from ._region_request import placed_regions, region_parts

__all__ = ["check_current"]

_WHAT = {"pixels": "the pixels of the image", "regions": "the outlines of the regions", "ids": "the ids of the regions"}


def check_current(sdata: SpatialData, key: str, predicted: Table) -> None:
    """Refuse a predicted table when the image was corrected, or its regions were drawn anew, since.

    Parameters
    ----------
    sdata
        Object with the image and the regions.
    key
        Name of the table, for messages.
    predicted
        The table.

    Raises
    ------
    DataError
        When what it was predicted from is not what is there.
    """
    about: dict[str, Any] = predicted.uns["pixnet_sd"]
    before = about.get("depends_on")
    if not before or about["image"] not in sdata.images:
        missing = f"image {about['image']!r} is not in the object" if before else "it does not say what it depends on"
        logger.warning("whether table %r still fits the slide cannot be checked: %s", key, missing)
        return
    slide = slide_at(
        sdata,
        image_key=about["image"],
        coordinate_system=about["coordinate_system"],
        mpp=float(about["mpp"]),
        working_mpp=float(about["working_mpp"]),
    )
    now: dict[str, Any] = {"pixels": pixels_of(sdata, slide).sha256}
    if "regions" in before:
        now |= region_parts(*placed_regions(sdata, slide, predicted.uns["spatialdata_attrs"]["region"]))
    changed = differing_parts(dict(before), now)
    if changed:
        raise DataError(
            f"Table {key!r} is not of what is there now: since it was predicted {' and '.join(map(_named, changed))} "
            "changed. Predict again, with overwrite=True."
        )


def _named(part: str) -> str:
    return _WHAT.get(part, part)
