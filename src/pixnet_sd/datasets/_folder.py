"""Files of a Space Ranger output folder that say where things lie: images, scale factors, transformations."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixnet_sd._errors import StoreError

from ._lattice import BASE_UM
from ._preview import Previews, preview_px
from ._slide import DrawnSlide
from ._staining import WINDOW_PX, draw

__all__ = ["new_folder", "write_feature_slice", "write_image", "write_scalefactors"]

_FIDUCIAL_UM = 165.0  # read by nobody here, but part of the format


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Folder to write into, which gets its name only when everything in it is complete."""
    if path.exists():
        raise StoreError(f"{path} exists already. Give another path, or delete it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        partial.chmod(0o755)  # a temporary folder is closed to others
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_image(path: Path, slide: DrawnSlide, n_workers: int | None) -> Previews:
    """Full-resolution image as a tiled BigTIFF, window by window; returns its previews."""
    from tifffile import TiffWriter

    previews = Previews.blank(slide.size_px)

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for grid, pixels in draw(slide.tissue, slide.size_px, slide.mpp, n_workers):
            previews.add(grid, pixels)
            yield pixels

    with TiffWriter(path, bigtiff=True) as file:
        file.write(
            tiles(),
            shape=(slide.size_px, slide.size_px, 3),
            dtype=np.uint8,
            tile=(WINDOW_PX, WINDOW_PX),
            photometric="rgb",
            resolution=(1e4 / slide.mpp, 1e4 / slide.mpp),
            resolutionunit="CENTIMETER",
            metadata=None,
        )
    return previews


def write_scalefactors(spatial: Path, slide: DrawnSlide, *, spot_um: float, bin_um: float | None) -> None:
    """``scalefactors_json.json``."""
    spatial.mkdir(parents=True, exist_ok=True)
    factors: dict[str, float] = {
        "spot_diameter_fullres": spot_um / slide.mpp,
        "fiducial_diameter_fullres": _FIDUCIAL_UM / slide.mpp,
    }
    for name, px in preview_px(slide.size_px).items():
        factors[f"tissue_{name}_scalef"] = px / slide.size_px
    if bin_um is not None:
        factors |= {"bin_size_um": float(bin_um), "microns_per_pixel": slide.mpp}
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))


def write_feature_slice(path: Path, slide: DrawnSlide) -> None:
    """``feature_slice.h5`` with its metadata only: layout of the lattice and how it lies on the image."""
    import h5py

    n_base = slide.lattice.n_base
    to_image = _spots_to_image(slide)
    to_spots = np.linalg.inv(to_image)
    layout = {
        "slide_name": "drawn",
        "file_format": "1.0",
        "nrows": n_base,
        "ncols": n_base,
        "spot_pitch": float(BASE_UM),
        "transform": np.diag([BASE_UM, BASE_UM, 1.0]).ravel().tolist(),
    }
    matrices = {
        "microscope_colrow_to_spot_colrow": to_spots,
        "spot_colrow_to_microscope_colrow": to_image,
        "cytassist_colrow_to_spot_colrow": to_spots,
        "spot_colrow_to_cytassist_colrow": to_image,
    }
    metadata: dict[str, Any] = {
        "nrows": n_base,
        "ncols": n_base,
        "hd_layout_json": json.dumps(layout),
        "transform_matrices": {name: matrix.tolist() for name, matrix in matrices.items()},
    }
    with h5py.File(path, "w") as file:
        file.attrs.update({"filetype": "feature_slice", "version": "0.1.0", "metadata_json": json.dumps(metadata)})


def _spots_to_image(slide: DrawnSlide) -> NDArray[np.float64]:
    """Affine (3, 3) from (array_col, array_row) of 2 µm bins to the pixels of their centres."""
    x, y = slide.lattice.centres_um(BASE_UM, np.array([0, 0, 1]), np.array([0, 1, 0]))
    points = np.stack([x, y]) / slide.mpp
    matrix = np.eye(3)
    matrix[:2] = np.stack([points[:, 1] - points[:, 0], points[:, 2] - points[:, 0], points[:, 0]], axis=1)
    return matrix
