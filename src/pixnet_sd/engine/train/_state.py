"""A file that ends with the hash of what is before, so that a flipped bit in it is noticed.

State of a run between epochs, so that a killed run goes on as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pixnet_sd._files import clear_left_over, file_hash, open_regular, replace_file
from pixnet_sd._schemas import StateSchema, validated, what_is_wrong
from pixnet_sd.errors import CheckpointError

__all__ = ["BestEpoch", "RunState", "open_sealed", "seal"]

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


_FILE = "training_state.pt"


@dataclass
class BestEpoch:
    """The epoch that did best on held-out regions.

    Attributes
    ----------
    epoch
        Its number, from 1; 0 before any.
    pcc
        Its held-out PCC, mean over sizes and genes.
    pcc_per_gene
        Per gene, mean over slides and sizes.
    weights
        The network then; empty when nothing is held out.
    """

    epoch: int = 0
    pcc: float = float("-inf")
    pcc_per_gene: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class RunState:
    """All that the next epoch depends on; everything random is drawn from the seed and the epoch's number.

    Attributes
    ----------
    fingerprint
        Of the data and settings; a state is only taken up by the same run.
    epoch, steps
        Epochs and optimizer steps done.
    network, optimizer
        Their state dicts.
    extras
        That of what is learnt and not kept: dispersions of counts.
    history
        One row an epoch.
    best
        The best epoch so far.
    """

    fingerprint: str
    epoch: int = 0
    steps: int = 0
    network: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    best: BestEpoch = field(default_factory=BestEpoch)

    def save(self, directory: Path) -> None:
        """Write atomically: a kill in the middle leaves the state of the epoch before.

        Raises
        ------
        CheckpointError
            The disk is full, or the folder cannot be written; the state of the epoch before is still there.
        """
        content = {k: v for k, v in vars(self).items() if k != "best"} | {"best": asdict(self.best)}
        try:
            with replace_file(directory / _FILE) as aside, aside.open("w+b") as file:
                torch.save(content, file)
                seal(file)
        except (OSError, RuntimeError) as error:  # torch's writer passes a full disk on as a RuntimeError
            raise CheckpointError(
                f"The training state of epoch {self.epoch} cannot be written to {str(directory)!r} ({error}). Free "
                "some disk and make the same call again: it goes on from the last epoch that was written."
            ) from error

    @classmethod
    def load(cls, directory: Path, fingerprint: str, *, most_bytes: int | None = None) -> RunState:
        """Read the state of the same run, or begin a new one.

        Parameters
        ----------
        directory
            Where `save` wrote.
        fingerprint
            Of this run.
        most_bytes
            Largest size that its state can have; None: any.

        Returns
        -------
        The saved state, or an empty one when there is none.

        Raises
        ------
        CheckpointError
            The state is of another run, or damaged.
        """
        path = directory / _FILE
        if not path.exists():
            return cls(fingerprint)
        try:
            with open_sealed(path, most_bytes=most_bytes) as file:
                content = torch.load(file, "cpu", weights_only=True)  # type: ignore[arg-type]  # a map is read like a file
            validated(StateSchema, content)
            state = cls(**content | {"best": BestEpoch(**content["best"])})
        except CheckpointError as error:
            raise CheckpointError(_unusable(path, str(error).rstrip("."))) from error
        except ValueError as error:
            raise CheckpointError(_unusable(path, what_is_wrong(error))) from error
        except Exception as error:
            # torch raises half a dozen types for what it did not write; for a user they mean the same.
            raise CheckpointError(_unusable(path, type(error).__name__)) from error
        if state.fingerprint != fingerprint:
            raise CheckpointError(
                f"{str(directory.parent)!r} holds an unfinished run with other data or settings. Give another "
                f"checkpoint_dir, or delete {str(path)!r} to train anew."
            )
        return state

    @staticmethod
    def is_there(directory: Path) -> bool:
        """Whether a run has left a state, whole or not."""
        return (directory / _FILE).exists()

    @staticmethod
    def remove(directory: Path) -> None:
        """Delete the state of a finished run, and its folder when nothing else is in it."""
        (directory / _FILE).unlink(missing_ok=True)
        clear_left_over(directory)
        with contextlib.suppress(OSError):
            directory.rmdir()


def _unusable(path: Path, why: str) -> str:
    return f"The training state {str(path)!r} cannot be read ({why}). Delete it to train anew."
