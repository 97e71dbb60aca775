"""What answers depend on, part by part, and whether a call fits the machine, told before anything of it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd._fingerprint import content_sha256
from pixnet_sd._notes import stored_note
from pixnet_sd.errors import PixNetError, ResolutionError
from pixnet_sd.geometry import MAP_STRIDE, STRIDES
from pixnet_sd.model import ModelRecord, PixNet, hash_weights
from pixnet_sd.slide import PixelContent, Slide, pixel_content
from pixnet_sd.store import available_memory, size_text

if TYPE_CHECKING:
    import torch

    from pixnet_sd.model import DecoderConfig


def pixels_of(sdata: SpatialData, slide: Slide) -> PixelContent:
    """Hash the pixels of a slide, or take the hash that was noted in the object for files that have not changed."""
    return pixel_content(slide, stored_note(sdata, "content", slide.image_key))


def slide_note(slide: Slide) -> dict[str, Any]:
    """Say which image a model or a result is of, and how it was read."""
    how = {name: getattr(slide, name) for name in ("coordinate_system", "mpp", "mpp_rule")}
    size_px = [slide.height_px, slide.width_px]
    return {"image": slide.image_key, "image_px": size_px, "channels": list(slide.channels), **how}


def slide_parts(slide: Slide, pixels: PixelContent) -> dict[str, Any]:
    """Parts of a slide that the network reads: pixels, and the resolution at which they are read."""
    size_px = [slide.height_px, slide.width_px]
    return {"pixels": pixels.sha256, "size_px": size_px, "mpp": slide.mpp, "working_mpp": slide.working_mpp}


def training_parts(
    record: ModelRecord,
    settings: Mapping[str, Any],
    slides: Mapping[str, tuple[Slide, PixelContent]],
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """Parts of a run: slides in the order of training, and the hashes of their regions and targets in ``data``."""
    described = ("objective", "aggregation", "target_sum", "freeze_encoder", "halo_px", "encoder", "encoder_sha256")
    return {
        "genes": content_sha256(*record.genes),
        "network": {name: getattr(record, name) for name in described} | {"decoder": asdict(record.decoder)},
        "settings": dict(settings),
        "order of slides": list(slides),
        "slides": {name: slide_parts(*of_slide) | {"tables": data[name]} for name, of_slide in slides.items()},
    }


def model_parts(model: PixNet) -> dict[str, Any]:
    """Parts of a model that decide about a map: the weights that it has now, and what is made of their outputs."""
    named = ("objective", "target_sum", "aggregation", "working_mpp", "halo_px")
    return {"weights": hash_weights(model.network), **{name: getattr(model.record, name) for name in named}}


def map_parts(
    model: PixNet, slide: Slide, pixels: PixelContent, tissue: NDArray[np.bool_], *, n_symmetries: int, tile_px: int
) -> dict[str, Any]:
    """Parts of a gene map, besides its genes and pitch; ``tissue`` is where it is predicted, on the map grid."""
    return {
        "model": model_parts(model),
        "image": {"key": slide.image_key, **slide_parts(slide, pixels)},
        "tissue": content_sha256(np.packbits(tissue), np.array(tissue.shape)),
        "n_symmetries": n_symmetries,
        "tile_px": tile_px if model.record.sees_whole_tile else None,  # decides about nothing else
    }


_ABOVE, _FAR_ABOVE, _NO_PCC = 1.5, 10.0, 0.1


def why_poor(record: ModelRecord) -> str:
    """Say why a model is worse than predicting each gene's mean over the training regions; nothing if it is not."""
    # A short or honest run on few regions ends within a third of the error of the means, either way.
    known = {name: value for name, value in record.training.items() if isinstance(value, int | float)}
    mse, of_means = known.get("mse", 0), known.get("gene_mean_mse", 0)
    if of_means <= 0 or mse <= of_means * (_FAR_ABOVE if known.get("pcc", 0) > _NO_PCC else _ABOVE):
        return ""
    which = "held-out" if record.training.get("scored_on") == "held_out" else "training"
    return f"on {which} regions its mean squared error is {mse:.3g}, and that of each gene's mean is {of_means:.3g}"


_MOST_REGIONS = 2**32
_REGION_BYTES = 24  # row and column of a region while they are listed
_MASKS = 2  # of the map's size: tissue, and what regions need of it
_TRAINED = 4  # a weight, its gradient, and the optimizer's two means
_LEAST_BLOCK_PX = 32


