"""HER2-positive breast tumours by Spatial Transcriptomics (Andersson et al. 2021), read from disk."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pixnet_sd._arguments import checked
from pixnet_sd._util import logger
from pixnet_sd.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from dask.array import Array
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

__all__ = ["her2st"]

_FILES = ("image.jpg", "counts.tsv.gz", "spots.tsv", "meta.json")
_META = ("um_per_px", "spot_diameter_um", "image_width", "image_height")
_COLUMNS = ("spot", "pixel_x", "pixel_y")
_CHUNK_PX = 1024
_TABLE = "counts"
_DECODING = Lock()


@checked(DataError)
def her2st(path: str | Path, *, sections: Sequence[str] | None = None) -> dict[str, SpatialData]:
    """HER2-positive breast tumour sections: H&E with counts of 100 µm spots on a 200 µm pitch.

    Reads ``{path}/{section}/{image.jpg, counts.tsv.gz, spots.tsv, meta.json}``. Data: Andersson et al. 2021,
    Nat Commun 12:6012, doi:10.1038/s41467-021-26271-2 (CC BY 4.0, Zenodo 4751624).

    Parameters
    ----------
    path
        Folder that holds one folder a section, or the folder of one section.
    sections
        Names of sections to read; all that are there if None.

    Returns
    -------
    dict
        Section name → SpatialData with ``images["{section}_image"]`` (RGB uint8, multiscale; decoded on first use,
        and the last four are kept in memory, about 0.3 GB each), ``shapes["{section}_spots"]`` (circles in pixels),
        ``tables["counts"]`` (raw counts, float32 CSR; spots without counts are left out), coordinate systems
        ``{section}`` (pixels) and ``{section}_um``, and ``attrs["pixnet_sd"]["mpp"]``, image name → µm per pixel.

    Raises
    ------
    DataError
        If a section, a file or a column is missing, or files disagree with each other.
    """
    folders = _section_folders(Path(path), sections)
    return {folder.name: _read_section(folder) for folder in folders}


def _section_folders(path: Path, sections: Sequence[str] | None) -> list[Path]:
    if not path.is_dir():
        raise DataError(f"{path} is not a folder. Give the folder that holds the sections.")
    if (path / "meta.json").is_file():
        path, sections = path.parent, [path.resolve().name] if sections is None else sections
    found = sorted(folder.name for folder in path.iterdir() if (folder / "meta.json").is_file())
    if not found:
        raise DataError(f"No section in {path}. A section is a folder with {', '.join(_FILES)}.")
    missing = [name for name in sections or () if name not in found]
    if missing:
        raise DataError(f"No section {', '.join(missing)} in {path}; there are {', '.join(found)}.")
    return [path / name for name in (found if sections is None else sections)]


def _read_section(folder: Path) -> SpatialData:
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Identity, Scale
    from xarray import DataArray

    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}.")
    name, meta = folder.name, _read_meta(folder / "meta.json")
    mpp = float(meta["um_per_px"])
    transformations = {name: Identity(), f"{name}_um": Scale([mpp, mpp], axes=("x", "y"))}
    image = Image2DModel.parse(
        DataArray(_open_image(folder / "image.jpg", meta), dims=("c", "y", "x")),
        c_coords=["r", "g", "b"],
        scale_factors=[2] * int(np.clip(np.log2(min(meta["image_width"], meta["image_height"]) / 512), 1, 4)),
        chunks=(3, _CHUNK_PX, _CHUNK_PX),
        transformations=transformations,
    )
    spots, counts, genes = _join(_read_spots(folder / "spots.tsv", meta), folder / "counts.tsv.gz")
    region = f"{name}_spots"
    return SpatialData(
        images={f"{name}_image": image},
        shapes={region: _circles(spots, float(meta["spot_diameter_um"]) / 2 / mpp, transformations)},
        tables={_TABLE: _table(spots, counts, genes, region)},
        attrs={"pixnet_sd": {"mpp": {f"{name}_image": mpp}}},
    )


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    bad = [key for key in _META if not isinstance(meta.get(key), int | float) or meta[key] <= 0]
    if bad:
        raise DataError(f"{path} needs positive numbers under {', '.join(bad)}.")
    return dict(meta)


def _open_image(path: Path, meta: dict[str, Any]) -> Array:
    """Pixels (c, y, x) as a lazy array; only the header is read now."""
    import dask.array as da
    from dask.delayed import delayed

    with _unlimited_pil(path) as opened:
        width, height = opened.size
    if (width, height) != (meta["image_width"], meta["image_height"]):
        raise DataError(
            f"{path} is {width} × {height} px, its meta.json says {meta['image_width']} × {meta['image_height']}: "
            "this is another image, or a resized one, and spots would not fit it."
        )
    decoded: Array = da.from_delayed(delayed(_decode_once)(path), (3, height, width), dtype=np.uint8)
    return decoded.rechunk((3, _CHUNK_PX, _CHUNK_PX))  # type: ignore[no-any-return, unused-ignore]


def _unlimited_pil(path: Path) -> Any:
    """Image opened without PIL's guard: a slide has more pixels than any photograph."""
    import warnings

    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def _decode_once(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode for the first tile, share with the next ones: a JPEG can only be read whole."""
    with _DECODING:
        return _decode(path)


@lru_cache(maxsize=4)
def _decode(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with _unlimited_pil(path) as opened:
        return np.ascontiguousarray(np.asarray(opened.convert("RGB")).transpose(2, 0, 1))


def _read_spots(path: Path, meta: dict[str, Any]) -> pd.DataFrame:
    spots = pd.read_csv(path, sep="\t", dtype={"spot": str})
    missing = [column for column in _COLUMNS if column not in spots]
    if missing:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(spots.columns)}.")
    position = spots[["pixel_x", "pixel_y"]].to_numpy(dtype=np.float64)
    outside = ~((position >= 0) & (position <= [meta["image_width"], meta["image_height"]])).all(axis=1)
    if outside.any():
        raise DataError(
            f"{path}: {outside.sum()} of {len(spots)} spots lie outside the image or have no position, such as "
            f"{spots['spot'].to_numpy()[outside][0]}. Positions are in pixels of image.jpg."
        )
    return _unique(spots.set_index("spot"), path)


def _unique(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    twice = frame.index[frame.index.duplicated()].unique()
    if len(twice):
        raise DataError(f"{path} lists spots more than once: {', '.join(map(str, twice[:5]))}.")
    return frame


def _join(spots: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, sp.csr_matrix, pd.Index]:
    """Spots that have counts, in the order of the counts file; counts; gene names."""
    counts = _unique(pd.read_csv(path, sep="\t", index_col=0), path)
    counts.index = counts.index.astype(str)
    unplaced = counts.index.difference(spots.index)
    if len(unplaced):
        raise DataError(
            f"{path}: {len(unplaced)} of {len(counts)} spots have no position in spots.tsv, such as {unplaced[0]}."
        )
    twice = counts.columns[counts.columns.duplicated()]
    if len(twice):
        raise DataError(f"{path} lists genes more than once: {', '.join(twice[:5])}.")
    dropped = len(spots) - len(counts)
    if dropped:
        logger.info("%s: %d of %d spots have no counts and are left out.", path.parent.name, dropped, len(spots))
    return spots.loc[counts.index], _counts_matrix(counts, path), counts.columns


def _counts_matrix(counts: pd.DataFrame, path: Path) -> sp.csr_matrix:
    if not all(kind.kind in "iuf" for kind in counts.dtypes):
        raise DataError(f"{path} holds values that are not numbers.")
    matrix = sp.csr_matrix(counts.to_numpy(dtype=np.float32))
    if not np.isfinite(matrix.data).all() or (matrix.data < 0).any() or (matrix.data % 1 != 0).any():
        raise DataError(f"{path} holds negative or broken counts; raw counts are needed.")
    return matrix


def _circles(spots: pd.DataFrame, radius_px: float, transformations: dict[str, Any]) -> GeoDataFrame:
    from spatialdata.models import ShapesModel

    centres = spots[["pixel_x", "pixel_y"]].to_numpy(dtype=np.float64)
    return ShapesModel.parse(
        centres, geometry=0, radius=radius_px, index=spots.index.to_series(), transformations=transformations
    )


def _table(spots: pd.DataFrame, counts: sp.csr_matrix, genes: pd.Index, region: str) -> AnnData:
    from anndata import AnnData
    from spatialdata.models import TableModel

    arrayed = {"array_col": "x", "array_row": "y"}
    obs = pd.DataFrame({key: spots[column] for key, column in arrayed.items() if column in spots}, index=spots.index)
    obs.index.name = None
    obs["spot"] = obs.index.to_numpy()
    obs["region"] = pd.Categorical([region] * len(obs))
    table = AnnData(counts, obs=obs, var=pd.DataFrame(index=genes.astype(str)))
    table.obsm["spatial"] = spots[["pixel_x", "pixel_y"]].to_numpy(dtype=np.float64)
    return TableModel.parse(table, region=region, region_key="region", instance_key="spot")
