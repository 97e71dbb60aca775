"""Whether what a call asks for fits the machine, told with the number before anything of it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pixnet_sd._errors import PixNetError, ResolutionError
from pixnet_sd.nn.grid import STRIDES
from pixnet_sd.slide import MAP_STRIDE, Slide
from pixnet_sd.store import available_memory, size_text

if TYPE_CHECKING:
    import torch

    from pixnet_sd.nn.model import DecoderConfig

__all__ = ["check_batch", "check_decoder", "check_map_um", "check_regions", "check_working_size", "values_per_px"]

_MOST_REGIONS = 2**32
_REGION_BYTES = 24  # row and column while they are listed
_MASKS = 3  # of the map's size: tissue, and what regions need on it and off it
_TRAINED = 4  # a weight, its gradient, and the optimizer's two means
_LEAST_BLOCK_PX = 32


def check_working_size(slide: Slide) -> None:
    """Refuse a slide that at its working resolution is next to nothing, or more than memory holds a mask of.

    Raises
    ------
    ResolutionError
        With the size it would have.
    """
    rows, cols = (px * slide.mpp / slide.working_mpp for px in (slide.height_px, slide.width_px))
    needed, available = _MASKS * rows * cols / MAP_STRIDE**2, available_memory()
    if max(rows, cols) >= STRIDES[-1] and needed <= available:
        return
    why = (
        f"{_size(needed)} of memory are needed for its masks alone, and {size_text(available)} are free"
        if needed > available
        else f"the network needs {STRIDES[-1]}"
    )
    raise ResolutionError(
        f"working_mpp={slide.working_mpp:g} with mpp={slide.mpp:g}: the slide of {slide.height_px} x "
        f"{slide.width_px} pixels would have {rows:.3g} x {cols:.3g} working pixels, and {why}. Correct one of the two."
    )


def _size(n_bytes: float) -> str:
    """A size that may be beyond every unit."""
    return size_text(int(n_bytes)) if n_bytes < 2**60 else f"{n_bytes:.2g} bytes"


def check_decoder(channels: Sequence[int], config: DecoderConfig, decoder_width: int, device: torch.device) -> None:
    """Refuse a decoder whose weights do not fit, by counting those of one that has no memory.

    Raises
    ------
    PixNetError
        With what it would take.
    """
    import torch

    from pixnet_sd.nn.decoder import Decoder

    with torch.device("meta"):
        decoder = Decoder(channels, config.widths, config.hidden)
    needed = 4 * _TRAINED * sum(math.prod(weight.shape) for weight in decoder.parameters())
    if needed > (available := _memory(device)):
        raise PixNetError(
            f"decoder_width={decoder_width}: training its weights takes {_size(needed)} of memory, and "
            f"{size_text(available)} are there. Give a smaller one."
        )


def values_per_px(channels: Sequence[int], config: DecoderConfig) -> float:
    """Values that a network holds at once for a working pixel, at the least: its pyramid and its decoder."""
    widths = channels if config.widths is None else config.widths
    hidden = (*config.hidden, 0)
    return sum((c + w + h) / s**2 for c, w, h, s in zip(channels, widths, hidden, STRIDES, strict=True))


def check_batch(
    sides_px: Iterable[tuple[float, float]], batch_size: int, tile_px: int, values: float, device: torch.device
) -> None:
    """Refuse a batch of which one forward pass does not fit.

    Parameters
    ----------
    sides_px
        Rows and columns of a tile, on each slide.
    batch_size, tile_px
        As given, for the message.
    values
        Of `values_per_px`.
    device
        Where it runs.

    Raises
    ------
    PixNetError
        With what it would take.
    """
    n_px = max(rows * cols for rows, cols in sides_px) * batch_size
    needed = n_px * values * (2 if device.type == "cuda" else 4)
    if needed > (available := _memory(device)):
        raise PixNetError(
            f"tile_px={tile_px} and batch_size={batch_size}: one step takes at least {_size(needed)} of memory, "
            f"and {size_text(available)} are there. Give smaller ones."
        )


def _memory(device: torch.device) -> int:
    import torch  # plots check the slide alone, and load none

    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else available_memory()


def check_map_um(map_um: float, factor: int, slide: Slide, n_values: int) -> None:
    """Refuse map pixels larger than the slide, or so large that memory does not hold the part that is averaged at once.

    Parameters
    ----------
    map_um
        As given.
    factor
        Native map pixels per pixel of the map.
    slide
        The slide.
    n_values
        Values of a native map pixel.

    Raises
    ------
    PixNetError
        With the largest that can be had.
    """
    native, (height, width) = MAP_STRIDE * slide.working_mpp, slide.map_shape
    available = available_memory()
    side = _LEAST_BLOCK_PX * factor
    needed = 4 * n_values * min(side, height) * min(side, width)
    if factor > max(height, width):
        most, why = max(height, width), f"the slide is {height * native:.0f} x {width * native:.0f} µm"
    elif factor > 1 and needed > available:
        most = max(1, int(math.sqrt(available / (4 * n_values))) // _LEAST_BLOCK_PX)
        why = f"what is averaged at once takes {size_text(needed)} of memory, and {size_text(available)} are free"
    else:
        return
    raise PixNetError(f"map_um={map_um:g}: {why}. Give map_um={most * native:g} at most.")


def check_regions(argument: str, pitch_um: float, slide: Slide, tissue: NDArray[np.bool_]) -> None:
    """Refuse a grid of more regions than can be counted or listed.

    Parameters
    ----------
    argument
        What decides about the pitch, with its value.
    pitch_um
        Of the grid.
    slide, tissue
        Where they lie.

    Raises
    ------
    PixNetError
        With how many there would be.
    """
    height, width = slide.working_shape
    squares = (height * slide.working_mpp / pitch_um) * (width * slide.working_mpp / pitch_um)
    n = squares * float(tissue.mean())
    needed, available = squares + _REGION_BYTES * n, available_memory()
    if n > _MOST_REGIONS or needed > available:
        raise PixNetError(
            f"{argument}: these are about {n:.2g} regions, which take {_size(needed)} of memory to list, and "
            f"{size_text(available)} are free; {_MOST_REGIONS:,} is the most. Give a larger one."
        )
