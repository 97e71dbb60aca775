"""Targets of a batch: dense, or, of a whole transcriptome, made dense some outputs at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pixnet_sd.nn.staged_matrix import Move

__all__ = ["DENSE_OUTPUTS", "SparseTargets", "Target", "block_of", "moved", "output_blocks"]

DENSE_OUTPUTS = 1024
"""Most outputs that are held for all regions of a batch."""

_BLOCK_BYTES = 2**27
_FEWEST = 64  # outputs that are worth a look of their own


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Targets of n regions as compressed columns, on the host.

    Attributes
    ----------
    columns
        SciPy's CSC matrix, shape (n, M).
    """

    columns: Any

    def __len__(self) -> int:
        return int(self.columns.shape[0])

    def block(self, outputs: slice) -> Tensor:
        """Some outputs, shape (n, outputs), float32."""
        return torch.from_numpy(self.columns[:, outputs].toarray().astype(np.float32, copy=False))


Target: TypeAlias = "Tensor | SparseTargets"


def block_of(target: Target, outputs: slice, device: torch.device) -> Tensor:
    """Some outputs of a target, on a device."""
    found = target.block(outputs) if isinstance(target, SparseTargets) else target[:, outputs]
    return found.to(device)


def moved(target: Target, move: Move) -> Target:
    """A dense target moved; others stay until they are asked for."""
    return target if isinstance(target, SparseTargets) else move(target)


def output_blocks(n_outputs: int, n_rows: int) -> list[slice]:
    """Outputs in groups that are small enough to be looked at together, for so many regions or pixels."""
    size = n_outputs if n_outputs <= DENSE_OUTPUTS else max(_FEWEST, _BLOCK_BYTES // (4 * max(n_rows, 1)))
    return [slice(start, min(start + size, n_outputs)) for start in range(0, n_outputs, size)]
