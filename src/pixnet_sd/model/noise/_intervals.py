"""Between which counts the middle share of what is measured lies, and a dispersion with which it does.

Counts are whole numbers: of many small regions nearly all are 0, and no interval of whole counts holds 90 % of them. So
coverage is taken of intervals in probability, between the quantiles (1 - level) / 2 and (1 + level) / 2, and a count
y, which stands for all probabilities from F(y - 1) to F(y), lies in one by the share of these that do. Averaged over
draws from F it is the level exactly (Czado et al., Biometrics 2009, section 2: the nonrandomised form of the
probability integral transform).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

from ._pieces import pieces

Float = NDArray[np.float64]

LEVEL = 0.9
"""Of the intervals that hold their share of held-out measurements."""

_TINY = 1e-12
_LEAST, _MOST, _HALVINGS = 1e-4, 100.0, 16  # of a dispersion, and steps of its search
_FEWEST, _FEW = 30.0, 20  # counts of a gene, and regions, by which a dispersion of its own can be told
_PIECE = 2**18  # values
_MEANS, _DISPERSIONS = np.linspace(-4, 5, 271), np.linspace(-4, 2, 121)  # decades, of the table of quantiles


def cumulative(counts: Float, mean: Float, dispersion: Float) -> tuple[Float, Float]:
    """Compute F(y - 1) and F(y) of counts y: (n, M) twice, dispersion (M,) or (n, M) -> (n, M) each."""
    dispersion = np.broadcast_to(dispersion, mean.shape)
    shape, failure = 1 / dispersion, 1 / (1 + dispersion * mean)
    upto = failure**shape  # F(0), in closed form as most counts are 0
    mass = upto.copy()
    some = counts > 0
    y, r, p = counts[some], shape[some], np.minimum(failure[some], 1 - _TINY)  # 1 where none is expected
    upto[some] = special.betainc(r, y + 1, p)
    logs = special.gammaln(y + r) - special.gammaln(r) - special.gammaln(y + 1) + r * np.log(p) + y * np.log1p(-p)
    mass[some] = np.exp(logs)
    return np.clip(upto - mass, 0, 1), upto


def inside(below: Float, upto: Float, level: float) -> Float:
    """Compute the share of probabilities from F(y - 1) to F(y) that lie in the interval of a level."""
    low, high, mass = (1 - level) / 2, (1 + level) / 2, upto - below
    common = np.clip(np.minimum(upto, high) - np.maximum(below, low), 0, None)
    return np.where(mass > 0, common / np.where(mass > 0, mass, 1), (below > low) & (below < high))


def coverage(counts: Float, mean: Float, dispersion: Float, level: float = LEVEL) -> Float:
    """Compute the share of each count that lies in the interval of a level, see `cumulative` and `inside`."""
    return inside(*cumulative(counts, mean, dispersion), level)


def calibrated_dispersion(counts: Float, mean: Float, start: Float, level: float = LEVEL) -> Float:
    """Find the least dispersion of each gene, (M,), whose intervals hold the share `level` of n counts, (n, M).

    The intervals grow with it, and it is chosen so that they hold (n + 1) / n times their level: split conformal
    prediction over nested sets (Gupta et al., Pattern Recognition 2022). Genes with few counts get that of the start,
    (M,), times what the others have in the middle; of few regions the start is kept.
    """
    n, enough = len(counts), counts.sum(axis=0) >= _FEWEST
    if n < _FEW or not enough.any():
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


def quantiles(mean: Tensor, dispersion: Tensor, probabilities: Sequence[float]) -> list[Tensor]:
    """Compute which counts are not exceeded with some probabilities, whole numbers: (n, M) twice -> (n, M); NaN of NaN.

    They are looked up between the nodes of a table, to 1 % or a count, in pieces that fit into a processor's cache.
    """
    every = [_looked_up(mean[rows], dispersion[rows], probabilities) for rows in pieces(mean, _PIECE)]
    return [torch.cat(of_piece) for of_piece in zip(*every, strict=True)]


def _looked_up(mean: Tensor, dispersion: Tensor, probabilities: Sequence[float]) -> list[Tensor]:
    known = mean.isfinite()
    (row, down), (column, right) = (
        _between(values.float(), nodes)
        for values, nodes in ((torch.where(known, mean, 1.0), _MEANS), (dispersion, _DISPERSIONS))
    )
    place, found, width = row * len(_DISPERSIONS) + column, [], len(_DISPERSIONS)
    for probability in probabilities:
        table = torch.from_numpy(_log_quantiles(probability)).ravel()
        above, below = (torch.lerp(table[at], table[at + 1], right) for at in (place, place + width))
        found.append(torch.where(known, torch.lerp(above, below, down).exp_().round_(), torch.nan))
    return found


def _between(values: Tensor, nodes: Float) -> tuple[Tensor, Tensor]:
    """Find the node before each value, the last but one at most, and the share of the way to the next."""
    first, step = float(nodes[0]), float(nodes[1] - nodes[0])
    at = ((values.clamp_min(10.0**first).log10() - first) / step).clamp_max(len(nodes) - 1)
    node = at.int().clamp_max(len(nodes) - 2)
    return node, at - node


@lru_cache(maxsize=8)
def _log_quantiles(probability: float) -> NDArray[np.float32]:
    """Tabulate logarithms of quantiles, between whole numbers: a count y stands for y - 1/2 to y + 1/2."""
    mean, dispersion = np.meshgrid(10.0**_MEANS, 10.0**_DISPERSIONS, indexing="ij")
    of = stats.nbinom(1 / dispersion, 1 / (1 + dispersion * mean))
    count = of.ppf(probability)
    below, mass = of.cdf(count - 1), of.pmf(count)
    share = np.clip((probability - below) / mass, 0, 1)
    return np.log(np.where(count == 0, share / 2, count - 0.5 + share)).astype(np.float32)
