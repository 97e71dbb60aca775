"""HER2-positive breast tumours by Spatial Transcriptomics (Andersson et al. 2021), read from disk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from dask.delayed import delayed
from PIL import Image
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale

from pixnet_sd._arguments import checked
from pixnet_sd._util import logger
from pixnet_sd.errors import DataError
from pixnet_sd.store import record

_FILES = ("image.jpg", "counts.tsv.gz", "spots.tsv", "meta.json")
_META = ("um_per_px", "spot_diameter_um", "image_width", "image_height")
_POSITION = ["pixel_x", "pixel_y"]
_CHUNK_PX = 1024
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
        ``{section}`` (pixels) and ``{section}_um``, and the µm per pixel noted under ``pixnet_sd`` in ``attrs``.

    Raises
    ------
    DataError
        If a section, a file or a column is missing, or files disagree with each other.
    """
    folders = _section_folders(Path(path).expanduser().resolve(), sections)
    return {folder.name: _read_section(folder) for folder in folders}


def _section_folders(path: Path, sections: Sequence[str] | None) -> list[Path]:
    if (path / "meta.json").is_file():
        path, sections = path.parent, [path.name] if sections is None else sections
    present = sorted(folder.name for folder in path.iterdir() if (folder / "meta.json").is_file())
    if not present:
        raise DataError(f"No section in {path}. A section is a folder with {', '.join(_FILES)}.")
    missing = [name for name in sections or () if name not in present]
    if missing:
        raise DataError(f"No section {', '.join(missing)} in {path}; there are {', '.join(present)}.")
    return [path / name for name in (present if sections is None else sections)]


def _read_section(folder: Path) -> SpatialData:
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}.")
    name, meta = folder.name, _read_meta(folder / "meta.json")
    mpp = float(meta["um_per_px"])
    transformations = {name: Identity(), f"{name}_um": Scale([mpp, mpp], axes=("x", "y"))}
    image = Image2DModel.parse(
        _open_image(folder / "image.jpg", meta),
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        scale_factors=[2] * int(np.clip(np.log2(min(meta["image_width"], meta["image_height"]) / 512), 1, 4)),
        chunks=(3, _CHUNK_PX, _CHUNK_PX),
        transformations=transformations,
    )
    spots = _read_spots(folder / "spots.tsv", meta)
    counts = _read_counts(folder / "counts.tsv.gz", spots.index)
    spots = spots.loc[counts.index]
    circles = ShapesModel.parse(
        spots[_POSITION].to_numpy(dtype=np.float64),
        geometry=0,
        radius=float(meta["spot_diameter_um"]) / 2 / mpp,
        index=spots.index.to_series(),
        transformations=transformations,
    )
    region = f"{name}_spots"
    tables = {"counts": _table(spots, counts, region)}
    sdata = SpatialData(images={f"{name}_image": image}, shapes={region: circles}, tables=tables)
    record(sdata, "mpp", f"{name}_image", mpp)
    return sdata


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} is not a JSON object: {error}") from error
    bad = [key for key in _META if not isinstance(meta.get(key), int | float) or not 0 < meta[key] < np.inf]
    if bad:
        raise DataError(f"{path} needs positive numbers under {', '.join(bad)}.")
    return meta


def _open_image(path: Path, meta: dict[str, Any]) -> da.Array:
    """Pixels (c, y, x) as a lazy array; only the header is read now."""
    with _pil_image(path) as image:
        width, height = image.size
    if (width, height) != (meta["image_width"], meta["image_height"]):
        raise DataError(
            f"{path} is {width} × {height} px, its meta.json says {meta['image_width']} × {meta['image_height']}: "
            "this is another image, or a resized one, and spots would not fit it."
        )
    decoded: da.Array = da.from_delayed(delayed(_decode_once)(path), (3, height, width), dtype=np.uint8)
    return decoded.rechunk((3, _CHUNK_PX, _CHUNK_PX))  # type: ignore[no-any-return, unused-ignore]


def _pil_image(path: Path) -> Any:
    """Open an image without PIL's guard: a slide has more pixels than any photograph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def _decode_once(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode for the first tile, share with the next ones: a JPEG can only be read whole."""
    with _DECODING:
        return _decode(path)


@lru_cache(maxsize=4)
def _decode(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with _pil_image(path) as image:
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def _read_spots(path: Path, meta: dict[str, Any]) -> pd.DataFrame:
    spots = pd.read_csv(path, sep="\t", dtype={"spot": str})
    missing = [column for column in ("spot", *_POSITION) if column not in spots]
    if missing:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(spots.columns)}.")
    position = spots[_POSITION].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    outside = ~((position >= 0) & (position <= [meta["image_width"], meta["image_height"]])).all(axis=1)
    if outside.any():
        raise DataError(
            f"{path}: {outside.sum()} of {len(spots)} spots lie outside the image or have no position, such as "
            f"{spots['spot'].to_numpy()[outside][0]}. Positions are in pixels of image.jpg."
        )
    _check_unique(spots["spot"], path)
    return spots.set_index("spot")


def _read_counts(path: Path, placed: pd.Index) -> pd.DataFrame:
    """Counts, spots × genes; every spot is among those that have a position."""
    counts = pd.read_csv(path, sep="\t", index_col=0)
    counts.index = counts.index.astype(str)
    _check_unique(counts.index, path)
    unplaced = counts.index.difference(placed)
    if len(unplaced):
        raise DataError(
            f"{path}: {len(unplaced)} of {len(counts)} spots have no position in spots.tsv, such as {unplaced[0]}."
        )
    if len(placed) > len(counts):
        dropped = len(placed) - len(counts)
        logger.info("%s: %d of %d spots have no counts and are left out.", path.parent.name, dropped, len(placed))
    if not all(dtype.kind in "iuf" for dtype in counts.dtypes):
        raise DataError(f"{path} holds values that are not numbers.")
    values = counts.to_numpy()
    if not np.isfinite(values).all() or (values < 0).any() or (values % 1 != 0).any():
        raise DataError(f"{path} holds negative or broken counts; raw counts are needed.")
    return counts


def _check_unique(names: pd.Index | pd.Series, path: Path) -> None:
    repeated = names[names.duplicated()].unique()
    if len(repeated):
        raise DataError(f"{path} lists spots more than once: {', '.join(map(str, repeated[:5]))}.")


def _table(spots: pd.DataFrame, counts: pd.DataFrame, region: str) -> AnnData:
    obs = spots.rename(columns={"x": "array_col", "y": "array_row"}).filter(["array_col", "array_row"])
    obs = obs.assign(spot=obs.index.to_numpy(), region=pd.Categorical([region] * len(obs))).rename_axis(index=None)
    matrix = sp.csr_matrix(counts.to_numpy(dtype=np.float32))
    table = AnnData(matrix, obs=obs, var=pd.DataFrame(index=counts.columns.astype(str)))
    table.obsm["spatial"] = spots[_POSITION].to_numpy(dtype=np.float64)
    return TableModel.parse(table, region=region, region_key="region", instance_key="spot")
