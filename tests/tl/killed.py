"""Start a prediction and a training run in child processes and kill each half-way. Started by test_resume.py.

Usage: ``python killed.py FITTED_STORE SLIDE_STORE CHECKPOINT ARGUMENTS``, the last of them JSON for `fit`; prints how
many children were killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable

import spatialdata as sd
import torch

import pixnet_sd.store._map_layout as layout
import pixnet_sd.tl as tl
from pixnet_sd.engine.state import RunState
from pixnet_sd.nn.model import Network


def kill_in_forward(due: Callable[[], bool]) -> None:
    """Kill this process in the first forward pass at which ``due`` says so."""
    forward = Network.forward

    def deadly(self: Network, image: torch.Tensor) -> torch.Tensor:
        if due():
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, image)

    Network.forward = deadly


def predict(store: str) -> None:
    """At the fourth of four tiles, each of which is a block of the map: the first is on disk by then."""
    layout.MAX_BLOCK_PX = 32
    passes = iter(range(1, 5))
    kill_in_forward(lambda: next(passes) == 4)
    tl.predict(sd.read_zarr(store), tile_px=128, radius_um=8, device="cpu", show_progress_bar=False)


def fit(store: str, checkpoint: str, arguments: str) -> None:
    """In the second epoch: its first forward pass after the state of the first was written."""
    saved = []
    save = RunState.save

    def noting(self: RunState, directory: object) -> None:
        save(self, directory)
        saved.append(self.epoch)

    RunState.save = noting
    kill_in_forward(lambda: bool(saved))
    tl.fit(sd.read_zarr(store), checkpoint_dir=checkpoint, **json.loads(arguments))


def in_child(function: Callable[..., None], *arguments: str) -> bool:
    """Whether a forked child was killed."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    torch.set_num_threads(1)
    function(*arguments)
    os._exit(0)


if __name__ == "__main__":
    fitted, slide, checkpoint, arguments = sys.argv[1:]
    killed = in_child(predict, fitted) + in_child(fit, slide, checkpoint, arguments)
    sys.stdout.write(f"{killed} killed\n")
