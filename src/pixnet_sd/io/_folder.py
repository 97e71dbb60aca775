"""What kind of Space Ranger folder a folder is, and whether a store is of it: nothing heavy is imported for that.

What a Space Ranger output folder of Visium HD holds, and where.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixnet_sd.errors import DataError

__all__ = [
    "CONVERTED_FROM",
    "BinFiles",
    "CellFiles",
    "HDFolder",
    "changed_files",
    "file_state",
    "find_files",
    "is_visium",
    "is_visium_hd",
    "read_scalefactors",
    "visium_advice",
]

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


SLICE_FILE = "feature_slice.h5"
SCALEFACTORS = "scalefactors_json.json"
_IMAGE_FOLDER = "microscope_image"
_BINNED, _SEGMENTED = "binned_outputs", "segmented_outputs"


@dataclass(frozen=True)
class BinFiles:
    """The files of one bin size.

    Attributes
    ----------
    folder
        ``square_008um`` or the like.
    um
        Side of a bin in µm.
    """

    folder: Path
    um: int

    @property
    def name(self) -> str:
        """Of the folder, and of the table."""
        return self.folder.name

    @property
    def matrix(self) -> Path:
        """Counts."""
        return self.folder / "filtered_feature_bc_matrix.h5"

    @property
    def positions(self) -> Path:
        """Place of every bin."""
        return self.folder / "spatial" / "tissue_positions.parquet"

    @property
    def scalefactors(self) -> Path:
        """Sizes in pixels."""
        return self.folder / "spatial" / SCALEFACTORS


@dataclass(frozen=True)
class CellFiles:
    """The files of segmented cells, in the folder that holds them."""

    folder: Path

    @property
    def matrix(self) -> Path:
        """Counts."""
        return self.folder / "filtered_feature_cell_matrix.h5"

    @property
    def outlines(self) -> Path:
        """One polygon per cell."""
        return self.folder / "cell_segmentations.geojson"

    @property
    def scalefactors(self) -> Path:
        """Scales of the previews; may be missing."""
        return self.folder / "spatial" / SCALEFACTORS


@dataclass(frozen=True)
class HDFolder:
    """A Space Ranger output folder.

    Attributes
    ----------
    slice_file
        The feature slice file.
    dataset_id
        As asked for; None leaves it to the reader, which takes it from the name of ``slice_file``.
    bins
        One entry per bin size, finest first.
    cells
        None without segmentation.
    image
        The full-resolution image.
    previews
        Name → path of the small images.
    """

    slice_file: Path
    dataset_id: str | None
    bins: tuple[BinFiles, ...]
    cells: CellFiles | None
    image: Path
    previews: dict[str, Path]

    def matrices(self) -> dict[str, Path]:
        """What the rows are → file of counts."""
        found = {f"bins of {bins.um} µm": bins.matrix for bins in self.bins}
        return found if self.cells is None else {**found, "cells": self.cells.matrix}

    def states(self) -> dict[str, list[int]]:
        """Sizes and dates of all files that are read, for `changed_files`."""
        paths = [self.slice_file, self.image, *self.previews.values()]
        paths += [path for bins in self.bins for path in (bins.matrix, bins.positions, bins.scalefactors)]
        paths += [] if self.cells is None else [self.cells.matrix, self.cells.outlines]
        root = self.slice_file.parent.resolve()
        return {_relative(path.resolve(), root): file_state(path) for path in paths}


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def find_files(
    folder: Path, dataset_id: str | None, bin_um: int | Sequence[int] | None, image: str | Path | None
) -> HDFolder:
    """Find all that is converted, where ``spatialdata_io.visium_hd`` would find it.

    Raises
    ------
    DataError
        Saying that it is of Visium, which file is missing, or which files are not of one kind.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {str(folder)!r}. Give the output folder of Space Ranger (`outs`).")
    if is_visium(folder):
        raise DataError(visium_advice(folder))
    slice_file = _slice_file(folder, dataset_id)
    bins = _bins(folder, bin_um)
    for files in bins:
        _check_bins(files)
    cells = CellFiles(folder / _SEGMENTED)
    has_cells = cells.matrix.is_file() and cells.outlines.is_file()
    return HDFolder(
        slice_file=slice_file,
        dataset_id=dataset_id,
        bins=bins,
        cells=cells if has_cells else None,
        image=_image(folder, slice_file.name.removesuffix(SLICE_FILE)) if image is None else _given_image(Path(image)),
        previews=_previews(folder),
    )


