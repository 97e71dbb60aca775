"""Device and precision, through Lightning Fabric."""

from __future__ import annotations

import torch
from lightning_fabric import Fabric

from pixnet_sd._errors import PixNetError

__all__ = ["make_fabric"]


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
    chosen = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise PixNetError(f"device={str(device)!r} was asked for, and torch sees no CUDA GPU. Use device='cpu'.")
    precision = "bf16-mixed" if chosen.type == "cuda" else "32-true"
    devices = 1 if chosen.index is None else [chosen.index]
    return Fabric(accelerator=chosen.type, devices=1 if chosen.type == "cpu" else devices, precision=precision)
