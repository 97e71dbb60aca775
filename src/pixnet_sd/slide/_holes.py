"""Tell chunks of an image that were left out because they are black from those that were lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pixnet_sd._errors import StoreError

if TYPE_CHECKING:
    from ._image import ImageLevel

__all__ = ["check_holes"]

_LOOKED_AT = 256  # missing chunks of a level, spread over all
_SIDE_PX = 512  # of what is looked at of each
_MARGIN_PX = 2  # pixels of a level that its neighbours may have a part in
_DIFFERENT = 4.0  # mean grey levels from the fill value


def check_holes(levels: Sequence[ImageLevel], image_key: str) -> None:
    """Raise when another level shows something where a level has no file.

    Parameters
    ----------
    levels
        Finest first.
    image_key
        Name, for messages.

    Raises
    ------
    StoreError
        Saying where.
    """
    if not levels[0].is_backed or not levels[0].guards:
        return
    for k, level in enumerate(levels):
        witness = levels[-1] if k < len(levels) - 1 else levels[0]
        if not level.is_backed or not level.guards or level.guards[0].has_file.all():
            continue
        if not level.guards[0].n_files or (witness is not level and _contradicts(level, witness)):
            raise StoreError(
                f"Image {image_key!r} is not whole: in {level.guards[0].folder} {_missing(level)} of "
                f"{level.guards[0].has_file.size} chunks have no file, which would be read as black. Was the store "
                "copied in part? Copy it again."
            )


def _missing(level: ImageLevel) -> int:
    return level.guards[0].has_file.size - level.guards[0].n_files


def _contradicts(level: ImageLevel, witness: ImageLevel) -> bool:
    """Whether the witness has pixels unlike the fill value in a chunk that the level lacks."""
    guard = level.guards[0]
    lacking = np.argwhere(~guard.has_file)
    for c, row, col in lacking[np.unique(np.linspace(0, len(lacking) - 1, _LOOKED_AT).astype(int))].tolist():
        span = slice(c * guard.chunk[0], (c + 1) * guard.chunk[0])
        box = [
            side
            for axis, k in enumerate((row, col))
            for side in _on_witness(level, witness, axis, k * guard.chunk[axis + 1], (k + 1) * guard.chunk[axis + 1])
        ]
        if box[0] < box[1] and box[2] < box[3]:
            part = witness.pixels_of(span, *box)
            if np.abs(part.astype(np.float64) - float(guard.fill)).mean() > _DIFFERENT:
                return True
    return False


def _on_witness(level: ImageLevel, witness: ImageLevel, axis: int, start: int, stop: int) -> tuple[int, int]:
    """Pixels of the witness inside a range of the level's; not many, from the middle."""
    stop = min(stop, level.shape[axis])
    low, high = (
        (k * level.scale[axis] + level.origin[axis] - witness.origin[axis]) / witness.scale[axis] for k in (start, stop)
    )
    first, last = max(0, int(np.ceil(low)) + _MARGIN_PX), min(int(high) - _MARGIN_PX, witness.shape[axis])
    middle = (first + last) // 2
    return max(first, middle - _SIDE_PX // 2), min(last, middle + _SIDE_PX // 2)