def read_scalefactors(path: Path) -> dict[str, Any]:
    """Scale factors of a bin size or of the cells.

    Raises
    ------
    DataError
        When the file is missing or is no JSON object.
    """
    try:
        factors = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"The scale factors {path} cannot be read ({error}). Restore the file.") from error
    if not isinstance(factors, dict):
        raise DataError(f"The scale factors {path} are not a JSON object. Restore the file.")
    return factors


def _slice_file(folder: Path, dataset_id: str | None) -> Path:
    plain = folder / SLICE_FILE
    if plain.is_file():
        return plain
    found = sorted(path for path in folder.glob(f"*_{SLICE_FILE}") if path.is_file())
    if dataset_id is not None:
        found = [path for path in found if path.name == f"{dataset_id}_{SLICE_FILE}"]
    if len(found) == 1:
        return found[0]
    asked = "" if dataset_id is None else f" for dataset_id={dataset_id!r}"
    raise DataError(
        f"{folder} holds {len(found)} feature slice files{asked} ('*_{SLICE_FILE}'), where one is needed. Give the "
        "output folder of Space Ranger (`outs`); where it holds several samples, name one with `dataset_id=`."
    )


def _bins(folder: Path, bin_um: int | Sequence[int] | None) -> tuple[BinFiles, ...]:
    binned = next((path for path in sorted(folder.rglob(_BINNED)) if path.is_dir()), folder)
    present = {
        int(path.name[7:10]): BinFiles(path, int(path.name[7:10]))
        for path in sorted(binned.glob("square_[0-9][0-9][0-9]um"))
        if path.is_dir()
    }
    asked = sorted(present) if bin_um is None else [bin_um] if isinstance(bin_um, int) else list(bin_um)
    if not asked or any(um not in present for um in asked):
        raise DataError(
            f"Bins of {', '.join(map(str, asked)) or 'any'} µm were asked for, and {binned} has "
            f"{', '.join(map(str, present)) or 'no'} µm ('square_008um' and the like). Give the output folder of Space "
            "Ranger for Visium HD, and in `bin_um=` sizes that it has."
        )
    return tuple(present[um] for um in sorted(set(asked)))


def _check_bins(files: BinFiles) -> None:
    for path in (files.matrix, files.positions):
        if not path.is_file():
            raise DataError(f"{path} is missing. Restore it, or leave out its bin size (`bin_um=`).")
    factors = read_scalefactors(files.scalefactors)
    missing = {"bin_size_um", "spot_diameter_fullres", "microns_per_pixel", "tissue_hires_scalef"} - set(factors)
    if missing:
        raise DataError(f"{files.scalefactors} lacks {', '.join(sorted(missing))}: it is not of Visium HD bins.")
    if factors["bin_size_um"] != files.um:
        raise DataError(
            f"{files.scalefactors} is of bins of {factors['bin_size_um']} µm: files of different bin sizes were "
            "swapped. Restore the folder."
        )


def _image(folder: Path, prefix: str) -> Path:
    inside = folder / _IMAGE_FOLDER
    found = inside.iterdir() if inside.is_dir() else folder.glob(f"{prefix}tissue_image.*")
    images = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
    if len(images) == 1:
        return images[0]
    raise DataError(
        f"{folder} holds {len(images)} full-resolution images ('{_IMAGE_FOLDER}/*' or '{prefix}tissue_image.*'), where "
        "one is needed. Space Ranger does not copy it: give the file that went into it with `image=`."
    )


def _given_image(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"There is no image {str(path)!r}.")
    return path


def _previews(folder: Path) -> dict[str, Path]:
    found = {}
    for name in ("tissue_hires_image.png", "tissue_lowres_image.png"):
        path = next((path for path in sorted(folder.rglob(name)) if path.is_file()), None)
        if path is not None:
            found[name] = path
    return found
