"""Whether a prediction still belongs to the image and the regions that are there now.

Scores of predicted against measured expression: gene by gene, in sum, and of several slides together.

Predicted and measured expression of the same regions and genes, side by side.

Compare predicted with measured expression.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy import sparse
from spatialdata import SpatialData

from pixnet_sd._arguments import checked
from pixnet_sd._fingerprint import differing_parts
from pixnet_sd._util import logger
from pixnet_sd.errors import DataError, ElementError
from pixnet_sd.slide import slide_at
from pixnet_sd.slide.elements import Table, TableLink, check_instances, obs_column, table_link, tables_of
from pixnet_sd.slide.tables import Counts, check_genes, checked_totals, counts_of, genes_of, log_normalise

from ._checks import pixels_of
from ._regions import placed_regions, region_parts

__all__ = [
    "METRICS",
    "Matched",
    "check_current",
    "evaluate",
    "matched_values",
    "merged",
    "moments",
    "pooled",
    "scores_of",
    "summary",
]

_WHAT = {"pixels": "the pixels of the image", "regions": "the outlines of the regions", "ids": "the ids of the regions"}


def check_current(sdata: SpatialData, key: str, predicted: Table) -> None:
    """Refuse a predicted table when the image was corrected, or its regions were drawn anew, since.

    Parameters
    ----------
    sdata
        Object with the image and the regions.
    key
        Name of the table, for messages.
    predicted
        The table.

    Raises
    ------
    DataError
        When what it was predicted from is not what is there.
    """
    about: dict[str, Any] = predicted.uns["pixnet_sd"]
    before = about.get("depends_on")
    if not before or about["image"] not in sdata.images:
        missing = f"image {about['image']!r} is not in the object" if before else "it does not say what it depends on"
        logger.warning("whether table %r still fits the slide cannot be checked: %s", key, missing)
        return
    slide = slide_at(
        sdata,
        image_key=about["image"],
        coordinate_system=about["coordinate_system"],
        mpp=float(about["mpp"]),
        working_mpp=float(about["working_mpp"]),
    )
    now: dict[str, Any] = {"pixels": pixels_of(sdata, slide).sha256}
    if "regions" in before:
        now |= region_parts(*placed_regions(sdata, slide, predicted.uns["spatialdata_attrs"]["region"]))
    changed = differing_parts(dict(before), now)
    if changed:
        raise DataError(
            f"Table {key!r} is not of what is there now: since it was predicted {' and '.join(map(_named, changed))} "
            "changed. Predict again, with overwrite=True."
        )


def _named(part: str) -> str:
    return _WHAT.get(part, part)


METRICS = ("MSE", "MAE", "PCC@F", "PCC@S", "PCC@M")

_EPS = 1e-8  # as of `pearson_per_gene`
_BLOCK = 64  # genes that are in memory in 64 bits


def summary(frame: pd.DataFrame) -> dict[str, float]:
    """The five metrics over the genes of a frame with ``pcc``, ``mse`` and ``mae``."""
    pcc = frame["pcc"].dropna()
    return {
        "MSE": float(frame["mse"].mean()),
        "MAE": float(frame["mae"].mean()),
        "PCC@F": float(pcc.quantile(0.25)),
        "PCC@S": float(pcc.median()),
        "PCC@M": float(pcc.mean()),
    }


def moments(predicted: NDArray[np.float32], target: NDArray[np.float32], genes: pd.Index) -> pd.DataFrame:
    """What scores are made of, for some regions: their expression need not be kept.

    Parameters
    ----------
    predicted, target
        Expression, (regions, genes).
    genes
        Names.

    Returns
    -------
    One row a gene: ``n`` regions, means, sums of squares and of products about the means, ``mse``, ``mae``. Of a
    constant gene the mean is its value and the sum of squares 0, exactly, by which it is recognised.
    """
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(genes), _BLOCK)]
    parts = [_moments(predicted[:, b].astype(np.float64), target[:, b].astype(np.float64)) for b in blocks]
    return pd.concat(parts).set_axis(pd.Index(genes, name="gene"))


def _moments(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> pd.DataFrame:
    found: dict[str, NDArray[np.float64] | int] = {"n": len(measured)}
    centred = {}
    for name, x in (("predicted", predicted), ("measured", measured)):
        mean = np.where(np.ptp(x, axis=0) == 0, x[0], x.mean(axis=0))
        centred[name] = x - mean
        found |= {f"{name}_mean": mean, f"{name}_ss": (centred[name] ** 2).sum(axis=0)}
    error = predicted - measured
    found |= {
        "product": (centred["predicted"] * centred["measured"]).sum(axis=0),
        "mse": (error**2).mean(axis=0),
        "mae": np.abs(error).mean(axis=0),
    }
    return pd.DataFrame(found)


def merged(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """`moments` of all regions of several parts, which have the same genes.

    Parameters
    ----------
    parts
        `moments` of each, at least one.
    """
    frames = list(parts)
    index = frames[0].index
    stacked = {str(name): np.stack([part[name] for part in frames]).astype(np.float64) for name in frames[0]}
    n = stacked["n"]
    total = n.sum(axis=0)
    found: dict[str, NDArray[np.generic]] = {"n": total.astype(np.int64)}
    apart = {}
    for name in ("predicted", "measured"):
        each, ss = stacked[f"{name}_mean"], stacked[f"{name}_ss"]
        mean = np.where(_is_constant(each, ss), each[0], (n * each).sum(axis=0) / total)
        apart[name] = each - mean
        found |= {f"{name}_mean": mean, f"{name}_ss": (ss + n * apart[name] ** 2).sum(axis=0)}
    found["product"] = (stacked["product"] + n * apart["predicted"] * apart["measured"]).sum(axis=0)
    found |= {name: (n * stacked[name]).sum(axis=0) / total for name in ("mse", "mae")}
    return pd.DataFrame(found, index=index)


def scores_of(part: pd.DataFrame) -> pd.DataFrame:
    """Scores of each gene, of its `moments`: ``pcc`` (NaN where the measured gene is constant), ``mse``, ``mae``."""
    r = part["product"] / (np.sqrt(part["predicted_ss"] * part["measured_ss"]) + _EPS)
    r = r.mask(part["predicted_ss"] == 0, 0.0).mask(part["measured_ss"] == 0)
    return pd.DataFrame({"pcc": r, "mse": part["mse"], "mae": part["mae"]})


def pooled(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Scores over the regions of several slides together, as if they were one.

    Parameters
    ----------
    parts
        `moments` of each slide.

    Returns
    -------
    ``pcc``, ``mse`` and ``mae`` of the genes that all of them have.
    """
    shared = [gene for gene in parts[0].index if all(gene in part.index for part in parts)]
    return scores_of(merged(part.loc[shared] for part in parts))


