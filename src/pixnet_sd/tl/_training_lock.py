"""One run at a time in a checkpoint's folder: two would overwrite one another's state."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from pixnet_sd._errors import CheckpointError, StoreError
from pixnet_sd._files import folder_for, home_expanded
from pixnet_sd.store import CHECKSUMS, hold_lock

__all__ = ["alone_in", "alone_in_checkpoint_dir"]

_LOCK = ".training.lock"

P = ParamSpec("P")
R = TypeVar("R")


def alone_in_checkpoint_dir(verb: Callable[P, R]) -> Callable[P, R]:
    """Make a verb hold the folder that its argument `checkpoint_dir` names, before it does anything that takes long."""

    @functools.wraps(verb)
    def alone(*args: P.args, **options: P.kwargs) -> R:
        directory = options.get("checkpoint_dir")
        if not isinstance(directory, str | Path) or not str(directory):
            return verb(*args, **options)  # a default that is only known later, or an argument that is refused
        with alone_in(home_expanded(directory)):
            return verb(*args, **options)

    return alone


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Hold a checkpoint's folder; one with a finished model is only read, by as many as want to.

    Parameters
    ----------
    directory
        The folder; made if it is not there, and taken back if nothing was put into it.

    Raises
    ------
    CheckpointError
        It cannot be written, or another run is in it.
    """
    if os.path.exists(directory / CHECKSUMS):  # unlike that of a path it raises for no name
        _unlock_left_over(directory)
        yield
        return
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(folder_for(directory))
            with tempfile.TemporaryFile(dir=directory):  # `os.access` is wrong for network mounts and the superuser
                pass
        except (OSError, ValueError) as error:  # the latter: a name that no folder can have
            why = error.strerror if isinstance(error, OSError) else None
            raise CheckpointError(
                f"{str(directory)!r} cannot be written ({why or error}). Give checkpoint_dir= a folder that can be."
            ) from error
        busy = (
            f"Another run is training in {str(directory)!r}. Give another checkpoint_dir, or wait: the same call takes "
            "the model when that run has finished."
        )
        try:
            held.enter_context(hold_lock(directory / _LOCK, wait_s=0, busy=busy))
        except StoreError as error:
            raise CheckpointError(str(error)) from error
        yield


def _unlock_left_over(directory: Path) -> None:
    """Remove the lock file of a run that was killed when its model was there."""
    if (directory / _LOCK).exists():
        with contextlib.suppress(OSError, StoreError), hold_lock(directory / _LOCK, wait_s=0, busy=""):
            pass
