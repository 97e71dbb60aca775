"""Whether memory and disk hold a drawn slide, told with the number before any of it is drawn."""

from __future__ import annotations

import shutil
from pathlib import Path

from pixnet_sd._errors import DataError

from ._expression import DENSITY_PITCH_UM
from ._tissue import Source

__all__ = ["check_disk", "check_memory", "density_bytes", "image_bytes"]


def density_bytes(size_um: float) -> float:
    """Bytes of the density of every source, 16 bits each."""
    return 2 * len(Source) * (size_um / DENSITY_PITCH_UM) ** 2


def image_bytes(size_um: float, mpp: float) -> float:
    """Bytes of an RGB image."""
    return 3 * (size_um / mpp) ** 2


def check_memory(n_bytes: float, **arguments: float) -> None:
    """Refuse what memory does not hold.

    Parameters
    ----------
    n_bytes
        Needed at the least.
    arguments
        Those that decide about it.

    Raises
    ------
    DataError
        Saying how much is needed and how much is free.
    """
    from pixnet_sd.store._memory import available_memory

    _check(n_bytes, available_memory(), "memory", arguments)


def check_disk(n_bytes: float, path: Path, **arguments: float) -> None:
    """Refuse what the disk does not hold; `path` need not be there, others as for `check_memory`."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    _check(n_bytes, shutil.disk_usage(there).free, "disk", arguments)


def _check(needed: float, free: int, what: str, arguments: dict[str, float]) -> None:
    from pixnet_sd.store._disk import size_text

    if needed > free:
        given = ", ".join(f"{name}={value:g}" for name, value in arguments.items())
        raise DataError(
            f"{given}: takes at least {size_text(needed)} of {what}, and {size_text(free)} are free. Draw a smaller or "
            "coarser slide."
        )
