"""From sums over regions to what a table says of them, and in which units."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pixnet_sd.nn.model import apply_head
from pixnet_sd.nn.objectives import log_normalised
from pixnet_sd.store import Express, Expressed, ModelRecord, PixNet, expression

__all__ = ["Units", "express", "units_of"]

COUNTS, TOTAL = "expected_counts", "expected_total_counts"


@dataclass(frozen=True)
class Units:
    """What the numbers of a prediction are, in words.

    Attributes
    ----------
    map, x
        Of the map, and of a table's ``X``.
    layers
        Of each layer of a table.
    """

    map: str
    x: str
    layers: dict[str, str] = field(default_factory=dict)

    @property
    def table(self) -> dict[str, Any]:
        """Entries for a table's ``uns``."""
        return {"X": self.x, "layers": self.layers}


def units_of(record: ModelRecord) -> Units:
    """Units of a model's predictions."""
    logs = "log1p({:g} * {} / sum), natural logarithm, the sum over all genes measured"
    if record.objective == "mse_pcc":
        pooled = "sum over a region's pixels of" if record.aggregation == "sum" else "mean over a region's pixels of"
        measured = logs.format(record.target_sum, "counts")
        return Units(measured, f"{pooled} {measured}")
    counts = "expected counts in a region, at the mean depth of the training slides; they add up over regions"
    return Units("counts per µm²", logs.format(record.target_sum, COUNTS), {COUNTS: counts})


def express(model: PixNet, index: NDArray[np.intp], n_columns: int) -> Express:
    """What makes values of the sums over regions.

    Parameters
    ----------
    model
        The model.
    index
        Genes that are predicted, among the model's.
    n_columns
        Columns of the sums: one a gene (and one for all of them, of a model of counts), or one for each channel of D.

    Returns
    -------
    See `Express`.
    """
    record, head = model.record, model.network.head
    if record.objective != "mse_pcc":
        return partial(_counts, px_um2=record.working_mpp**2, target_sum=record.target_sum)
    if n_columns == len(index):
        return partial(expression, aggregation=record.aggregation)
    weight, bias = (part.detach().cpu().float()[index] for part in (head.weight, head.bias))

    @torch.inference_mode()
    def values(pooled: NDArray[np.float32], n_px: NDArray[np.float64]) -> Expressed:
        n_px_column = torch.from_numpy(n_px).float()[:, None]
        return Expressed(apply_head(torch.from_numpy(pooled), n_px_column, weight, bias, record.aggregation).numpy())

    return values


def _counts(sums: NDArray[np.float32], _n_px: NDArray[np.float64], *, px_um2: float, target_sum: float) -> Expressed:
    """Of a model of counts, from sums of densities per µm² over pixels, the last column that of all genes."""
    expected = sums * np.float32(px_um2)
    counts, total = np.ascontiguousarray(expected[:, :-1]), expected[:, -1:]
    x = log_normalised(torch.from_numpy(counts), torch.from_numpy(total), target_sum).numpy()
    return Expressed(x, {COUNTS: counts}, {TOTAL: total[:, 0]})
