"""What kind of Space Ranger folder a folder is, and whether a store is of it: nothing heavy is imported for that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["CONVERTED_FROM", "changed_files", "file_state", "is_visium", "is_visium_hd", "visium_advice"]

CONVERTED_FROM = "converted_from"
"""Section of the notes in a converted store: name of a file, relative to the folder, to its `file_state`."""


def is_visium_hd(folder: Path) -> bool:
    """Whether a folder is what Space Ranger makes of Visium HD."""
    return (folder / "binned_outputs").is_dir() or any(folder.glob("*feature_slice.h5"))


def is_visium(folder: Path) -> bool:
    """Whether a folder is what Space Ranger makes of Visium; a folder of HD bins has its positions as Parquet."""
    positions = any((folder / "spatial").glob("tissue_positions*.csv"))
    return positions and any(folder.glob("*filtered_feature_bc_matrix.h5")) and not is_visium_hd(folder)


def visium_advice(folder: Path) -> str:
    """What to do with a folder of Visium, which `convert_visium_hd` does not take."""
    return (
        f"{str(folder)!r} is a Space Ranger folder of Visium, not of Visium HD. Read it with "
        f"spatialdata_io.visium({str(folder)!r}, fullres_image_file=...).write('slide.zarr'), and give that store."
    )


def file_state(path: Path) -> list[int]:
    """Size and date, ns, of a file."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def changed_files(folder: Path, store: Path) -> list[str]:
    """Files of a Space Ranger folder that are not those that a store was converted from.

    Parameters
    ----------
    folder
        The folder.
    store
        A store; one that says nothing about where it is from, made by other means, has none.

    Returns
    -------
    Their names.
    """
    noted: dict[str, Any] = json.loads((store / "zarr.json").read_text(encoding="utf-8")).get("attributes", {})
    states = noted.get("pixnet_sd", {}).get(CONVERTED_FROM, {})
    return [name for name, state in states.items() if not _is_as_noted(folder / name, state)]


def _is_as_noted(path: Path, state: list[int]) -> bool:
    return path.is_file() and file_state(path) == state
