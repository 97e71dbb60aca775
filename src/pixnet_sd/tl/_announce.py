"""What a prediction will take, said before it is begun."""

from __future__ import annotations

from pixnet_sd._logging import logger
from pixnet_sd.store import GeneMapWriter, RegionWriter, size_text

__all__ = ["announce"]

_WRITTEN_PER_S = 150e6
"""Bytes that are compressed and written in a second while the network runs, roughly, on two cores."""


def announce(
    blocks: GeneMapWriter | None, rows: RegionWriter | None, n_tiles: int, seconds_per_tile: float | None
) -> None:
    """Log how much is to be computed and written, and how long that will take.

    Parameters
    ----------
    blocks, rows
        What will be written.
    n_tiles
        Tiles that go through the network.
    seconds_per_tile
        What one took; None: not measured, because there are few.
    """
    n_bytes = sum(writer.missing_bytes for writer in (blocks, rows) if writer is not None)
    time = ""
    if seconds_per_tile is not None:
        time = f", about {_duration(n_tiles * seconds_per_tile + n_bytes / _WRITTEN_PER_S)}"
    logger.info("%d tiles through the network%s, at most %s on disk", n_tiles, time, size_text(n_bytes))
    for what in (blocks, rows):
        if what is not None:
            logger.info("%s", what.summary())


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
