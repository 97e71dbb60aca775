"""Where a store is made before it gets its name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pixnet_sd._errors import StoreError
from pixnet_sd.store._disk import DISK_MARGIN, hold_lock, size_text, work_folder

__all__ = ["check_absent", "scratch_folder"]


def check_absent(target: Path) -> None:
    """Raise when there is something at ``target``.

    Raises
    ------
    StoreError
        Saying so.
    """
    if target.exists():
        raise StoreError(f"{target} exists already. Give another path, or delete it first.")


@contextmanager
def scratch_folder(target: Path, needed_bytes: int) -> Iterator[Path]:
    """Empty folder beside ``target``, for one run at a time; gone at the end.

    Parameters
    ----------
    target
        The coming store.
    needed_bytes
        That it takes at most.

    Raises
    ------
    StoreError
        When there is too little disk, another run is at work, or reading or writing fails.
    """
    work = work_folder(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_free(target, needed_bytes)
        with hold_lock(work / "convert.lock", wait_s=0, busy=f"Another run is writing {target}."):
            scratch = work / "convert"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        free = size_text(shutil.disk_usage(next(path for path in target.parents if path.exists())).free)
        raise StoreError(f"Making {target} failed: {error}; {free} are free there. Nothing was kept.") from error


def _check_free(target: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed_bytes * (1 + DISK_MARGIN) > free:
        raise StoreError(
            f"The store may take up to {size_text(needed_bytes)}, but only {size_text(free)} are free at "
            f"{target.parent}. Free some space, give a path on a larger disk, or leave out bin sizes (`bin_um=`)."
        )
