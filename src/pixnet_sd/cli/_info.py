"""What a store, a checkpoint or a Space Ranger folder holds, and what a prediction on a slide would take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pixnet_sd._util import logger
from pixnet_sd.errors import PixNetError, StoreError

from ._inputs import NOTHING, is_store, space_ranger_folder
from ._messages import as_options_of_convert

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["describe"]

_CHECKPOINT = ", or the folder of a model (a checkpoint has a config.json)"


def describe(
    path: str | Path,
    *,
    model: str | Path | None = None,
    image_key: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | Literal["coordinate_system"] | None = None,
    allow_any_mpp: bool = False,
) -> str:
    """Say what a store, a checkpoint or a Space Ranger folder holds; nothing is changed.

    Parameters
    ----------
    path
        The store or folder.
    model
        Checkpoint that a prediction is estimated for; default: the one that `fit` recorded, else `fit`'s defaults.
    image_key, coordinate_system, mpp, allow_any_mpp
        As in :func:`fit`.

    Returns
    -------
    Lines of text.

    Raises
    ------
    StoreError
        The path is none of these.
    CheckpointError
        The checkpoint is damaged.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise StoreError(NOTHING.format(str(path), _CHECKPOINT))
    logger.info("reading %s", path)  # before the libraries that take seconds to import
    if (folder / "config.json").is_file() and not is_store(folder):
        from ._info_checkpoint import describe_checkpoint

        return describe_checkpoint(folder)
    if is_store(folder):
        from ._info_store import describe_store

        where: Mapping[str, Any] = {"image_key": image_key, "coordinate_system": coordinate_system}
        return describe_store(folder, model, {**where, "mpp": mpp, "allow_any_mpp": allow_any_mpp})
    return _describe_space_ranger(space_ranger_folder(folder, also=_CHECKPOINT))


def _describe_space_ranger(folder: Path) -> str:
    from pixnet_sd.io import find_files, open_matrix

    lines = [f"{folder}: Space Ranger folder of Visium HD"]
    try:
        files = find_files(folder, None, None, None)
    except PixNetError as error:
        return "\n".join([*lines, f"  cannot be converted as it is: {as_options_of_convert(str(error))}"])
    for what, matrix in files.matrices().items():
        with open_matrix(matrix) as counts:
            lines.append(f"  {what}: {counts.n_rows:,}")
    lines += [f"  full-resolution image: {files.image}", f"make a store of it: pixnet-sd convert {folder} STORE"]
    return "\n".join(lines)
