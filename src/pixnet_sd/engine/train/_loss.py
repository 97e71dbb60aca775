"""The loss of a batch and its gradient, some outputs at a time where there are many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from torch import Tensor

from pixnet_sd.model import Densities, Network, Objective, Operator, Part

from ._batches import Target, block_of, output_blocks


@dataclass(frozen=True)
class BatchLoss:
    """Mean over region sizes of the objective, every size with the same weight, however many regions it has.

    A tile holds 64 times as many 2 µm bins as 16 µm ones; weighted by their number, the noisiest size would decide.
    """

    network: Network
    objective: Objective
    operators: list[Operator]  # of each size
    targets: list[Target]
    sizes: list[int]  # numbers among all sizes of the run
    depth: float = 1.0  # counts of this slide relative to the mean of all, where they are what is learnt
    block_size: int | None = None  # outputs that are held together; None: as many as memory allows

    def backward(self, features: Tensor, fabric: Fabric) -> Tensor:
        """Add the gradient to that of all parameters, from D (B, C, h, w); returns the loss, detached."""
        used = [k for k, target in enumerate(self.targets) if target.shape[0]]  # sizes with regions in these tiles
        inputs = [self.network.region_inputs(features, self.operators[k]) for k in used]
        n_rows = max(max(len(rows), self.targets[k].shape[0]) for k, rows in zip(used, inputs, strict=True))
        blocks = output_blocks(self.network.head.n_outputs, n_rows, self.block_size)
        varying = [
            self.objective.n_varying(block_of(self.targets[k], block, features.device) for block in blocks)
            for k in used
        ]
        if len(blocks) == 1:
            loss = self._block(blocks[0], used, inputs, varying)
            fabric.backward(loss)
            return loss.detach()
        # The gradient stops at what all blocks share, and is carried on from there once.
        leaves = [rows.detach().requires_grad_() for rows in inputs]
        total = features.new_zeros(())
        for block in blocks:
            loss = self._block(block, used, leaves, varying)
            fabric.backward(loss)
            total += loss.detach()
        carried = [(rows * leaf.grad).sum() for rows, leaf in zip(inputs, leaves, strict=True) if leaf.grad is not None]
        fabric.backward(torch.stack(carried).sum())
        return total

    def _block(self, outputs: slice, used: list[int], inputs: list[Tensor], varying: list[Tensor | None]) -> Tensor:
        """Compute the share of the loss that a group of outputs has."""
        losses = []
        for k, rows, n_varying in zip(used, inputs, varying, strict=True):
            predicted = self.network.region_values(rows, self.operators[k], outputs)
            if self.depth != 1:
                predicted = predicted * self.depth
            densities = self._densities(k, outputs, rows) if self.objective.has_total else None
            about = Part(outputs, self.network.head.n_outputs, n_varying, self.sizes[k], densities)
            losses.append(self.objective.part(predicted, block_of(self.targets[k], outputs, rows.device), about))
        return torch.stack(losses).mean()

    def _densities(self, k: int, outputs: slice, rows: Tensor) -> Densities:
        """Compute usual counts, and the sums over all genes."""
        operator, unit = self.operators[k], self.depth * self.network.head.unit
        n_px = torch.as_tensor(operator.n_px, dtype=unit.dtype, device=unit.device)[:, None]
        last = slice(len(unit) - 1, len(unit))
        total = self.network.region_values(rows, operator, last) * self.depth
        return Densities(n_px * unit[outputs], n_px * unit[last], total, block_of(self.targets[k], last, unit.device))
