"""State of a run between epochs, so that a killed run goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixnet_sd._errors import CheckpointError

__all__ = ["BestEpoch", "RunState"]

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
        partial = directory / f"{_FILE}.partial"
        content = {k: v for k, v in vars(self).items() if k != "best"} | {"best": asdict(self.best)}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(directory / _FILE)
        except (OSError, RuntimeError) as error:  # torch's writer passes a full disk on as a RuntimeError
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise CheckpointError(
                f"The training state of epoch {self.epoch} cannot be written to {str(directory)!r} ({error}). Free "
                "some disk and make the same call again: it goes on from the last epoch that was written."
            ) from error

    @classmethod
    def load(cls, directory: Path, fingerprint: str) -> RunState:
        """Read the state of the same run, or begin a new one.

        Parameters
        ----------
        directory
            Where `save` wrote.
        fingerprint
            Of this run.

        Returns
        -------
        The saved state, or an empty one when there is none.

        Raises
        ------
        CheckpointError
            The state is of another run, or cannot be read.
        """
        path = directory / _FILE
        if not path.exists():
            return cls(fingerprint)
        try:
            content = torch.load(path, "cpu", weights_only=True)
            state = cls(**content | {"best": BestEpoch(**content["best"])})
        except Exception as error:
            # torch raises half a dozen types for a damaged file; for a user they mean the same.
            raise CheckpointError(
                f"The training state {str(path)!r} cannot be read ({type(error).__name__}). Delete it to train anew."
            ) from error
        if state.fingerprint != fingerprint:
            raise CheckpointError(
                f"{str(directory.parent)!r} holds an unfinished run with other data or settings. Give another "
                f"checkpoint_dir, or delete {str(path)!r} to train anew."
            )
        return state

    @staticmethod
    def remove(directory: Path) -> None:
        """Delete the state of a finished run, and its folder when nothing else is in it."""
        (directory / _FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            directory.rmdir()
