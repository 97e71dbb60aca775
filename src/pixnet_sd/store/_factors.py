"""A gene map kept as its factors: the C channels of the feature map, and a table with the weights of every gene.

A gene of a linear head is a weighted sum of them, ``D W + b``, with b where tissue is: the last channel is 1 there and
0 elsewhere, so that averages of pixels, and with them the coarser levels, need no exception. Densities are what a link
makes of such sums, ``unit softplus(D W + b)``, pixel by pixel, times that of all genes (see `nn.head.Head`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
from spatialdata.models import TableModel

from pixnet_sd._errors import DataError, ElementError

from ._provenance import stored_note

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from spatialdata import SpatialData

__all__ = ["FactorHead", "factor_names", "factors_key", "head_key", "read_head"]

TISSUE = "tissue"
_AT_ONE = np.float32(math.log(math.e - 1))  # where softplus is 1


def factors_key(key_added: str) -> str:
    """Name of the image of the factors."""
    return f"{key_added}_factors"


def head_key(key: str) -> str:
    """Name of the table of weights that belongs to an image of factors."""
    return f"{key}_head"


def factor_names(n_factors: int) -> list[str]:
    """Channels of the image: the factors, then where tissue is."""
    return [*(f"factor_{k}" for k in range(n_factors)), TISSUE]


@dataclass(frozen=True)
class FactorHead:
    """What makes genes of factors.

    Attributes
    ----------
    genes
        Outputs; of densities the last is the sum over all genes.
    weight, bias
        W, shape (M, C), and b, shape (M,).
    unit
        Of densities what a link's 1 stands for, shape (M,); None for a linear head.
    """

    genes: list[str]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    unit: NDArray[np.float32] | None = None

    @property
    def is_linear(self) -> bool:
        """Whether averages of factors give averages of genes."""
        return self.unit is None

    def table(self, units: str, fingerprint: str) -> ad.AnnData:
        """As an element: rows are outputs, columns factors.

        Parameters
        ----------
        units
            What the values are, in words.
        fingerprint
            Of the factors that these weights belong to.
        """
        obs = pd.DataFrame({"bias": self.bias}, index=pd.Index(self.genes, dtype=object))
        if self.unit is not None:
            obs["unit"] = self.unit
        var = pd.DataFrame(index=pd.Index(factor_names(self.weight.shape[1])[:-1], dtype=object))
        link = "identity" if self.is_linear else "softplus"
        uns = {"pixnet_sd": {"link": link, "units": units, "fingerprint": fingerprint}}
        return TableModel.parse(ad.AnnData(self.weight, obs, var, uns=uns))

    def values(self, factors: NDArray[np.float32], index: NDArray[np.intp]) -> NDArray[np.float32]:
        """Some outputs at some pixels.

        Parameters
        ----------
        factors
            Factors and tissue, shape (C + 1, rows, columns).
        index
            Which outputs.

        Returns
        -------
        Shape (outputs, rows, columns), float32.
        """
        flat = np.asarray(factors, dtype=np.float32).reshape(len(factors), -1)
        weight = np.concatenate([self.weight, self.bias[:, None]], axis=1)
        if self.unit is None:
            return (weight[index] @ flat).reshape(len(index), *factors.shape[1:])
        total = _softplus(weight[-1:] @ flat + _AT_ONE)
        found = _softplus(weight[index] @ flat + _AT_ONE) * self.unit[index, None]
        found[index != len(self.genes) - 1] *= total
        found *= flat[-1]
        return found.reshape(len(index), *factors.shape[1:])


def _softplus(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.logaddexp(x, np.float32(0))


def read_head(sdata: SpatialData, key: str) -> FactorHead:
    """Weights that belong to the image of factors ``key``.

    Raises
    ------
    ElementError
        When the table is missing.
    DataError
        When it is not one that `predict` writes, or does not fit the image.
    """
    name = head_key(key)
    if name not in sdata.tables:
        raise ElementError(f"The image {key!r} needs the table {name!r} beside it, which is not there. Predict again.")
    table = sdata.tables[name]
    n_channels = sdata.images[key]["scale0"]["image"].sizes["c"]
    link = table.uns.get("pixnet_sd", {}).get("link")
    if link not in ("identity", "softplus") or "bias" not in table.obs or table.n_vars != n_channels - 1:
        raise DataError(
            f"The table {name!r} does not hold the weights for the {n_channels} channels of {key!r}. Predict again, "
            "with overwrite=True."
        )
    known = (stored_note(sdata, "maps", key) or {}).get("fingerprint")
    if known is not None and known != table.uns["pixnet_sd"].get("fingerprint"):
        raise DataError(
            f"The table {name!r} in this object belongs to other factors than {key!r}, which were written since. Open "
            "the store anew, or predict again with overwrite=True."
        )
    columns = ["bias", "unit"] if link == "softplus" else ["bias"]
    found = (table.obs[column].to_numpy(np.float32) for column in columns)
    return FactorHead(list(table.obs_names.astype(str)), np.asarray(table.X, dtype=np.float32), *found)
