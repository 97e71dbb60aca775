"""The gene map of a call of `predict`: whether it is there already, is to be written, or neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from spatialdata import SpatialData

from pixnet_sd._errors import ElementError, PixNetError
from pixnet_sd._fingerprint import differing_parts
from pixnet_sd._logging import logger
from pixnet_sd.engine.sinks import BlockSink
from pixnet_sd.nn.grid import Window
from pixnet_sd.nn.model import MAP_STRIDE
from pixnet_sd.slide import Slide, affine_matrix
from pixnet_sd.store import GeneMapReader, GeneMapWriter, is_as_written, open_map, stored_note

from ._room import check_map_um

__all__ = ["CoarseSink", "MapInfo", "ReusedMap", "find_factors", "find_map", "map_factor", "sink_of"]


@dataclass(frozen=True)
class MapInfo:
    """What decides the values of a gene map, besides its genes.

    Attributes
    ----------
    fingerprint
        Hash over model, image, resolution, tissue and averaging.
    factor
        Native map pixels per stored map pixel.
    depends_on
        What is hashed, part by part.
    """

    fingerprint: str
    factor: int
    depends_on: dict[str, Any]


def map_factor(map_um: float | None, slide: Slide, n_values: int) -> int:
    """Native map pixels per pixel of the map that is asked for; `n_values` is what a native one holds.

    Raises
    ------
    PixNetError
        `map_um` is not a whole multiple of the native pitch, so the map would have to be interpolated, or too large.
    """
    native = MAP_STRIDE * slide.working_mpp
    factor = 1.0 if map_um is None else map_um / native
    if factor < 1 - 1e-6 or abs(factor - round(factor)) > 1e-6:
        near = max(round(factor), 1) * native
        raise PixNetError(
            f"map_um={map_um}: map pixels are whole multiples of the native {native:g} µm. Give map_um={near:g}."
        )
    if map_um is not None:
        check_map_um(map_um, round(factor), slide, n_values)
    return round(factor)


@dataclass(frozen=True)
class ReusedMap:
    """A native gene map, or its factors, written by an earlier call with the same model and slide.

    Attributes
    ----------
    key
        Its name.
    reader
        Its pixels.
    channels
        Those of the genes that are asked for, or of D.
    has_features
        Whether it is D.
    """

    key: str
    reader: GeneMapReader
    channels: list[int]
    has_features: bool = False

    def covers(self, window: Window) -> bool:
        """Whether the map reaches over a window; all of it was predicted."""
        return window.row1 <= self.reader.shape[0] and window.col1 <= self.reader.shape[1]

    def read(self, window: Window) -> NDArray[np.float32]:
        """Values (genes, rows, columns) of a window, or D (C, rows, columns)."""
        return self.reader.read(*window, self.channels)


def find_map(sdata: SpatialData, key: str, info: MapInfo, genes: Sequence[str], slide: Slide) -> ReusedMap | None:
    """The map of an earlier call, if regions can be had from it exactly.

    That takes the same model, image and tissue, the native pitch (a coarser map has lost what the bilinear resize
    needs), all of the genes, and an image that was not aligned anew since.
    """
    reader = _reader(sdata, key, info, slide)
    if reader is None or not set(genes) <= set(reader.genes):
        return None
    return ReusedMap(key, reader, [reader.genes.index(gene) for gene in genes])


def find_factors(sdata: SpatialData, key: str, info: MapInfo, slide: Slide) -> ReusedMap | None:
    """The factors of an earlier call, under the same conditions; any genes can be had from them."""
    reader = _reader(sdata, key, info, slide)
    return None if reader is None else ReusedMap(key, reader, list(range(len(reader.genes) - 1)), has_features=True)


def _reader(sdata: SpatialData, key: str, info: MapInfo, slide: Slide) -> GeneMapReader | None:
    note = stored_note(sdata, "maps", key)
    if not note or key not in sdata.images:
        return None
    why_not = _why_not(sdata, key, note, info, slide)
    if why_not:
        logger.info("map %r is not read back, but computed anew: %s", key, why_not)
        return None
    return open_map(sdata, key)


def _why_not(sdata: SpatialData, key: str, note: Mapping[str, Any], info: MapInfo, slide: Slide) -> str:
    """Why a map that is there cannot be read back; empty if it can."""
    if note.get("fingerprint") != info.fingerprint:
        parts = differing_parts(note.get("depends_on", {}), info.depends_on)
        return f"it differs in {', '.join(map(repr, parts)) or 'its fingerprint'}"
    if note.get("factor") != 1:
        return "it is coarser than the native pitch"
    if not _lies_on(sdata, key, slide):
        return "the image was aligned anew since"
    if not is_as_written(sdata, key):
        return "it is not as it was written"
    return ""


def _lies_on(sdata: SpatialData, key: str, slide: Slide) -> bool:
    """Whether a native map still lies where its image does."""
    pitch = MAP_STRIDE * slide.working_scale
    try:
        found = affine_matrix(sdata.images[key], slide.coordinate_system)
    except ElementError:
        return False
    return bool(np.allclose(found, slide.to_system @ np.diag([pitch, pitch, 1.0]), rtol=1e-6))


class CoarseSink:
    """Averages blocks of the native map into the pixels of a coarser one.

    Parameters
    ----------
    writer
        Of the coarser map.
    factor
        Native pixels per coarse pixel.
    shape
        Native map size.
    """

    def __init__(self, writer: GeneMapWriter, factor: int, shape: tuple[int, int]) -> None:
        self._writer, self._factor, self._shape = writer, factor, shape
        self._coarse = {self._native(block): block for block in writer.blocks}

    def _native(self, block: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        height, width = self._shape
        row0, row1, col0, col1 = (v * self._factor for v in block)
        return row0, min(row1, height), col0, min(col1, width)

    @property
    def pending(self) -> list[tuple[int, int, int, int]]:
        """Blocks, native map pixels, that are not there yet."""
        return [self._native(block) for block in self._writer.pending]

    def write(self, block: tuple[int, int, int, int], values: NDArray[np.float32]) -> None:
        """Average a native block and write it."""
        f = self._factor
        rows, cols = (-values.shape[axis] % f for axis in (1, 2))
        padded = np.pad(values, ((0, 0), (0, rows), (0, cols)))
        n, height, width = padded.shape
        coarse = padded.reshape(n, height // f, f, width // f, f).mean(axis=(2, 4), dtype=np.float32)
        self._writer.write(self._coarse[block], coarse)


def sink_of(writer: GeneMapWriter, factor: int, shape: tuple[int, int]) -> BlockSink:
    """The writer itself at the native pitch, or one that averages."""
    return writer if factor == 1 else CoarseSink(writer, factor, shape)
