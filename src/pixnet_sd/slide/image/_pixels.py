"""What pixels and channel names of an image say: bright-field or not, which channels are colours, 8 bits or not.

An image that is not RGB uint8 is refused with the lines that convert it: a guess would change colours silently.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from dask.array import Array as DaskArray
from numpy.typing import NDArray
from spatialdata import get_pyramid_levels
from xarray import DataArray, DataTree

from pixnet_sd._util import logger, warn
from pixnet_sd.errors import DataError

from ._arrays import computed, loaded_px

HUGE_BLOCK_PX = 64e6  # blocks of more pixels are slow to load for one tile
_WHOLE_PX = 2**20  # a level of so many pixels is read whole
_WINDOW_PX, _WINDOWS = 128, 6  # of a larger one, windows spread over it, so many along each side
_BRIGHT, _WHITE, _DARK = 90.0, 110.0, 80.0  # of 255
_ENOUGH = 2**16  # pixels that tell
_SEEN = 0.001  # share of pixels that are not black, below which nothing can be told
_MOST_KEPT = 8
_kept: dict[str, NDArray[Any]] = {}  # samples by the name that dask gives to what is computed


def levels_of(element: DataArray | DataTree) -> list[DataArray]:
    """Levels of an image, finest first."""
    levels = [element] if isinstance(element, DataArray) else list(get_pyramid_levels(element))
    return sorted(levels, key=lambda level: -level.sizes["y"] * level.sizes["x"])


def channel_names(level: DataArray) -> list[object]:
    """Names of an image's channels in stored order; their numbers where it has none."""
    return level.coords["c"].values.tolist() if "c" in level.coords else list(range(level.sizes["c"]))


def coarsest(element: DataArray | DataTree, at_least_px: int = 1) -> DataArray:
    """The coarsest level whose shorter side has so many pixels, or the finest."""
    levels = levels_of(element)
    large = (level for level in reversed(levels) if min(level.sizes["y"], level.sizes["x"]) >= at_least_px)
    return next(large, levels[0])


def pixel_sample(element: DataArray | DataTree) -> NDArray[Any]:
    """Pixels from all over the coarsest level, (channels, n); kept where computing them takes a whole finer level."""
    level = coarsest(element).transpose("c", "y", "x")
    name = level.data.name if isinstance(level.data, DaskArray) else "array"
    if name in _kept:
        return _kept[name]
    n_channels, *size = level.shape
    if size[0] * size[1] <= _WHOLE_PX:
        sample = computed(level.data).reshape(n_channels, -1)
    else:
        tops, lefts = (np.unique(np.linspace(0, max(0, n - _WINDOW_PX), _WINDOWS).astype(int)).tolist() for n in size)
        windows = [level.data[:, top : top + _WINDOW_PX, left : left + _WINDOW_PX] for top in tops for left in lefts]
        sample = np.concatenate([computed(window).reshape(n_channels, -1) for window in windows], axis=1)
    if not name.startswith(("from-zarr", "array")):
        while len(_kept) >= _MOST_KEPT:
            _kept.pop(next(iter(_kept)))
        _kept[name] = sample
    return sample


def is_cheap_to_look_at(level: DataArray) -> bool:
    """Whether a few pixels of a level can be had without loading one huge block."""
    return loaded_px(level.data) <= HUGE_BLOCK_PX


