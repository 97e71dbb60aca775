"""A training run: what it is made of, and its state between epochs, so that a killed run goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pixnet_sd._files import clear_left_over, file_hash, open_regular, replace_file
from pixnet_sd._schemas import StateSchema, what_is_wrong
from pixnet_sd._util import logger
from pixnet_sd.engine import TrainingSlide
from pixnet_sd.errors import CheckpointError
from pixnet_sd.model import library_versions
from pixnet_sd.params import ObjectiveName, TrainParams

_WARM_UP = 0.2
_FILE, _SEAL_BYTES = "training_state.pt", 64


@dataclass(frozen=True)
class Run:
    """A training run: on what, how, and where its state goes."""

    training: Sequence[TrainingSlide]
    held_out: Sequence[TrainingSlide]  # may be empty: then `patience` and `keep_best` of the parameters do not matter
    params: TrainParams
    directory: Path  # of the state and, with a frozen encoder, of kept features
    fingerprint: str  # of data and settings: a state in the directory is taken up if it has the same
    objective: ObjectiveName = "mse_pcc"  # decides what targets are: logarithms, or raw counts with their sum last
    target_sum: float = 1e4  # of the log-normalised values by which models of counts are compared
    max_epochs: int = 500
    batch_size: int = 8  # tiles of one slide
    seed: int = 0
    save_every_s: float = 60.0  # after which the state is written again

    @cached_property
    def sizes(self) -> list[str]:
        """Name all sizes of the training regions."""
        return list(dict.fromkeys(m.size_name for slide in self.training for m in slide.measured))

    def size_number(self, size_name: str) -> int | None:
        """Number a size among those of the training regions; None if it is not one of them."""
        return self.sizes.index(size_name) if size_name in self.sizes else None

    def learning_rate(self, progress: float) -> float:
        """Compute the rate at a share of the run, 0 to 1; of progress alone, so that a resumed run agrees."""
        lr, anneal = self.params.lr, self.params.anneal
        if anneal is False or (anneal is None and self.held_out):
            return lr
        if progress < _WARM_UP:
            return lr * (0.04 + 0.96 * progress / _WARM_UP)
        return lr * 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


def seal(file: BinaryIO) -> None:
    """Hash the content of a file that is open for reading and writing, and write the SHA-256, as hex, behind it."""
    file.seek(0)
    file.write(file_hash(file).encode())


@contextlib.contextmanager
def _open_sealed(path: Path, most_bytes: int | None) -> Iterator[mmap.mmap]:
    """Map the content of a sealed file, so that what is read is what was hashed; refuse one that was changed."""
    with open_regular(path, most_bytes=most_bytes) as file:
        n_bytes = file.seek(max(file.seek(0, 2) - _SEAL_BYTES, 0))
        digest = file.read()
        with mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ) as content:  # all of a file of less than a seal
            if hashlib.sha256(content).hexdigest().encode() != digest:
                raise ValueError("it was cut off, or is not as it was written")
            yield content


_DECIDING = ("pixnet_sd", "torch", "timm", "numpy")  # libraries that make a network's numbers


def warn_of_versions(before: Mapping[str, str], what: str) -> None:
    """Log that a model or state was made with other versions of the libraries that make a network's numbers."""
    now = library_versions()
    changed = [f"{k} {before[k]} (now {now[k]})" for k in _DECIDING if before.get(k, now[k]) != now[k]]
    if changed:
        logger.warning("%s was made with %s: numbers may differ in their last digits.", what, ", ".join(changed))


@dataclass
class BestEpoch:
    """The epoch, from 1, that did best on held-out regions; 0 before any."""

    epoch: int = 0
    pcc: float = float("-inf")  # held out, mean over sizes and genes
    pcc_per_gene: list[float] = field(default_factory=list)  # mean over slides and sizes
    weights: dict[str, Tensor] = field(default_factory=dict)  # what is trained; empty when the last epoch is kept


@dataclass
class RunState:
    """All that the next epoch depends on; everything random is drawn from the seed and the epoch's number."""

    fingerprint: str  # of the run
    epoch: int = 0  # done, as are steps
    steps: int = 0
    network: dict[str, Tensor] = field(default_factory=dict)  # what is trained: without a frozen encoder
    optimizer: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)  # one row an epoch
    best: BestEpoch = field(default_factory=BestEpoch)
    versions: dict[str, str] = field(default_factory=library_versions)  # that it was made with

    def save(self, directory: Path) -> None:
        """Write atomically: a kill, a full disk or a folder that cannot be written leave the state that was there."""
        content = vars(self) | {"best": vars(self.best)}
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
        """Read the state of the same run, or begin a new one; refuse one of another run, damaged, or too large."""
        path = directory / _FILE
        if not path.exists():
            return cls(fingerprint)
        try:
            with _open_sealed(path, most_bytes) as file:
                content = torch.load(file, "cpu", weights_only=True)  # type: ignore[arg-type]  # a map is read like a file
            StateSchema.model_validate(content)
            state = cls(**content | {"best": BestEpoch(**content["best"])})
        except Exception as error:
            # torch raises half a dozen types for what it did not write; for a user they mean the same.
            why = what_is_wrong(error).rstrip(".") if isinstance(error, ValueError) else type(error).__name__
            message = f"The training state {str(path)!r} cannot be read ({why}). Delete it to train anew."
            raise CheckpointError(message) from error
        if state.fingerprint != fingerprint:
            message = f"{str(path)!r} holds an unfinished run with other data or settings. Delete it to train anew"
            raise CheckpointError(f"{message}, or give another checkpoint_dir.")
        warn_of_versions(state.versions, f"The training state in {str(directory)!r}")
        return state

    @staticmethod
    def is_there(directory: Path) -> bool:
        """Tell whether a run has left a state, whole or not."""
        return (directory / _FILE).exists()

    @staticmethod
    def remove(directory: Path) -> None:
        """Delete the state of a finished run, and its folder when nothing else is in it."""
        (directory / _FILE).unlink(missing_ok=True)
        clear_left_over(directory)
        with contextlib.suppress(OSError):
            directory.rmdir()
