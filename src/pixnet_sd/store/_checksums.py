"""Hashes of a model's files, in ``checksums.json``: made when they are written, and looked at when they are read."""

from __future__ import annotations

import json
from pathlib import Path

from pixnet_sd._errors import CheckpointError
from pixnet_sd._files import hash_regular, read_regular
from pixnet_sd._schemas import ChecksumsSchema, FileSchema, parse_json, validated, what_is_wrong

__all__ = ["CHECKSUMS", "check_file", "write_checksums"]

CHECKSUMS = "checksums.json"

_MOST_BYTES = 1 << 16


def write_checksums(folder: Path, names: list[str]) -> None:
    """Write the hashes of some files of a folder beside them."""
    files = {name: _checksum(folder / name).model_dump() for name in names}
    (folder / CHECKSUMS).write_text(json.dumps({"files": files}, indent=2), encoding="utf-8")


def check_file(path: Path, *, most_bytes: int | None = None) -> None:
    """Look whether a file of a model is as it was written.

    Parameters
    ----------
    path
        The file, in the folder of its model.
    most_bytes
        Largest size that it can have, whatever was noted.

    Raises
    ------
    CheckpointError
        It is missing, no regular file or another one than was written; or nothing is known of it.
    """
    noted = _noted(path)
    try:
        found = _checksum(path, most_bytes=noted.bytes if most_bytes is None else min(noted.bytes, most_bytes))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{str(path)!r} is missing, and a model has it. Restore it, or train again.") from error
    if found != noted:
        raise CheckpointError(
            f"{str(path)!r} is not as it was written, says {CHECKSUMS} beside it: it was truncated, changed by "
            "hand or replaced, or saving was cut off. Restore the folder, or train again."
        )


def _checksum(path: Path, *, most_bytes: int | None = None) -> FileSchema:
    n_bytes, sha256 = hash_regular(path, most_bytes=most_bytes)
    return FileSchema(bytes=n_bytes, sha256=sha256)


def _noted(path: Path) -> FileSchema:
    where = path.with_name(CHECKSUMS)
    try:
        noted = validated(ChecksumsSchema, parse_json(read_regular(where, most_bytes=_MOST_BYTES)))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{str(path.parent)!r} has no {CHECKSUMS}, so nobody knows whether the model in it is whole: it was copied "
            "in part, or saving was cut off. Restore the folder, or train again."
        ) from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"{str(where)!r} is damaged ({what_is_wrong(error)}). Restore it, or train again."
        ) from error
    if path.name not in noted.files:
        raise CheckpointError(f"{str(where)!r} is damaged ({path.name} is not in it). Restore it, or train again.")
    return noted.files[path.name]
