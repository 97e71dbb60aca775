"""Compact copies of tables' counts, kept beside the checkpoint and used again as long as the tables stay the same."""

from __future__ import annotations

import hashlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from pixnet_sd._errors import StoreError
from pixnet_sd._folders import no_empty_folders_left
from pixnet_sd._logging import logger

from ._count_checks import checked_blocks
from ._count_file import CountFile, Rows, open_counts, write_counts
from ._count_kind import Look
from ._measured import Measured

__all__ = ["cached", "content_key", "own_counts"]

_SCRATCH = ".partial"
_ABANDONED_S = 24 * 3600


def own_counts(measured: Measured, genes: pd.Index, folder: Path) -> CountFile:
    """Counts of some genes of a table, in the order of its regions, read in one pass if they are not there yet.

    Parameters
    ----------
    measured
        Regions and their counts.
    genes
        Genes, all of them in the table.
    folder
        Folder of all caches.

    Raises
    ------
    DataError
        If a count is NaN, infinite or negative.
    StoreError
        If the folder cannot be written, or the disk is full.
    """
    columns = measured.var_names.get_indexer(genes)
    look = Look()
    seen = {"kind": lambda: look.kind, "largest": lambda: look.largest}

    def blocks() -> Iterator[Rows]:
        for _, block, total in checked_blocks(measured.counts, measured.var_names, measured.what, look):
            yield block[:, columns], total

    def build(into: Path) -> None:
        if measured.place is None:
            write_counts(into, blocks(), len(genes), key=key, **seen)
            return
        with tempfile.TemporaryDirectory(dir=into) as scratch:  # in the table's order first
            write_counts(Path(scratch), blocks(), len(genes), key=key, **seen)
            found = open_counts(Path(scratch), key=key)
            if found is None:
                raise OSError("what was written cannot be read back")
            write_counts(into, found.blocks(measured.place), len(genes), key=key, **seen)

    key = content_key(measured, genes)
    return cached(folder, key, build, measured.what)


def content_key(measured: Measured, genes: pd.Index) -> str:
    """Hash of all that decides what a cache holds: counts as they are stored, which rows in which order, and genes."""
    digest = hashlib.sha256()
    if measured.place is not None:
        digest.update(measured.place.data)
    for names in (measured.var_names, genes):
        digest.update("\n".join(map(str, names)).encode())
    for piece in measured.counts.content():
        digest.update(piece)
    return digest.hexdigest()


def cached(folder: Path, key: str, build: Callable[[Path], None], what: str) -> CountFile:
    """Counts under a key, built if they are not there or damaged.

    A cache appears whole or not at all: it is built aside and renamed. Two runs may build the same one; either will do.

    Parameters
    ----------
    folder
        Folder of all caches.
    key
        Hash of what it holds.
    build
        Writes it, key included, into an empty folder.
    what
        Name of the table, for messages.

    Raises
    ------
    StoreError
        If it cannot be written.
    """
    home = folder / key[:16]
    found = open_counts(home, key=key)
    if found is not None:
        logger.info("%s: counts taken from the cache %s", what, home)
        return found
    with no_empty_folders_left(folder):
        _build(folder, key, build, what)
    found = open_counts(home, key=key)
    if found is None:
        raise StoreError(f"{what}: the counts in {str(home)!r} were changed while they were written. Try again.")
    logger.info("%s: counts of %d genes in %d regions cached in %s", what, found.n_genes, found.n, home)
    return found


def _build(folder: Path, key: str, build: Callable[[Path], None], what: str) -> None:
    """Build a cache aside and rename it."""
    home, scratch = folder / key[:16], None
    try:
        scratch = _scratch(folder, key)
        build(scratch)
        shutil.rmtree(home, ignore_errors=True)
        scratch.replace(home)
    except OSError as error:
        raise StoreError(_cannot_write(folder, what, error)) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _scratch(folder: Path, key: str) -> Path:
    """A folder to build in; what runs that were killed have left of the same cache goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{key[:16]}{_SCRATCH}-*"):
        if time.time() - left.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)
    scratch = folder / f"{key[:16]}{_SCRATCH}-{secrets.token_hex(4)}"
    scratch.mkdir()
    return scratch


def _cannot_write(folder: Path, what: str, error: OSError) -> str:
    free = f"{shutil.disk_usage(folder).free / 1e9:.1f} GB are free there" if folder.exists() else "it is not there"
    return (
        f"{what}: a compact copy of the counts cannot be written to {str(folder)!r} ({error.strerror or error}; "
        f"{free}). Free space, or give checkpoint_dir= on a disk with room: the copy goes beside it. Nothing was left "
        "behind."
    )
