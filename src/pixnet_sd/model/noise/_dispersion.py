"""How much counts vary, gene by gene and size by size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_COLUMN, _COLUMNS = "dispersion_{:g}um2", re.compile(r"dispersion_(\d[\d.e+]*)um2")


@dataclass(frozen=True, eq=False)
class Dispersion:
    """How much the counts of M genes vary beyond Poisson, α, in regions of k sizes, ascending."""

    areas_um2: NDArray[np.float64]  # (k,)
    values: NDArray[np.float64]  # (k, M)

    @classmethod
    def learnt(cls, log_dispersion: Tensor, areas_um2: Sequence[float]) -> Dispersion:
        """Take what a network has learnt, (sizes, M); sizes that agree in three digits of their area are averaged."""
        areas, place = np.unique([float(f"{area:.3g}") for area in areas_um2], return_inverse=True)
        logs = log_dispersion.detach().cpu().double().numpy()
        return cls(areas, np.exp([logs[place == k].mean(axis=0) for k in range(len(areas))]))

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """Give them as the columns of a table's ``var``."""
        return {_COLUMN.format(area): row for area, row in zip(self.areas_um2, self.values, strict=True)}

    @classmethod
    def read(cls, var: Any) -> Dispersion | None:
        """Find them among the columns of a table's ``var``; None where there are none."""
        named = filter(None, map(_COLUMNS.fullmatch, map(str, var)))
        sizes = sorted((float(match[1]), match[0]) for match in named)
        if not sizes:
            return None
        return cls(np.array([area for area, _ in sizes]), np.array([np.asarray(var[n], np.float64) for _, n in sizes]))

    def note(self) -> dict[str, Any]:
        """Give them as JSON, to four digits."""
        values = [[float(f"{value:.4g}") for value in row] for row in self.values.tolist()]
        return {"areas_um2": self.areas_um2.tolist(), "values": values}

    @classmethod
    def noted(cls, note: Mapping[str, Any]) -> Dispersion:
        """Read what `note` gives."""
        return cls(np.array(note["areas_um2"], np.float64), np.array(note["values"], np.float64))

    def of(self, genes: NDArray[np.integer]) -> Dispersion:
        """Select genes by position."""
        return Dispersion(self.areas_um2, self.values[:, genes])

    def at(self, areas_um2: NDArray[np.float64]) -> NDArray[np.float64]:
        """Interpolate between sizes, in logarithms, for regions of some areas: (n,) -> (n, M); the ends hold beyond."""
        logs, areas = np.log(self.values), np.log(self.areas_um2)
        inside = np.clip(areas_um2, self.areas_um2[0], self.areas_um2[-1])  # a point has no area
        place = np.interp(np.log(inside), areas, np.arange(len(areas)))
        low = np.minimum(place.astype(np.intp), max(len(areas) - 2, 0))
        share = (place - low)[:, None]
        return np.exp((1 - share) * logs[low] + share * logs[np.minimum(low + 1, len(areas) - 1)])
