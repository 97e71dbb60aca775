"""Compare predicted with measured expression by moments: read in blocks of regions, slides pooled without reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
import torch
import zarr
from numpy.typing import NDArray
from scipy import sparse
from spatialdata import SpatialData

from pixnet_sd._arguments import checked
from pixnet_sd._fingerprint import differing_parts
from pixnet_sd._notes import table_note
from pixnet_sd._util import logger
from pixnet_sd.engine.train import Moments
from pixnet_sd.errors import DataError, ElementError
from pixnet_sd.model.noise import LEVEL, Dispersion, cumulative, expected_log_normalised, inside
from pixnet_sd.slide import slide_at
from pixnet_sd.slide.elements import Table, check_instances, obs_column, table_link, tables_of
from pixnet_sd.slide.tables import Counts, check_genes, checked_totals, counts_of, genes_of, log_normalise

from ._checks import pixels_of
from ._regions import ON_TISSUE, placed_regions, region_parts

METRICS = ("MSE", "MAE", "PCC@F", "PCC@S", "PCC@M")

_WIDE_VALUES = 2**22  # of expression in memory in 64 bits
_BLOCK_VALUES = 2**25  # of predicted expression in memory: 128 MiB
_MOST_COVERED = 4096  # regions by which coverage is told
_PARTS = {"pixels": "pixels of the image", "regions": "outlines of the regions", "ids": "ids of the regions"}


@checked()
def evaluate(sdata: SpatialData, *, table_key: str, predicted_key: str, at_measured_depth: bool = True) -> pd.DataFrame:
    """Score a prediction against measured expression of the same regions.

    Measured counts are normalised as the model's targets were. Regions are matched by the element that both tables
    annotate and by instance id, genes by name; what only one of the tables has takes no part, nor do regions without a
    single count, or without tissue, which have no prediction.

    A model of counts is scored by what it expects to be measured, E[log1p(target_sum y / total)] over negative binomial
    counts y, at the number of counts that each region has: the fewer these are, the lower is the mean of such
    logarithms, whatever the tissue expresses. It so knows one thing that is not on the image. To compare with methods
    that do not, leave it out with `at_measured_depth`.

    Parameters
    ----------
    sdata
        Object with both tables.
    table_key
        Table with raw counts.
    predicted_key
        Table that :func:`predict` wrote with ``shapes_key=`` the element which `table_key` annotates.
    at_measured_depth
        False: score ``X`` as it is, also of a model of counts.

    Returns
    -------
    One row a gene: ``pcc`` (Pearson over regions; NaN when the measured gene is constant), ``mse``, ``mae``,
    and ``coverage``, the share of measured counts in the middle 90 % of those that a model of counts expects, by up to
    4,096 regions (a count lies in there by the share of its probability that does, so that it is 0.9 of a right model
    at any depth); NaN without `at_measured_depth`, or of a model of logarithms.
    ``attrs`` has ``MSE``, ``MAE``, ``PCC@F``, ``PCC@S``, ``PCC@M`` (first quartile, median and mean over genes),
    ``n_regions``, ``n_genes`` and, if known, the mean ``coverage``. For several slides, average these per slide or pool
    the regions, and say which.

    Raises
    ------
    ElementError
        A table is missing, or the tables annotate different elements.
    DataError
        Counts cannot be used, or the tables have no region with tissue and counts, or no gene, in common.
    """
    keys: Any = {"table_key": table_key, "predicted_key": predicted_key}
    of_regions = matched_values(sdata, **keys, at_measured_depth=at_measured_depth).moments()
    scores = pooled([of_regions])
    scores.attrs.update(summary(scores), n_regions=int(of_regions["n"].iloc[0]), n_genes=len(scores))
    return scores


def summary(scores: pd.DataFrame) -> dict[str, float]:
    """Sum up the scores of genes in the five metrics, and their coverage where it is known."""
    pcc = scores["pcc"].dropna()
    values: list[Any] = [scores["mse"].mean(), scores["mae"].mean(), pcc.quantile(0.25), pcc.median(), pcc.mean()]
    found = {name: float(value) for name, value in zip(METRICS, values, strict=True)}
    return found | ({"coverage": float(covered.mean())} if len(covered := scores["coverage"].dropna()) else {})


def pooled(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Score the regions of slides together, as if they were of one, by the `Moments` of genes that all of them have."""
    shared = [gene for gene in parts[0].index if all(gene in part.index for part in parts)]
    own = (Moments(**{name: part.loc[shared, name].to_numpy() for name in Moments._fields}) for part in parts)
    whole = reduce(Moments.merged, own)
    covered = sum((part.loc[shared, "coverage"] * part.loc[shared, "n"]).to_numpy() for part in parts) / whole.n
    scores = {"pcc": whole.pcc, "mse": whole.mse, "mae": whole.mae, "coverage": covered}
    return pd.DataFrame(scores, index=pd.Index(shared, name="gene"))


