"""Which channels of an image are red, green and blue, by their names and, where these do not say, by its pixels."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from pixnet_sd._errors import DataError
from pixnet_sd._logging import logger
from pixnet_sd._warn import warn

__all__ = ["Naming", "naming_of", "rgb_channels", "shown_names"]

Naming = Literal["rgb", "numbered", "stains", "unknown", "other"]
"""What channel names say: colours, nothing, stains or markers, something else, or that there are not three channels."""

_COLOURS = {"r": 0, "red": 0, "g": 1, "green": 1, "b": 2, "blue": 2, "a": 3, "alpha": 3}
_NUMBERED = re.compile(r"(c|ch|chan|channel|band|image|sample)?[\s_:=-]*(0[\s_:-]+)?(?P<number>\d)", re.IGNORECASE)
_STAINS = re.compile(
    r"dapi.*|hoechst.*|draq.*|sytox.*|syto.*|dna\d*|nuclei|nucleus|nuclear|membrane|autofluor.*|af\d{3}.*|alexa.*|"
    r"[rgbycm]fp|egfp|mcherry|tdtomato|fitc|tritc|rhodamine.*|texas.?red|cy\d(\.\d)?|pe|apc|opal.*|atto.*|"
    r"cd\d+\w*|pan-?(ck|cyto\w*)|ck\d*|cytokeratin.*|e-?cad\w*|vimentin|[\w-]*sma|18s.*|ki-?67|foxp3|pd-?l?1|her2|"
    r"collagen.*|boundary.*|rna|polyt|gfap|neun|iba1|map2",
    re.IGNORECASE,
)
_REMEDY = (
    "If it is the H&E image, parse it with Image2DModel.parse(..., c_coords=['r', 'g', 'b']), in the order in which "
    "red, green and blue are stored; otherwise give image_key= of the H&E image."
)


def naming_of(channels: Sequence[object]) -> Naming:
    """What the names of an image's channels say.

    Only names that are exactly those of colours count as colours: ``GFP`` starts like green and is none.
    """
    if len(channels) not in (3, 4):
        return "other"
    words = [str(name).strip().lower() for name in channels]
    if sorted(_COLOURS.get(word, -1) for word in words) == list(range(len(words))):
        return "rgb"
    numbers = sorted(int(found["number"]) for found in map(_NUMBERED.fullmatch, words) if found)
    if numbers in (list(range(len(words))), list(range(1, len(words) + 1))):
        return "numbered"
    return "stains" if any(_STAINS.fullmatch(word) for word in words) else "unknown"


def rgb_channels(
    channels: Sequence[object], image_key: str, look: Callable[[bool], bool | None] | None = None
) -> tuple[int, int, int]:
    """Positions of red, green and blue among an image's channels.

    Channels that are named red, green and blue are put in that order (``"b", "g", "r"``); numbered ones are taken as
    stored. Three of other names are taken as stored, with a warning, where the pixels look like bright-field, and
    refused otherwise. Of four channels named red, green, blue and alpha the alpha is dropped, without compositing:
    scanners write it fully opaque.

    Parameters
    ----------
    channels
        Channel names in stored order, numbers when the image has none.
    image_key
        Name of the image element, for messages.
    look
        Looks at the pixels, if need be at any cost: True for bright-field, False for dark ground as of fluorescence,
        None if it cannot be told.

    Returns
    -------
    Positions of the red, green and blue channels.

    Raises
    ------
    DataError
        One channel, two, more than four, four that are not RGBA, or three that are no colours.
    """
    naming = naming_of(channels)
    if naming == "rgb":
        _warn_if_dark(look, image_key)
        return _by_colour(channels, image_key)
    if len(channels) != 3:
        raise DataError(
            f"image {image_key!r}: found {len(channels)} channel(s) ({shown_names(channels)}), an RGB H&E image is "
            "needed. Give image_key= of the H&E image, or make an element of its three channels r, g, b "
            "(an RGBA image needs c_coords=['r', 'g', 'b', 'a'] to be known as one)."
        )
    if naming == "stains":
        raise DataError(
            f"image {image_key!r}: its channels {shown_names(channels)} are stains or markers, not colours. {_REMEDY}"
        )
    if naming == "numbered":
        _warn_if_dark(look, image_key)
    elif look is not None:
        _check_unknown(channels, image_key, look(True))
    return 0, 1, 2


def _by_colour(channels: Sequence[object], image_key: str) -> tuple[int, int, int]:
    if len(channels) == 4:
        logger.info("image %r is RGBA: its alpha channel is left out", image_key)
    place = {_COLOURS[str(name).strip().lower()]: position for position, name in enumerate(channels)}
    return place[0], place[1], place[2]


def _warn_if_dark(look: Callable[[bool], bool | None] | None, image_key: str) -> None:
    if look is not None and look(False) is False:
        warn(
            f"image {image_key!r} is dark where an H&E image is bright: it looks like fluorescence. If it is not the "
            "H&E image, give image_key= of that one."
        )


def _check_unknown(channels: Sequence[object], image_key: str, is_bright: bool | None) -> None:
    if not is_bright:
        raise DataError(
            f"image {image_key!r}: its channels {shown_names(channels)} are not named as colours, and its pixels do "
            f"not look like H&E on a bright ground. {_REMEDY}"
        )
    warn(
        f"image {image_key!r}: its channels {shown_names(channels)} are taken as red, green and blue, because its "
        "pixels look like H&E. To be sure of their order, parse it with c_coords=['r', 'g', 'b']."
    )


def shown_names(channels: Sequence[object]) -> str:
    """Channel names for a message, at most six."""
    shown = ", ".join(str(name) for name in channels[:6])
    return shown + ", ..." if len(channels) > 6 else shown
