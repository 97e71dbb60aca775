"""Slides that a command line names: stores, or Space Ranger folders, which become stores first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from pixnet_sd._util import logger
from pixnet_sd.errors import PixNetError, StoreError
from pixnet_sd.io import changed_files, is_visium, is_visium_hd, visium_advice

from ._messages import as_options_of_convert

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spatialdata import SpatialData

__all__ = ["NOTHING", "is_store", "named_paths", "open_slide", "open_slides", "space_ranger_folder"]

_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<path>.+)")
_OUTS = "outs"
NOTHING = "There is nothing at {!r}. Give the folder that sdata.write(...) made, or Space Ranger's outs{}."
"""Of a path, and of what else can be given."""


def is_store(path: Path) -> bool:
    """Whether a folder is a Zarr store."""
    return (path / "zarr.json").is_file() or (path / ".zgroup").is_file()


def space_ranger_folder(path: Path, *, also: str = "") -> Path:
    """The Space Ranger folder of Visium HD that a path is, or has as its ``outs``.

    Parameters
    ----------
    path
        A folder that is no store.
    also
        What else could have been given, for the message.

    Raises
    ------
    StoreError
        It is none; says what to give.
    """
    for folder in (path, path / _OUTS):
        if is_visium_hd(folder):
            return folder
        if is_visium(folder):
            raise StoreError(visium_advice(folder))
    raise StoreError(
        f"{str(path)!r} is neither a SpatialData store (it has no zarr.json) nor a Space Ranger folder of Visium "
        "HD (no binned_outputs, no *feature_slice.h5). Give the folder that sdata.write(...) made, or Space "
        f"Ranger's outs{also}."
    )


def named_paths(slides: Sequence[str]) -> dict[str, Path]:
    """Paths by the slide's name: ``NAME=PATH``, or a path after whose file the slide is called.

    Raises
    ------
    PixNetError
        A name is given twice.
    """
    found: dict[str, Path] = {}
    for text in slides:
        match = None if Path(text).exists() else _NAMED.fullmatch(text)
        path = Path(match["path"] if match else text).expanduser()
        name = match["name"] if match else _name(path)
        if name in found:
            raise PixNetError(
                f"Two slides are called {name!r}: {str(found[name])!r} and {str(path)!r}. Give them names, as in "
                f"{name}_1={found[name]} {name}_2={path}."
            )
        found[name] = path
    return found


def _name(path: Path) -> str:
    """Of the file; of ``sample/outs``, which all samples have, the sample."""
    path = path.resolve()
    return path.parent.name if path.name == _OUTS else path.name.removesuffix(".zarr")


def open_slides(slides: Sequence[str], store: str | None) -> dict[str, SpatialData]:
    """Open slides by name.

    Parameters
    ----------
    slides
        As on the command line.
    store
        Where the store of a Space Ranger folder is to be.

    Raises
    ------
    PixNetError
        A path is neither kind, a name is given twice, or `store` is not for one folder.
    """
    paths = named_paths(slides)
    if store is not None and len(paths) > 1:
        raise PixNetError(
            f"--zarr names one store, and there are {len(paths)} slides. Leave it out: each Space Ranger folder gets "
            "a store beside it. Or convert them first with pixnet-sd convert."
        )
    return {name: open_slide(path, store) for name, path in paths.items()}


def open_slide(path: Path, store: str | None = None) -> SpatialData:
    """Open a store, or make one of a Space Ranger folder; arguments as of `open_slides`."""
    if not path.exists():
        raise StoreError(NOTHING.format(str(path), ""))
    if path.is_dir() and not is_store(path):
        path = _converted(path, store)
    elif store is not None:
        raise PixNetError(f"--zarr is for Space Ranger folders, and {str(path)!r} is none. Leave it out.")
    logger.info("reading %s", path)  # before the libraries that take seconds to import
    from pixnet_sd.slide.elements import open_store

    return open_store(path)


def _converted(path: Path, store: str | None) -> Path:
    folder = space_ranger_folder(path)
    whole = folder.resolve()
    target = whole.with_name(f"{whole.name}.zarr") if store is None else Path(store).expanduser()
    if is_store(target):  # it appears under its name only when it is complete
        changed = changed_files(folder, target)
        if changed:
            raise StoreError(
                f"{str(target)!r} was converted from other files than {str(folder)!r} has now: {changed[0]!r} and "
                f"{len(changed) - 1} more were changed or moved since. Delete the store, or give --zarr another path."
            )
        logger.info("%s was converted before: taking %s", folder, target)
        return target
    logger.info("converting the Space Ranger folder %s to the store %s", folder, target)
    from pixnet_sd.io import convert_visium_hd

    try:
        convert_visium_hd(folder, target)
    except PixNetError as error:
        raise type(error)(as_options_of_convert(str(error))) from error
    return target
