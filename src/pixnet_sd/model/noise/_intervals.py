"""Between which counts the middle share of what is measured lies, and a dispersion with which it does.

Counts are whole numbers: of many small regions nearly all are 0, and no interval of whole counts holds 90 % of them. So
coverage is taken of intervals in probability, between the quantiles (1 - level) / 2 and (1 + level) / 2, and a count
y, which stands for all probabilities from F(y - 1) to F(y), lies in one by the share of these that do. Averaged over
draws from F it is the level exactly (Czado et al., Biometrics 2009, section 2: the nonrandomised form of the
probability integral transform).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, special, stats

Float = NDArray[np.float64]

LEVEL = 0.9
"""Of the intervals that hold their share of held-out measurements."""

_LEAST, _MOST, _HALVINGS = 1e-4, 100.0, 16  # of a dispersion, and steps of its search
_FEWEST = 30.0  # counts of a gene from which a dispersion of its own can be told
_MEANS, _DISPERSIONS = np.linspace(-4, 5, 271), np.linspace(-4, 2, 121)  # decades, of the table of quantiles


def coverage(counts: Float, mean: Float, dispersion: Float, level: float = LEVEL) -> Float:
    """Compute the share of each count that lies in the interval of a level: (n, M) twice, (M,) or (n, M) -> (n, M)."""
    dispersion = np.broadcast_to(dispersion, mean.shape)
    shape, failure = 1 / dispersion, 1 / (1 + dispersion * mean)
    top = failure**shape  # F(0), in closed form as most counts are 0
    mass = top.copy()
    some = counts > 0
    y, r, p = counts[some], shape[some], failure[some]
    top[some] = special.betainc(r, y + 1, p)
    logs = special.gammaln(y + r) - special.gammaln(r) - special.gammaln(y + 1) + r * np.log(p) + y * np.log1p(-p)
    mass[some] = np.exp(logs)
    low, high = (1 - level) / 2, (1 + level) / 2
    inside = np.clip(np.minimum(top, high) - np.maximum(top - mass, low), 0, None)
    return np.where(mass > 0, np.minimum(inside / np.where(mass > 0, mass, 1), 1), 0.0)


def calibrated_dispersion(counts: Float, mean: Float, start: Float, level: float = LEVEL) -> Float:
    """Find the least dispersion of each gene, (M,), whose intervals hold the share `level` of n counts, (n, M).

    The intervals grow with it, and it is chosen so that they hold (n + 1) / n times their level: split conformal
    prediction over nested sets (Gupta et al., Pattern Recognition 2022). Genes with few counts get that of the start,
    (M,), times what the others have in the middle.
    """
    n, enough = len(counts), counts.sum(axis=0) >= _FEWEST
    if not n or not enough.any():
        return start
    found = start.copy()
    y, mu, wanted = counts[:, enough], mean[:, enough], min(level * (n + 1) / n, 1.0)
    low, high = (np.full(y.shape[1], np.log(end)) for end in (_LEAST, _MOST))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        holds = coverage(y, mu, np.exp(middle), level).mean(axis=0) >= wanted
        low, high = np.where(holds, low, middle), np.where(holds, middle, high)
    found[enough] = np.exp(high)
    found[~enough] *= np.exp(np.median(np.log(found[enough] / start[enough])))
    return np.clip(found, _LEAST, _MOST)


def quantile(mean: NDArray[Any], dispersion: Float, probability: float) -> NDArray[Any]:
    """Compute which count is not exceeded with a probability, whole numbers of the dtype of the means; NaN of NaN."""
    known, dispersion = np.broadcast_arrays(np.nan_to_num(mean), np.nan_to_num(dispersion))
    place = [
        (np.log10(np.maximum(values, 10.0 ** nodes[0])) - nodes[0]) / (nodes[1] - nodes[0])
        for values, nodes in ((known, _MEANS), (dispersion, _DISPERSIONS))
    ]
    logs = ndimage.map_coordinates(_log_quantiles(probability), place, order=1, mode="nearest")
    return np.where(np.isnan(mean), np.nan, np.rint(np.exp(logs))).astype(mean.dtype)


@lru_cache(maxsize=8)
def _log_quantiles(probability: float) -> Float:
    """Tabulate logarithms of quantiles, between whole numbers: a count y stands for y - 1/2 to y + 1/2."""
    mean, dispersion = np.meshgrid(10.0**_MEANS, 10.0**_DISPERSIONS, indexing="ij")
    of = stats.nbinom(1 / dispersion, 1 / (1 + dispersion * mean))
    count = of.ppf(probability)
    below, mass = of.cdf(count - 1), of.pmf(count)
    share = np.clip((probability - below) / mass, 0, 1)
    return np.log(np.where(count == 0, share / 2, count - 0.5 + share))
