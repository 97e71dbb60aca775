"""A file that ends with the hash of what is before, so that a flipped bit in it is noticed."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pixnet_sd._files import file_hash, open_regular

__all__ = ["open_sealed", "seal"]

_SEAL = re.compile(rb"\nsha256 ([0-9a-f]{64}) of (\d{20}) bytes\n")
_SEAL_BYTES = 103


def seal(file: BinaryIO) -> None:
    """Hash what a file holds, and write the hash behind it.

    Parameters
    ----------
    file
        Open for reading and writing.
    """
    file.seek(0)
    digest = file_hash(file)
    file.write(f"\nsha256 {digest} of {file.tell():020d} bytes\n".encode())


@contextlib.contextmanager
def open_sealed(path: Path, *, most_bytes: int | None = None) -> Iterator[mmap.mmap]:
    """Open what was sealed, without the seal, if it is as it was.

    Parameters
    ----------
    path
        The file.
    most_bytes
        Largest size that is believed; None: any.

    Yields
    ------
    The content, to read from. It is mapped, so that what is read is what was hashed.

    Raises
    ------
    CheckpointError
        No regular file, too large, or it may not be read.
    ValueError
        It is not as it was written.
    """
    with open_regular(path, most_bytes=most_bytes) as file:
        n_bytes = file.seek(0, 2) - _SEAL_BYTES
        file.seek(max(n_bytes, 0))
        found = _SEAL.fullmatch(file.read())
        if found is None or int(found[2]) != n_bytes or n_bytes == 0:
            raise ValueError("it was cut off, or does not end as it was written")
        with mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ) as content:
            if hashlib.sha256(content).hexdigest().encode() != found[1]:
                raise ValueError("it is not as it was written")
            yield content
