"""What kind of Space Ranger folder a folder is, told by names of files: nothing heavy is imported for it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["is_visium", "is_visium_hd", "visium_advice"]


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