@dataclass(frozen=True, eq=False)
class Noise:
    """What decides how counts vary around those expected: areas of the regions, and the dispersion of each gene."""

    areas_um2: NDArray[np.float64]
    dispersion: Dispersion


@dataclass(frozen=True, eq=False)
class Matched:
    """Expression of regions and genes that are both predicted and measured, read in blocks of regions."""

    genes: pd.Index  # shape (M,)
    predicted: Any  # log-normalised expression, in memory or on disk
    rows: NDArray[np.intp]  # where the regions and genes are in it
    columns: NDArray[np.integer]
    counts: Counts  # of the regions
    positions: NDArray[np.integer]  # of the genes in these
    total: NDArray[np.float64]  # counts of each region over all genes
    target_sum: float
    noise: Noise | None = None  # of a model of counts: then predicted is what it expects at the regions' own depth

    def blocks(self, values: int = _BLOCK_VALUES) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Read predicted and measured expression, (n, M) each, of some regions after others."""
        for x, counts, total, dispersion in self._read(values):
            predicted = x
            if dispersion is not None:  # log-normalised expected expression -> expected log-normalised expression
                mean, scatter, depth = map(torch.from_numpy, (self._mean(x, total), dispersion, total[:, None]))
                predicted = expected_log_normalised(mean, scatter, depth, self.target_sum).float().numpy()
            yield predicted, log_normalise(counts, total, self.target_sum)

    def coverage(self, levels: Sequence[float]) -> NDArray[np.float64]:
        """Compute which share of measurements lies in intervals of some levels, by a sample of regions: (levels, M)."""
        picked = np.unique(np.linspace(0, len(self.rows) - 1, _MOST_COVERED).astype(np.intp))
        assert self.noise is not None  # that the intervals are of
        own: dict[str, Any] = {"noise": replace(self.noise, areas_um2=self.noise.areas_um2[picked])}
        own |= {"rows": self.rows[picked], "counts": self.counts.take(picked), "total": self.total[picked]}
        sums = np.zeros((len(levels), len(self.genes)))
        for x, counts, total, dispersion in replace(self, **own)._read(_BLOCK_VALUES // 8):
            between = cumulative(np.asarray(counts.todense(), np.float64), self._mean(x, total), dispersion)
            sums += [inside(*between, level).sum(axis=0) for level in levels]
        return sums / len(picked)

    def _read(self, values: int) -> Iterator[tuple[NDArray[np.float32], Any, NDArray[np.float64], Any]]:
        """Read ``X`` of some regions after others, (n, M), their counts, totals (n,) and, if known, dispersion."""
        step = max(1, values // max(1, self.predicted.shape[1]))
        for place, counts in self.counts.blocks():
            rows, total = self.rows[place], self.total[place]
            for start in range(0, len(rows), step):
                block, dispersion = slice(start, start + step), None
                if self.noise is not None:
                    dispersion = self.noise.dispersion.at(self.noise.areas_um2[place][block])
                x = _read_rows(self.predicted, rows[block])[:, self.columns]
                yield x, counts[block][:, self.positions], total[block], dispersion

    def _mean(self, x: NDArray[np.float32], total: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute which counts log-normalised expression is of, given the counts of all genes."""
        return np.expm1(x.astype(np.float64)) * (total / self.target_sum)[:, None]

    def moments(self) -> pd.DataFrame:
        """Compute what scores are made of, and the coverage (NaN where it is not known), a row a gene."""
        step = max(1, _WIDE_VALUES // len(self.genes))
        parts = (
            Moments.of(*(torch.from_numpy(values[start : start + step]) for values in block))
            for block in self.blocks()
            for start in range(0, len(block[0]), step)
        )
        covered = np.nan if self.noise is None else self.coverage([LEVEL])[0]
        columns = reduce(Moments.merged, parts)._asdict() | {"coverage": covered}
        return pd.DataFrame(columns, index=pd.Index(self.genes, name="gene")).astype({"n": int})


def _read_rows(matrix: Any, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Read rows of a matrix in memory or on disk, dense, all columns."""
    ascending, place = np.unique(rows, return_inverse=True)  # storage is read in order
    first, last = int(ascending[0]), int(ascending[-1])
    if last - first < 2 * len(rows):
        read, place = matrix[first : last + 1], ascending[place] - first
    else:
        read = matrix.oindex[ascending] if isinstance(matrix, zarr.Array) else matrix[ascending]
    return np.asarray(read.toarray() if sparse.issparse(read) else read, dtype=np.float32)[place]


def matched_values(
    sdata: SpatialData,
    *,
    table_key: str,
    predicted_key: str,
    genes: Sequence[str] | None = None,
    at_measured_depth: bool = True,
) -> Matched:
    """Match a prediction with measured expression, as `evaluate`; of the genes named or of all that both have."""
    predicted = _table(sdata, predicted_key, "predicted_key")
    note = table_note(predicted)
    if note is None:
        raise ElementError(
            f"Table {predicted_key!r} was not written by pixnet_sd's predict. Did you swap the two keys?"
        )
    measured = _table(sdata, table_key, "table_key")
    if table_note(measured) is not None:
        raise ElementError(f"Table {table_key!r} holds predictions: give table_key= of a table with raw counts.")
    element, system = predicted.uns["spatialdata_attrs"]["region"], note.get("coordinate_system")
    element = element if isinstance(element, str) else list(element)
    link = table_link(
        sdata,
        table_key=table_key,
        coordinate_system=system if system in sdata.coordinate_systems else None,  # it may have been renamed since
        element_key=element if isinstance(element, str) else None,
    )
    if element not in (link.element_key, [link.element_key]):
        raise ElementError(
            f"Table {table_key!r} measures the regions of {link.element_key!r}, and {predicted_key!r} predicts those "
            f"of {element!r}. Predict with shapes_key={link.element_key!r}."
        )
    ids = pd.Index(obs_column(predicted, predicted.uns["spatialdata_attrs"]["instance_key"]))
    check_instances(ids, predicted_key)
    rows = ids.get_indexer(link.instances)
    n_common, what = int((rows >= 0).sum()), f"Table {table_key!r}"
    measured_genes = genes_of(measured, what)
    shared = predicted.var_names[predicted.var_names.isin(measured_genes.names)]
    if not n_common or not len(shared):
        first = [names[:3].tolist() for names in (link.instances, ids, measured_genes.names, predicted.var_names)]
        raise DataError(
            f"Tables {table_key!r} and {predicted_key!r} have {n_common} regions and {len(shared)} genes in common. "
            f"Regions are called {first[0]} and {first[1]}, genes {first[2]} and {first[3]}."
        )
    if genes is not None:
        check_genes(genes, shared, f"what tables {table_key!r} and {predicted_key!r} have in common")
        shared = pd.Index(genes)
    _check_current(sdata, predicted_key, predicted)
    counts = counts_of(measured, link.rows, measured_genes, what)
    total = checked_totals(counts, measured_genes.names, what)
    is_predicted = (rows >= 0) & _on_tissue(predicted)[rows]
    if n_off := n_common - int(is_predicted.sum()):
        logger.info("%d of %d regions in %r lie off tissue and take no part", n_off, n_common, predicted_key)
    keep = is_predicted & (total > 0)
    if not keep.any():
        raise DataError(
            f"{what}: {n_common} of its regions are in {predicted_key!r}, of which {n_common - n_off} have tissue and "
            "with it a prediction, and none of these has a count. Are the regions where the tissue is?"
        )
    noise, columns = None, predicted.var_names.get_indexer(shared)
    dispersion = Dispersion.read(predicted.var)
    if at_measured_depth and dispersion is not None:
        noise = Noise(np.asarray(obs_column(predicted, "area_um2"), np.float64)[rows[keep]], dispersion.of(columns))
    return Matched(
        genes=shared,
        predicted=predicted.X,
        rows=rows[keep],
        columns=columns,
        counts=counts.take(keep),
        positions=measured_genes.names.get_indexer(shared),
        total=total[keep],
        target_sum=float(note["target_sum"]),
        noise=noise,
    )


def _table(sdata: SpatialData, key: str, argument: str) -> Table:
    tables = tables_of(sdata)
    if key not in tables:
        raise ElementError(f"There is no table {key!r}. Tables: {list(tables)}. Check {argument}=.")
    return tables[key]


def _on_tissue(predicted: Table) -> NDArray[np.bool_]:
    """Tell which rows have a prediction; all, where the table does not say."""
    is_said = ON_TISSUE in predicted.obs
    return np.asarray(obs_column(predicted, ON_TISSUE), bool) if is_said else np.ones(predicted.n_obs, bool)


def _check_current(sdata: SpatialData, key: str, predicted: Table) -> None:
    """Refuse a predicted table when the image was corrected, or its regions were drawn anew, since."""
    about: dict[str, Any] = table_note(predicted)
    before = about.get("depends_on")
    if not before or about["image"] not in sdata.images:
        missing = f"image {about['image']!r} is not in the object" if before else "it does not say what it depends on"
        logger.warning("whether table %r still fits the slide cannot be checked: %s", key, missing)
        return
    place: Any = {"image_key": about["image"], "coordinate_system": about["coordinate_system"]}
    slide = slide_at(sdata, mpp=float(about["mpp"]), working_mpp=float(about["working_mpp"]), **place)
    now: dict[str, Any] = {"pixels": pixels_of(sdata, slide).sha256}
    if "regions" in before:
        now |= region_parts(*placed_regions(sdata, slide, predicted.uns["spatialdata_attrs"]["region"]))
    changed = [_PARTS.get(part, part) for part in differing_parts(dict(before), now)]
    if changed:
        what = f"Table {key!r} is not of what is there now: since it was predicted the {' and '.join(changed)} changed."
        raise DataError(f"{what} Predict again, with overwrite=True.")
