"""Device and precision, through Lightning Fabric."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning_fabric import Fabric

from pixnet_sd._errors import PixNetError

__all__ = ["make_fabric"]


_COUNT: dict[str, Callable[[], int]] = {
    "cpu": lambda: 1,
    "cuda": lambda: torch.cuda.device_count() if torch.cuda.is_available() else 0,
    "mps": lambda: int(torch.backends.mps.is_available()),
}


def _parse(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in _COUNT:
        raise PixNetError(f"device={str(device)!r} is none that can be used. Use 'cpu', 'cuda', 'cuda:1' or 'mps'.")
    return chosen


def make_fabric(device: str | torch.device | None = None) -> Fabric:
    """Make the Fabric that a run uses: bf16 autocast on a GPU, float32 on a CPU.

    Parameters
    ----------
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; None takes a CUDA GPU if there is one, else the CPU.

    Returns
    -------
    A Fabric for one device.

    Raises
    ------
    PixNetError
        The device does not exist here.
    """
    chosen = _parse(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    n_found = _COUNT[chosen.type]()
    if (chosen.index or 0) >= n_found:
        raise PixNetError(
            f"device={str(device)!r} was asked for, and torch sees {n_found or 'no'} {chosen.type.upper()} GPU. Use "
            "device='cpu', or another number."
        )
    index = None if chosen.type == "cpu" else getattr(chosen, "index", None)
    return Fabric(
        accelerator=chosen.type,
        devices=1 if index is None else [index],
        precision="bf16-mixed" if chosen.type == "cuda" else "32-true",
    )
