"""What a Space Ranger output folder holds, and whether a store is of it: nothing heavy is imported for that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixnet_sd._notes import file_note
from pixnet_sd.errors import DataError

CONVERTED_FROM = "converted_from"
"""Section of the notes in a converted store: path of a file, relative to the folder, to its size and date."""

_SLICE_FILE = "feature_slice.h5"
_SCALEFACTORS = Path("spatial") / "scalefactors_json.json"
_IMAGE_FOLDER = "microscope_image"


def is_visium_hd(folder: Path) -> bool:
    """Whether a folder is what Space Ranger makes of Visium HD."""
    return (folder / "binned_outputs").is_dir() or any(folder.glob(f"*{_SLICE_FILE}"))


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


def changed_files(folder: Path, store: Path) -> list[str]:
    """Files of a Space Ranger folder other than those a store was converted from; none if the store does not tell."""
    states = file_note(store, CONVERTED_FROM) or {}
    return [name for name, state in states.items() if _file_state(folder / name) != state]


def _file_state(path: Path) -> list[int] | None:
    """Size and date, ns, of a file that is there."""
    if not path.is_file():
        return None
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


@dataclass(frozen=True)
class BinFiles:
    """The files of one bin size."""

    um: int  # side of a bin
    name: str  # of the folder, and of the table: ``square_008um`` or the like
    matrix: Path
    positions: Path
    scalefactors: Path
    factors: dict[str, Any]  # what ``scalefactors`` holds


@dataclass(frozen=True)
class CellFiles:
    """The files of segmented cells."""

    matrix: Path
    outlines: Path  # one polygon per cell
    scalefactors: Path  # may be missing


@dataclass(frozen=True)
class HDFolder:
    """A Space Ranger output folder of Visium HD."""

    slice_file: Path
    dataset_id: str | None  # None leaves it to the reader, which takes it from the name of ``slice_file``
    bins: tuple[BinFiles, ...]  # finest first
    cells: CellFiles | None  # None without segmentation
    image: Path  # of full resolution
    previews: dict[str, Path]  # by name

    def matrices(self) -> dict[str, Path]:
        """What the rows are → file of counts."""
        of_bins = {f"bins of {bins.um} µm": bins.matrix for bins in self.bins}
        return of_bins if self.cells is None else {**of_bins, "cells": self.cells.matrix}

    def states(self) -> dict[str, list[int] | None]:
        """Sizes and dates of all files that are read, for `changed_files`."""
        paths = [self.slice_file, self.image, *self.previews.values()]
        paths += [path for bins in self.bins for path in (bins.matrix, bins.positions, bins.scalefactors)]
        paths += [] if self.cells is None else [self.cells.matrix, self.cells.outlines]
        root = self.slice_file.parent.resolve()
        whole = [path.resolve() for path in paths]
        names = (path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path) for path in whole)
        return dict(zip(names, map(_file_state, whole), strict=True))


def find_files(
    folder: Path, dataset_id: str | None, bin_um: int | Sequence[int] | None, image: str | Path | None
) -> HDFolder:
    """Find all that is converted, where ``spatialdata_io.visium_hd`` would; DataError when one is missing or amiss."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {str(folder)!r}. Give the output folder of Space Ranger (`outs`).")
    if is_visium(folder):
        raise DataError(visium_advice(folder))
    slice_file = _slice_file(folder, dataset_id)
    segmented = folder / "segmented_outputs"
    cell_names = ("filtered_feature_cell_matrix.h5", "cell_segmentations.geojson", _SCALEFACTORS)
    cells = CellFiles(*(segmented / name for name in cell_names))
    previews = [folder.rglob(name) for name in ("tissue_hires_image.png", "tissue_lowres_image.png")]
    return HDFolder(
        slice_file=slice_file,
        dataset_id=dataset_id,
        bins=_bins(folder, bin_um),
        cells=cells if cells.matrix.is_file() and cells.outlines.is_file() else None,
        image=_image(folder, slice_file.name.removesuffix(_SLICE_FILE), image),
        # of several of one name the first
        previews={path.name: path for paths in previews for path in sorted(paths, reverse=True) if path.is_file()},
    )