def is_bright_field(element: DataArray | DataTree, at_any_cost: bool = False) -> bool | None:
    """Whether an image shows tissue on a bright ground (True) or a dark one (False); None for neither.

    None also where only loading a huge block would tell, which is done ``at_any_cost``.
    """
    if not at_any_cost and not is_cheap_to_look_at(levels_of(element)[-1]):
        return None
    sample = pixel_sample(element)
    pixels = sample[:3, :: max(1, sample.shape[1] // _ENOUGH)].astype(np.float32)
    if sample.dtype != np.uint8:
        pixels = np.nan_to_num(pixels, nan=0.0, posinf=np.inf, neginf=0.0)
        finite = pixels[np.isfinite(pixels)]
        top = float(np.percentile(finite, 99.9)) if finite.size else 0.0
        pixels = np.clip(pixels * (255 / top), 0, 255) if top > 0 else np.zeros_like(pixels)
    seen = pixels[:, pixels.max(axis=0) > 0]  # black is what was not scanned
    if not seen.shape[1] or seen.shape[1] < _SEEN * pixels.shape[1]:
        return None
    if np.median(seen.max(axis=0)) < _DARK:
        return False
    is_bright = np.median(seen.mean(axis=0)) >= _BRIGHT and np.percentile(seen.min(axis=0), 95) >= _WHITE
    return True if is_bright else None


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
    """What channel names say; only exactly those of colours count as colours: ``GFP`` starts like green and is none."""
    if len(channels) not in (3, 4):
        return "other"
    words = [str(name).strip().lower() for name in channels]
    if sorted(_COLOURS.get(word, -1) for word in words) == list(range(len(words))):
        return "rgb"
    numbers = sorted(int(match["number"]) for match in map(_NUMBERED.fullmatch, words) if match)
    if numbers in (list(range(len(words))), list(range(1, len(words) + 1))):
        return "numbered"
    return "stains" if any(_STAINS.fullmatch(word) for word in words) else "unknown"


class Looks(NamedTuple):
    """What speaks for an image being H&E: its channel names, and pixels that are bright-field, dark, or neither."""

    naming: Naming
    is_bright: bool | None

    @classmethod
    def of(cls, element: DataArray | DataTree) -> Looks:
        """Look at channel names and, where they leave it open, at pixels."""
        finest = levels_of(element)[0]
        naming = naming_of(channel_names(finest)) if finest.dims == ("c", "y", "x") else "other"
        return cls(naming, None if naming in ("other", "stains") else is_bright_field(element))

    @property
    def is_rgb(self) -> bool:
        """Whether channels are named as colours or not at all."""
        return self.naming in ("rgb", "numbered")

    @property
    def rank(self) -> int:
        """0 for what looks like H&E, then what is named so, then three or four other channels, then anything else."""
        if self.is_bright is not False and (self.is_rgb or (self.naming == "unknown" and self.is_bright)):
            return 0
        return 1 if self.is_rgb else 3 if self.naming in ("other", "stains") else 2

    def describe(self) -> str:
        """In words, for a message."""
        named = {"stains": "channels named as stains", "unknown": "channels not named as colours"}.get(self.naming)
        looks = {True: "bright as H&E", False: "dark as fluorescence", None: ""}[self.is_bright]
        return ", ".join(filter(None, (named, looks)))


def rgb_channels(element: DataArray | DataTree, image_key: str) -> tuple[int, int, int]:
    """Positions of red, green and blue by channels' names; by others, in stored order, of a bright-field image."""
    channels = channel_names(levels_of(element)[0])
    naming = naming_of(channels)
    shown = ", ".join(map(str, channels[:6])) + (", ..." if len(channels) > 6 else "")
    if len(channels) != 3 and naming != "rgb":
        raise DataError(
            f"image {image_key!r}: found {len(channels)} channel(s) ({shown}), an RGB H&E image is needed. Give "
            "image_key= of the H&E image, or make an element of its three channels r, g, b (an RGBA image needs "
            "c_coords=['r', 'g', 'b', 'a'] to be known as one)."
        )
    if naming == "stains":
        raise DataError(f"image {image_key!r}: its channels {shown} are stains or markers, not colours. {_REMEDY}")
    if naming == "unknown":
        if not is_bright_field(element, at_any_cost=True):
            raise DataError(
                f"image {image_key!r}: its channels {shown} are not named as colours, and its pixels do not look like "
                f"H&E on a bright ground. {_REMEDY}"
            )
        warn(
            f"image {image_key!r}: its channels {shown} are taken as red, green and blue, because its pixels look like "
            "H&E. To be sure of their order, parse it with c_coords=['r', 'g', 'b']."
        )
    elif is_bright_field(element) is False:
        warn(
            f"image {image_key!r} is dark where an H&E image is bright: it looks like fluorescence. If it is not the "
            "H&E image, give image_key= of that one."
        )
    if naming != "rgb":
        return 0, 1, 2
    if len(channels) == 4:
        logger.info("image %r is RGBA: its alpha channel, which scanners write opaque, is left out", image_key)
    place = {_COLOURS[str(name).strip().lower()]: position for position, name in enumerate(channels)}
    return place[0], place[1], place[2]


_WHITE_POINTS = (1, 255, 1023, 4095, 16383, 65535)  # the first not of whole numbers
_LOW, _HIGH = 0.1, 99.9  # percentiles: what lies beyond is hot pixels
_FEW = 0.02  # of the range: so little below 0 is noise around black
_ROOM = 0.05  # above what was seen, for what was not
_HOT = 1.25  # how far the highest value may lie above the percentile and still be the image's own


def check_uint8(element: DataArray | DataTree, image_key: str) -> None:
    """Refuse pixels that are not ``uint8``, with lines that convert the range found in a sample of them."""
    finest = levels_of(element)[0]
    dtype = finest.dtype
    if dtype == np.uint8:
        return
    values = pixel_sample(finest if is_cheap_to_look_at(finest) else element)
    is_finite = np.isfinite(values)
    finite = values[is_finite].astype(np.float64) if is_finite.any() else np.zeros(1)
    black, white = _black_and_white(finite, is_whole=bool(np.issubdtype(dtype, np.integer)))
    image = f"sdata[{image_key!r}]" + ("" if isinstance(element, DataArray) else "['scale0'].image")
    new_key = repr(f"{image_key}_uint8")
    missing = "" if is_finite.all() else f".fillna({white:.9g})"  # not scanned: white, as glass is
    pixels = f"image.astype('float32'){missing}.data"
    if black:
        pixels = f"({pixels} + {-black:.9g})"
    raise DataError(
        f"image {image_key!r} has {dtype} pixels ({finite.min():g} to {finite.max():g} in a sample), 0-255 uint8 are "
        f"needed. Convert it with these lines and give image_key={new_key}:\n"
        "import spatialdata as sd\n"
        f"image = {image}\n"
        f"sdata[{new_key}] = sd.models.Image2DModel.parse(\n"
        f"    ({pixels}.clip(0, {white - black:.9g}) * {255 / (white - black)!r}).round().astype('uint8'),\n"
        "    c_coords=image.c.values, scale_factors=[2, 2, 2],\n"
        f"    transformations=sd.transformations.get_transformation(sdata[{image_key!r}], get_all=True))\n"
        f"# if the object is backed: sdata.write_element({new_key})"
    )


def _black_and_white(values: NDArray[np.float64], *, is_whole: bool) -> tuple[float, float]:
    """Values that become 0 and 255: of a bit depth where values come near its white, else of what was seen."""
    low, high = np.percentile(values, (_LOW, _HIGH))
    high = values.max() if values.max() <= high * _HOT else high
    black = 0.0 if low >= -_FEW * (high - low) else max(values.min(), low - (_HOT - 1) * (high - low))
    if black < 0:
        white = high + _ROOM * (high - black)
    else:
        point = next((point for point in _WHITE_POINTS[is_whole:] if high <= point), np.inf)
        white = point if high > point / 2 else high * (1 + _ROOM)
    return float(black), float(white if white > black else black + 1)
