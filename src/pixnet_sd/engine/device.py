"""Device and precision, through Lightning Fabric."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric

from pixnet_sd._errors import PixNetError

__all__ = ["fixed_shapes", "make_fabric"]

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
    """Make the Fabric that a run uses: bf16 autocast on a GPU that computes in bf16, float32 elsewhere.

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
            f"{'another number, or ' if n_found else ''}device='cpu'."
        )
    index = None if chosen.type == "cpu" else getattr(chosen, "index", None)
    return Fabric(
        accelerator=chosen.type,
        devices=1 if index is None else [index],
        precision="bf16-mixed" if chosen.type == "cuda" and _has_bf16() else "32-true",
    )


def _has_bf16() -> bool:
    """Whether CUDA GPUs compute in bf16; before Ampere they emulate it, which is slower than float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def fixed_shapes(device: torch.device) -> Iterator[None]:
    """For a run whose tiles all have one size: let cuDNN try its kernels on the first, and keep the fastest.

    Convolutions are in bf16; what is left in float32 (aggregation, head) is small and stays exact, so TF32 is left as
    it is set.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
