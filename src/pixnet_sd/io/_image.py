"""The full-resolution image, read in bands of whole rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pixnet_sd._util import warn
from pixnet_sd.errors import DataError
from pixnet_sd.store import size_text

if TYPE_CHECKING:
    import dask.array as da
    from tifffile import TiffPage, TiffPageSeries

_LARGE_PIECE_BYTES = 2**28
_RGB = 3


@contextmanager
def open_image(path: Path, chunk_px: int) -> Iterator[da.Array]:
    """Open an RGB image, (3, height, width) in chunks of ``chunk_px``, valid as long as the context.

    TIFF files of any kind, and what Pillow reads. DataError when it cannot be read or is not RGB; a warning when the
    file can only be read in large pieces, or as a whole.
    """
    from tifffile import TiffFile, TiffFileError

    try:
        tiff = TiffFile(path)
    except TiffFileError:
        yield _chunked(_whole(path), channels_last=True, chunk_px=chunk_px)
        return
    with tiff:
        series = tiff.series[0]
        channels_last = series.axes[-1] in "SC"
        _check_rgb(path, series.shape, channels_last=channels_last)
        yield _chunked(_rows(path, series), channels_last=channels_last, chunk_px=chunk_px)


def _check_rgb(path: Path, shape: tuple[int, ...], *, channels_last: bool) -> None:
    if len(shape) != _RGB or shape[-1 if channels_last else 0] != _RGB:
        raise DataError(
            f"The image {path} has the shape {shape}, which is not RGB. Save it with three channels and give it with "
            "`image=`."
        )


def _chunked(pixels: Any, *, channels_last: bool, chunk_px: int) -> da.Array:
    """Chunk pixels; bands are read one at a time and then cut: a strip of a TIFF file spans the whole width."""
    import dask.array as da

    height, width = pixels.shape[:2] if channels_last else pixels.shape[1:]
    band = (chunk_px, width, _RGB) if channels_last else (_RGB, chunk_px, width)
    array = da.from_array(pixels, chunks=band, name=False, lock=True)
    if channels_last:
        array = array.transpose(2, 0, 1)
    array = array.astype(array.dtype.newbyteorder("="))
    return array.rechunk((_RGB, min(chunk_px, height), min(chunk_px, width)))


def _rows(path: Path, series: TiffPageSeries) -> Any:
    """Array of the finest level, of which rows can be read."""
    import zarr

    page = series.keyframe
    pixels: Any = zarr.open_array(series.aszarr(level=0), mode="r")
    piece = int(np.prod(pixels.chunks)) * pixels.dtype.itemsize
    if piece <= _LARGE_PIECE_BYTES:
        return pixels
    if page.is_contiguous and page.compression == 1 and len(series) == 1 and page.planarconfig == 1:
        return _RawRows(path, page)
    warn(
        f"The image {path} is compressed in pieces of {size_text(piece)}, each of which is held in memory while it is "
        "read. Save it as a tiled TIFF to avoid that."
    )
    return pixels


class _RawRows:
    """Rows of an uncompressed image in one piece."""

    ndim = 3

    def __init__(self, path: Path, page: TiffPage) -> None:
        self._path, self._offset = path, page.dataoffsets[0]
        self.shape = page.shape
        self.dtype = np.dtype(page.dtype).newbyteorder(page.parent.byteorder)

    def __getitem__(self, key: tuple[slice, slice, slice]) -> NDArray[Any]:
        start, stop, _ = key[0].indices(self.shape[0])
        row = int(np.prod(self.shape[1:]))
        offset = self._offset + start * row * self.dtype.itemsize
        pixels = np.fromfile(self._path, self.dtype, (stop - start) * row, offset=offset)
        return pixels.reshape(stop - start, *self.shape[1:])[(slice(None), *key[1:])]


def _whole(path: Path) -> NDArray[Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(
            f"The image {path} cannot be read ({error}). Save it as a tiled TIFF and give it with `image=`."
        ) from error
    _check_rgb(path, pixels.shape, channels_last=True)
    warn(
        f"The image {path} can only be read as a whole, which takes {size_text(pixels.nbytes)} of memory. Save it as a "
        "tiled TIFF to avoid that."
    )
    return pixels
