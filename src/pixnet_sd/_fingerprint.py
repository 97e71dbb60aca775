"""Fingerprints: what an answer depends on, part by part, so that two can be compared and a difference be named."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def content_sha256(*pieces: str | bytes | NDArray[Any]) -> str:
    """Hash texts, bytes and arrays, each framed by kind and size so that no two lists of them share a hash; as hex."""
    digest = hashlib.sha256()
    for piece in pieces:
        if isinstance(piece, np.ndarray):
            array = np.ascontiguousarray(piece)  # arrays of equal values are equal, however they lie in memory
            digest.update(f"array {array.dtype.str} {array.shape} ".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
            continue
        content = piece.encode() if isinstance(piece, str) else piece
        digest.update(f"{type(piece).__name__} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Hash nested parts that an answer depends on, whatever their order, as hex."""
    return content_sha256(json.dumps(parts, sort_keys=True, default=_plain))


def as_json(parts: Any) -> Any:
    """Parts as they come back from JSON."""
    return json.loads(json.dumps(parts, default=_plain))


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as JSON has them."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be part of a fingerprint")


def differing_parts(before: Any, now: Any) -> list[str]:
    """Name the parts in which two answers differ, such as ``"slides / a / pixels"``; one may come from JSON."""
    return list(_differing(as_json(before), as_json(now)))


def _differing(before: Any, now: Any, place: tuple[str, ...] = ()) -> Iterable[str]:
    if not (isinstance(before, dict) and isinstance(now, dict)):
        if before != now:
            yield " / ".join(place) or "everything"
        return
    for key in dict.fromkeys([*before, *now]):
        if key not in before or key not in now:
            yield " / ".join((*place, key))
        else:
            yield from _differing(before[key], now[key], (*place, key))


def files_sha256(folder: Path) -> tuple[str, int]:
    """Hash names, sizes and dates of all files below a folder; and the latest date, ns.

    Dates are taken from opened files, of which network file systems ask the server anew. Moving the folder on one file
    system changes none of them; copying, or writing a file again, does.
    """
    digest, newest_ns = hashlib.sha256(), 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            about = os.fstat(file.fileno())
        newest_ns = max(newest_ns, about.st_mtime_ns, about.st_ctime_ns)
        dates = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
        digest.update(f"{path.relative_to(folder).as_posix()} {dates}\n".encode())
    return digest.hexdigest(), newest_ns
