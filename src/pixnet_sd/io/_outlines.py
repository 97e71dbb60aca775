"""Outlines of cells from GeoJSON, one feature at a time: the parsed file would take ten times its size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from pixnet_sd._errors import DataError

__all__ = ["read_outlines"]

_BLOCK_CHARACTERS = 2**20
_BETWEEN = tuple(", \t\r\n")


def read_outlines(path: Path) -> dict[str, shapely.Polygon]:
    """Cell barcode → outer ring in pixels of the full image.

    Raises
    ------
    DataError
        When the file is no collection of polygons with a ``cell_id``.
    """
    try:
        return {
            f"cellid_{feature['properties']['cell_id']:09d}-1": shapely.Polygon(
                np.array(feature["geometry"]["coordinates"][0])
            )
            for feature in _features(path)
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not a GeoJSON collection of polygons with cell_id ({type(error).__name__}: {error}). Restore "
            "the file, or move segmented_outputs away to convert without cells."
        ) from error


def _features(path: Path) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as file:
        text, at = _after_opening(file), 0
        while True:
            while text[at : at + 1] in _BETWEEN:
                at += 1
            if text.startswith("]", at):
                return
            try:
                feature, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError:
                more = file.read(max(_BLOCK_CHARACTERS, len(text) - at))
                if not more:
                    raise
                text, at = text[at:] + more, 0
            else:
                yield feature


def _after_opening(file: Any) -> str:
    """Text from behind the bracket that opens the list of features."""
    text = ""
    while True:
        key = text.find('"features"')
        bracket = text.find("[", key) if key >= 0 else -1
        if bracket >= 0:
            return text[bracket + 1 :]
        more = file.read(_BLOCK_CHARACTERS)
        if not more:
            raise ValueError("no list of features")
        text += more
