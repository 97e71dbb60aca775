"""How many transcripts a place catches, and of which genes: library sizes and Poisson draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.special import ndtri

from ._expression import Panel
from ._noise import hash_unit
from ._tissue import Tissue

__all__ = ["LIBRARY_FIELD_SIGMA", "LIBRARY_FIELD_UM", "LIBRARY_PLACE_SIGMA", "draw_counts", "library_size"]

LIBRARY_PLACE_SIGMA = 0.5
"""Standard deviation of the logarithm of the share that a place catches, independent from place to place."""

LIBRARY_FIELD_SIGMA = 0.25
"""The same of a smooth field, such as permeabilisation leaves."""

LIBRARY_FIELD_UM = 300.0
"""Period of that field."""

_FIELD_CHANNEL, _PLACE_CHANNEL = 40, 90


def library_size(
    tissue: Tissue,
    row: NDArray[np.int64],
    col: NDArray[np.int64],
    x_um: NDArray[np.float64],
    y_um: NDArray[np.float64],
) -> NDArray[np.float64]:
    """What each place catches of what lies there, relative to the mean, (n,): log-normal with mean 1.

    A field that is smooth over the slide times a number that belongs to the place's row and column.
    """
    field = tissue.noise.at(x_um, y_um, LIBRARY_FIELD_UM, _FIELD_CHANNEL).astype(np.float64)
    place = ndtri(hash_unit(tissue.seed, row, col, _PLACE_CHANNEL))
    sigmas = LIBRARY_FIELD_SIGMA, LIBRARY_PLACE_SIGMA
    return np.exp(sigmas[0] * field + sigmas[1] * place - (sigmas[0] ** 2 + sigmas[1] ** 2) / 2)


def draw_counts(caught: NDArray[np.float64], panel: Panel, stream: Sequence[int]) -> sp.csr_matrix:
    """Poisson counts, (n, genes), float32, at a cost of the number of transcripts.

    Each source gives every place a Poisson number of transcripts, and each of these is of a gene with the
    probability that the source's profile gives: the same as Poisson draws of every gene.

    Parameters
    ----------
    caught
        Integral of every source over each place times its library size, (n, sources).
    panel
        Genes. Markers and fillers have streams of their own, so the number of genes changes no marker.
    stream
        Seed of this draw.
    """
    n_genes, n_markers = len(panel.names), panel.markers.shape[1]
    place, gene = _draw(caught, panel.markers, np.random.default_rng([*stream, 0]))
    filler_place, filler = _draw(caught, panel.fillers, np.random.default_rng([*stream, 1]))
    kept = gene < n_genes
    rows = np.concatenate([place[kept], filler_place])
    columns = np.concatenate([gene[kept], filler + n_markers])
    ones = np.ones(len(rows), dtype=np.float32)
    return sp.csr_matrix((ones, (rows, columns)), shape=(len(caught), n_genes))


def _draw(
    caught: NDArray[np.float64], profile: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Place and gene of every transcript."""
    places, genes = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for source, rates in enumerate(profile):
        total = rates.sum()
        if total == 0:
            continue
        place = np.repeat(np.arange(len(caught)), rng.poisson(caught[:, source] * total))
        chosen = np.searchsorted(np.cumsum(rates) / total, rng.random(len(place)), side="right")
        places.append(place)
        genes.append(np.minimum(chosen, len(rates) - 1))
    return np.concatenate(places), np.concatenate(genes)