def _is_constant(mean: NDArray[np.float64], ss: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Genes with one value in all regions of all parts, (parts, genes) each."""
    return np.asarray((np.ptp(mean, axis=0) == 0) & (ss == 0).all(axis=0))


_BLOCK_VALUES = 2**25  # of predicted expression in memory: 128 MiB


@dataclass(frozen=True, eq=False)
class Matched:
    """Log-normalised expression of regions and genes that two tables share, read in blocks of regions.

    Attributes
    ----------
    genes
        Names, shape (M,).
    predicted, rows, columns
        Predicted expression, in memory or on disk, and where these regions and genes are in it.
    counts, positions, total
        Counts of these regions, where these genes are in them, and their sums over all genes.
    target_sum
        Of the predicted expression.
    """

    genes: pd.Index
    predicted: Any
    rows: NDArray[np.intp]
    columns: NDArray[np.integer]
    counts: Counts
    positions: NDArray[np.integer]
    total: NDArray[np.float64]
    target_sum: float

    def blocks(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Predicted and measured expression of some regions after others, (n, M) each."""
        step = max(1, _BLOCK_VALUES // max(1, self.predicted.shape[1]))
        for place, block in self.counts.blocks():
            for start in range(place.start, place.stop, step):
                stop = min(start + step, place.stop)
                some = block[start - place.start : stop - place.start][:, self.positions]
                predicted = _rows(self.predicted, self.rows[start:stop])[:, self.columns]
                yield predicted, log_normalise(some, self.total[start:stop], self.target_sum)


def matched_values(
    sdata: SpatialData,
    *,
    table_key: str,
    predicted_key: str,
    genes: Sequence[str] | None = None,
    predicted: Table | None = None,
) -> Matched:
    """Match a prediction with measured expression; arguments and errors are those of :func:`pixnet_sd.tl.evaluate`.

    Parameters
    ----------
    sdata
        Object with both tables.
    table_key, predicted_key
        Table with raw counts, and with predictions.
    genes
        Genes that are wanted; default: all that both tables have.
    predicted
        The table with predictions, where it is not in the object.
    """
    is_stored = predicted is None
    predicted = _predicted(sdata, predicted_key) if predicted is None else predicted
    measured, link = _measured(sdata, table_key, predicted_key, predicted)
    ids = pd.Index(obs_column(predicted, predicted.uns["spatialdata_attrs"]["instance_key"]))
    check_instances(ids, predicted_key)
    rows = ids.get_indexer(link.instances)
    n_common = int((rows >= 0).sum())
    what = f"Table {table_key!r}"
    measured_genes = genes_of(measured, what)
    shared = predicted.var_names[predicted.var_names.isin(measured_genes.names)]
    if not n_common or not len(shared):
        raise DataError(
            f"Tables {table_key!r} and {predicted_key!r} have {n_common} regions and {len(shared)} genes in common. "
            f"Regions are called {_first(link.instances)} and {_first(ids)}, genes {_first(measured_genes.names)} and "
            f"{_first(predicted.var_names)}."
        )
    if genes is not None:
        check_genes(genes, shared, f"what tables {table_key!r} and {predicted_key!r} have in common")
        shared = pd.Index(genes)
    if is_stored:
        check_current(sdata, predicted_key, predicted)
    counts = counts_of(measured, link.rows, measured_genes, what)
    total = checked_totals(counts, measured_genes.names, what)
    keep = (rows >= 0) & (total > 0)
    if not keep.any():
        raise DataError(f"Table {table_key!r}: none of the regions that {predicted_key!r} predicts has a count.")
    return Matched(
        genes=shared,
        predicted=predicted.X,
        rows=rows[keep],
        columns=predicted.var_names.get_indexer(shared),
        counts=counts.take(keep),
        positions=measured_genes.names.get_indexer(shared),
        total=total[keep],
        target_sum=float(predicted.uns["pixnet_sd"]["target_sum"]),
    )


def _first(names: pd.Index) -> list[Any]:
    found: list[Any] = names[:3].tolist()
    return found


def _predicted(sdata: SpatialData, key: str) -> Table:
    table = _table(sdata, key, "predicted_key")
    if "pixnet_sd" not in table.uns:
        raise ElementError(f"Table {key!r} was not written by pixnet_sd's predict. Did you swap the two keys?")
    return table


def _table(sdata: SpatialData, key: str, argument: str) -> Table:
    tables = tables_of(sdata)
    if key not in tables:
        there = ", ".join(map(repr, tables)) or "none"
        raise ElementError(f"There is no table {key!r}. Tables: {there}. Check {argument}=.")
    return tables[key]


def _measured(sdata: SpatialData, table_key: str, predicted_key: str, predicted: Table) -> tuple[Table, TableLink]:
    """The measured table, and its rows that annotate the predicted table's element."""
    measured = _table(sdata, table_key, "table_key")
    if "pixnet_sd" in measured.uns:
        raise ElementError(f"Table {table_key!r} holds predictions: give table_key= of a table with raw counts.")
    element = predicted.uns["spatialdata_attrs"]["region"]
    system = predicted.uns["pixnet_sd"].get("coordinate_system")
    system = system if system in sdata.coordinate_systems else None  # it may have been renamed since
    wanted = element if isinstance(element, str) else None
    link = table_link(sdata, table_key=table_key, coordinate_system=system, element_key=wanted)
    if [link.element_key] != ([element] if isinstance(element, str) else list(element)):
        raise ElementError(
            f"Table {table_key!r} measures the regions of {link.element_key!r}, and {predicted_key!r} predicts those "
            f"of {element!r}. Predict with shapes_key={link.element_key!r}."
        )
    return measured, link


def _rows(matrix: Any, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Some rows of a matrix in memory or on disk, dense, all columns."""
    order = np.argsort(rows, kind="stable")  # storage is read in order
    picked = rows[order]
    first, last = int(picked[0]), int(picked[-1])
    if last - first < 2 * len(rows):
        part = _dense(matrix[first : last + 1])[picked - first]
    else:
        part = _dense(matrix.oindex[picked] if isinstance(matrix, zarr.Array) else matrix[picked])
    return part[np.argsort(order, kind="stable")]


def _dense(x: Any) -> NDArray[np.float32]:
    return np.asarray(x.toarray() if sparse.issparse(x) else x, dtype=np.float32)


@checked()
def evaluate(sdata: SpatialData, *, table_key: str, predicted_key: str) -> pd.DataFrame:
    """Score a prediction against measured expression of the same regions.

    Measured counts are normalised as the model's targets were. Regions are matched by the element that both tables
    annotate and by instance id, genes by name; what only one of the tables has takes no part, nor do regions without a
    single count.

    Parameters
    ----------
    sdata
        Object with both tables.
    table_key
        Table with raw counts.
    predicted_key
        Table that :func:`predict` wrote with ``shapes_key=`` the element which `table_key` annotates.

    Returns
    -------
    One row a gene: ``pcc`` (Pearson over regions; NaN when the measured gene is constant), ``mse``, ``mae``.
    ``attrs`` has ``MSE``, ``MAE``, ``PCC@F``, ``PCC@S``, ``PCC@M`` (first quartile, median and mean over genes),
    ``n_regions`` and ``n_genes``. For several slides, average these per slide or pool the regions, and say which.

    Raises
    ------
    ElementError
        A table is missing, or the tables annotate different elements.
    DataError
        Counts cannot be used, or the tables have no region with counts, or no gene, in common.
    """
    found = matched_values(sdata, table_key=table_key, predicted_key=predicted_key)
    known = merged(moments(*block, found.genes) for block in found.blocks())
    scores = scores_of(known)
    scores.attrs.update(summary(scores), n_regions=int(known["n"].iloc[0]), n_genes=len(scores))
    return scores
