"""A Space Ranger folder of any size as a SpatialData store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pixnet_sd._arguments import checked
from pixnet_sd._errors import DataError
from pixnet_sd._logging import logger
from pixnet_sd.store import size_text

from ._build import build_store
from ._folder import HDFolder, find_files, read_scalefactors
from ._image import open_image
from ._matrix import open_matrix
from ._positions import check_places
from ._scratch import check_absent, scratch_folder

if TYPE_CHECKING:
    import dask.array as da

__all__ = ["convert_visium_hd"]

ENTRY_BYTES, BIN_BYTES = 5, 160  # on disk at most, as compressed
PREVIEW_TOLERANCE = 0.05
"""Fraction by which the image may differ from what the previews say it should be."""


@checked(DataError)
def convert_visium_hd(
    folder: str | Path,
    store: str | Path,
    *,
    dataset_id: str | None = None,
    bin_um: int | Sequence[int] | None = None,
    image: str | Path | None = None,
    chunk_px: int = 1024,
    show_progress_bar: bool = True,
) -> None:
    """Write a Space Ranger output folder of Visium HD as a SpatialData store, without loading it.

    The store is what ``spatialdata_io.visium_hd(folder).write(store)`` gives: names, coordinate systems, counts,
    squares, cells, pixels and pyramid levels are the same. That call holds the whole slide in memory, which is tens of
    gigabytes for a full one; here memory stays below 1.5 GB, plus about 20 bytes per bin. Only the chunks of the image
    and of the tables differ, which is also what makes the store fast to read in parts.

    Parameters
    ----------
    folder
        Output folder of Space Ranger (``outs``).
    store
        Where the store is made; nothing may be there. It appears under this name when it is complete. Beside it a
        hidden folder ``.{store}.pixnet_sd`` is used meanwhile; one that a killed run has left is cleared by the next.
    dataset_id
        Prefix of element names. Default: that of ``{id}_feature_slice.h5``, or none.
    bin_um
        Bin sizes to convert, in µm. Default: all.
    image
        Full-resolution image. Default: the one in ``microscope_image/``, or ``{id}_tissue_image.*``. Tiled and
        stripped TIFF files are read in parts; others as a whole, with a warning that says what this takes.
    chunk_px
        Side of the image's chunks in pixels, at least 64.
    show_progress_bar
        Whether progress is shown.

    Raises
    ------
    DataError
        If a file is missing or damaged, or files of different runs or bin sizes are mixed.
    StoreError
        If there is something at ``store``, too little disk, or another run writes the same store.
    ImportError
        Without spatialdata-io.
    """
    source, target = Path(folder).expanduser(), Path(store).expanduser().resolve()
    check_absent(target)
    files = find_files(source, dataset_id, bin_um, image)
    for bins in files.bins:
        with open_matrix(bins.matrix) as matrix:
            check_places(matrix, bins.positions)
    with open_image(files.image, chunk_px) as pixels:
        _check_image(files, pixels.shape)
        with scratch_folder(target, _announced_bytes(files, pixels)) as scratch:
            built = build_store(files, pixels, scratch, show_progress_bar)
            check_absent(target)
            built.rename(target)
    logger.info("wrote %s", target)


def _check_image(files: HDFolder, shape: tuple[int, ...]) -> None:
    """Compare the image with the preview that Space Ranger made of it."""
    from PIL import Image

    preview = files.previews.get("tissue_hires_image.png")
    if preview is None:
        return
    with Image.open(preview) as opened:
        found = np.array(opened.size[::-1])
    scale = read_scalefactors(files.bins[0].scalefactors)["tissue_hires_scalef"]
    expected = np.array(shape[1:]) * scale
    if (np.abs(found / expected - 1) > PREVIEW_TOLERANCE).any():
        height, width = (found / scale).round().astype(int)
        raise DataError(
            f"The image {files.image} has {shape[1]} × {shape[2]} pixels, but Space Ranger was run on one of "
            f"{height} × {width}. Give that with `image=`."
        )


def _announced_bytes(files: HDFolder, pixels: da.Array) -> int:
    """Say what there is; bytes of the coming store at most."""
    n_bytes, parts = int(pixels.nbytes * 4 / 3), []
    for what, path in files.matrices().items():
        with open_matrix(path) as matrix:
            n_bytes += ENTRY_BYTES * matrix.n_entries + BIN_BYTES * matrix.n_rows
            parts.append(f"{matrix.n_rows} {what}")
    logger.info(
        "converting an image of %d × %d pixels, %s; the store takes up to %s",
        *pixels.shape[1:],
        ", ".join(parts),
        size_text(n_bytes),
    )
    return n_bytes