def _slice_file(folder: Path, dataset_id: str | None) -> Path:
    plain = folder / _SLICE_FILE
    if plain.is_file():
        return plain
    present = sorted(path for path in folder.glob(f"*_{_SLICE_FILE}") if path.is_file())
    if dataset_id is not None:
        present = [path for path in present if path.name == f"{dataset_id}_{_SLICE_FILE}"]
    if len(present) == 1:
        return present[0]
    asked = "" if dataset_id is None else f" for dataset_id={dataset_id!r}"
    raise DataError(
        f"{folder} holds {len(present)} feature slice files{asked} ('*_{_SLICE_FILE}'), where one is needed. Give the "
        "output folder of Space Ranger (`outs`); where it holds several samples, name one with `dataset_id=`."
    )


def _bins(folder: Path, bin_um: int | Sequence[int] | None) -> tuple[BinFiles, ...]:
    binned = next((path for path in sorted(folder.rglob("binned_outputs")) if path.is_dir()), folder)
    folders = sorted(path for path in binned.glob("square_[0-9][0-9][0-9]um") if path.is_dir())
    present = {int(path.name[7:10]): path for path in folders}
    asked = sorted(present) if bin_um is None else [bin_um] if isinstance(bin_um, int) else sorted(set(bin_um))
    if not asked or any(um not in present for um in asked):
        raise DataError(
            f"Bins of {', '.join(map(str, asked)) or 'any'} µm were asked for, and {binned} has "
            f"{', '.join(map(str, present)) or 'no'} µm ('square_008um' and the like). Give the output folder of Space "
            "Ranger for Visium HD, and in `bin_um=` sizes that it has."
        )
    return tuple(_bin_files(um, present[um]) for um in asked)


def _bin_files(um: int, folder: Path) -> BinFiles:
    """Find the files of a bin size where Space Ranger puts them; DataError when one is missing or of another size."""
    matrix, positions = folder / "filtered_feature_bc_matrix.h5", folder / "spatial" / "tissue_positions.parquet"
    for path in (matrix, positions):
        if not path.is_file():
            raise DataError(f"{path} is missing. Restore it, or leave out its bin size (`bin_um=`).")
    path = folder / _SCALEFACTORS
    try:
        factors = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"The scale factors {path} cannot be read ({error}). Restore the file.") from error
    needed = {"bin_size_um", "spot_diameter_fullres", "microns_per_pixel", "tissue_hires_scalef"}
    missing = needed.difference(factors if isinstance(factors, dict) else ())
    if missing:
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}: it is not of Visium HD bins.")
    if factors["bin_size_um"] != um:
        raise DataError(
            f"{path} is of bins of {factors['bin_size_um']} µm: files of different bin sizes were swapped. Restore the "
            "folder."
        )
    return BinFiles(um, folder.name, matrix, positions, path, factors)


def _image(folder: Path, prefix: str, given: str | Path | None) -> Path:
    if given is not None:
        if not Path(given).expanduser().is_file():
            raise DataError(f"There is no image {str(given)!r}.")
        return Path(given).expanduser()
    inside = folder / _IMAGE_FOLDER
    present = inside.iterdir() if inside.is_dir() else folder.glob(f"{prefix}tissue_image.*")
    images = sorted(path for path in present if path.is_file() and not path.name.startswith("."))
    if len(images) == 1:
        return images[0]
    raise DataError(
        f"{folder} holds {len(images)} full-resolution images ('{_IMAGE_FOLDER}/*' or '{prefix}tissue_image.*'), where "
        "one is needed. Space Ranger does not copy it: give the file that went into it with `image=`."
    )