def models_folder(slides: Iterable[SpatialData]) -> Path:
    """Name the default folder of checkpoints: beside the first backed slide, else in the working directory."""
    stores = [Path(sdata.path).parent for sdata in slides if sdata.path is not None]
    return [*stores, Path.cwd()][0] / "pixnet_sd_models"


def check_working_size(slide: Slide) -> None:
    """Refuse a slide that at its working resolution is next to nothing, or more than memory holds a mask of."""
    rows, cols = (px * slide.mpp / slide.working_mpp for px in (slide.height_px, slide.width_px))
    needed, available = _MASKS * rows * cols / MAP_STRIDE**2, available_memory()
    if needed > available:
        why = f"{_size(needed)} of memory are needed for its masks alone, and {size_text(available)} are free"
    elif max(rows, cols) < STRIDES[-1]:
        why = f"the network needs {STRIDES[-1]}"
    else:
        return
    raise ResolutionError(
        f"working_mpp={slide.working_mpp:g} with mpp={slide.mpp:g}: the slide of {slide.height_px} x "
        f"{slide.width_px} pixels would have {rows:.3g} x {cols:.3g} working pixels, and {why}. Correct one of the two."
    )


def _size(n_bytes: float) -> str:
    return size_text(n_bytes) if n_bytes < 2**60 else f"{n_bytes:.2g} bytes"  # beyond every unit


def check_decoder(channels: Sequence[int], config: DecoderConfig, decoder_width: int, device: torch.device) -> None:
    """Refuse a decoder whose weights do not fit, by counting those of one that has no memory."""
    import torch

    from pixnet_sd.model import Decoder

    with torch.device("meta"):
        decoder = Decoder(channels, config.widths, config.hidden)
    needed = 4 * _TRAINED * sum(math.prod(weight.shape) for weight in decoder.parameters())
    if needed > (available := _memory(device)):
        raise PixNetError(
            f"decoder_width={decoder_width}: training its weights takes {_size(needed)} of memory, and "
            f"{size_text(available)} are there. Give a smaller one."
        )


def check_batch(
    sides_px: Iterable[tuple[float, float]],
    batch_size: int,
    tile_px: int,
    channels: Sequence[int],
    config: DecoderConfig,
    device: torch.device,
) -> None:
    """Refuse a batch of which one forward pass does not fit: tiles of rows x columns, working pixels."""
    widths = channels if config.widths is None else config.widths
    levels = zip(channels, widths, (*config.hidden, 0), STRIDES, strict=True)
    values = sum((c + w + h) / s**2 for c, w, h, s in levels)  # of a pixel in pyramid and decoder at once, at the least
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


def map_factor(map_um: float | None, slide: Slide, n_values: int) -> int:
    """Return the native map pixels along a pixel of the map, a whole number; `n_values` is what a native one holds."""
    if map_um is None:
        return 1
    native, (height, width) = MAP_STRIDE * slide.working_mpp, slide.map_shape
    factor = max(round(map_um / native), 1)
    if abs(map_um / native - factor) > 1e-6:
        raise PixNetError(
            f"map_um={map_um}: map pixels are whole multiples of the native {native:g} µm. Give map_um="
            f"{factor * native:g}."
        )
    available = available_memory()
    needed = 4 * n_values * min(_LEAST_BLOCK_PX * factor, height) * min(_LEAST_BLOCK_PX * factor, width)
    if factor > max(height, width):
        most, why = max(height, width), f"the slide is {height * native:.0f} x {width * native:.0f} µm"
    elif factor > 1 and needed > available:
        most = max(1, int(math.sqrt(available / (4 * n_values))) // _LEAST_BLOCK_PX)
        why = f"what is averaged at once takes {size_text(needed)} of memory, and {size_text(available)} are free"
    else:
        return factor
    raise PixNetError(f"map_um={map_um:g}: {why}. Give map_um={most * native:g} at most.")


def check_regions(argument: str, pitch_um: float, slide: Slide, tissue: NDArray[np.bool_]) -> None:
    """Refuse a grid of more regions than can be counted or listed; ``argument`` says what decides about its pitch."""
    squares = math.prod(side * slide.working_mpp / pitch_um for side in slide.working_shape)
    n = squares * float(tissue.mean())
    needed, available = squares + _REGION_BYTES * n, available_memory()
    if n > _MOST_REGIONS or needed > available:
        raise PixNetError(
            f"{argument}: these are about {n:.2g} regions, which take {_size(needed)} of memory to list, and "
            f"{size_text(available)} are free; {_MOST_REGIONS:,} is the most. Give a larger one."
        )
