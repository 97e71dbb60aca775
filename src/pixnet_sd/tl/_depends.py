"""What answers depend on: the parts of the fingerprints of a training run, a model, and a map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixnet_sd._fingerprint import content_sha256, release
from pixnet_sd.nn.weights import hash_weights
from pixnet_sd.slide import PixelContent, Slide
from pixnet_sd.store import ModelRecord, PixNet

from ._pixels import slide_parts

__all__ = ["map_parts", "model_parts", "training_parts"]

_DECIDING = ("torch", "timm", "pixnet_sd")
"""Libraries that make a network's numbers; a patch release is taken to make the same."""


def training_parts(
    record: ModelRecord,
    settings: Mapping[str, Any],
    slides: Mapping[str, tuple[Slide, PixelContent]],
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """Parts of a training run: equal for two runs exactly when they would train the same network on the same data.

    Parameters
    ----------
    record
        The network that is about to be trained.
    settings
        How.
    slides
        Slides by name, in the order of training, with their pixels.
    data
        Hashes of regions and targets by slide.
    """
    described = ("objective", "aggregation", "target_sum", "freeze_encoder", "halo_px", "encoder", "encoder_sha256")
    return {
        "genes": content_sha256(*record.genes),
        "network": {name: getattr(record, name) for name in described} | {"decoder": asdict(record.decoder)},
        "settings": dict(settings),
        "order of slides": list(slides),
        "slides": {name: slide_parts(*of_slide) | {"tables": data[name]} for name, of_slide in slides.items()},
        "libraries": _libraries(record),
    }


def _libraries(record: ModelRecord) -> dict[str, str]:
    return {name: release(record.versions[name]) for name in _DECIDING}


def model_parts(model: PixNet) -> dict[str, Any]:
    """Parts of a model that decide about a map: the weights that it has now, and what is made of their outputs."""
    record = model.record
    named = ("objective", "target_sum", "aggregation", "working_mpp", "halo_px")
    return {"weights": hash_weights(model.network), **{name: getattr(record, name) for name in named}}


def map_parts(
    model: PixNet,
    slide: Slide,
    pixels: PixelContent,
    tissue: NDArray[np.bool_],
    *,
    n_symmetries: int,
    tile_px: int,
) -> dict[str, Any]:
    """Parts of a gene map, besides its genes and pitch.

    Parameters
    ----------
    model
        The model.
    slide, pixels
        The slide, and its pixels.
    tissue
        Where the map is predicted, on the map grid.
    n_symmetries, tile_px
        As of :func:`pixnet_sd.tl.predict`; the latter decides only for encoders that see whole tiles.
    """
    return {
        "model": model_parts(model),
        "image": {"key": slide.image_key, **slide_parts(slide, pixels)},
        "tissue": content_sha256(np.packbits(tissue), np.array(tissue.shape)),
        "n_symmetries": n_symmetries,
        "tile_px": tile_px if model.record.sees_whole_tile else None,
    }
