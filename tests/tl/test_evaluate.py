"""Scores against plain NumPy, on tables whose rows and columns are in any order and partly missing."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from scipy import sparse, stats
from spatialdata.models import ShapesModel, TableModel

from pixnet_sd.errors import DataError, ElementError
from pixnet_sd.model.noise import coverage
from pixnet_sd.tl import evaluate, matched_values

GENES = ["A", "B", "C", "D", "E"]
N = 30


def table(values, ids, genes, *, region="spots", instance_key="spot", note=None) -> ad.AnnData:
    obs = pd.DataFrame({"region": pd.Categorical([region] * len(ids)), instance_key: ids}, index=[f"r{i}" for i in ids])
    uns = {} if note is None else {"pixnet_sd": {"target_sum": note}}
    made = ad.AnnData(values, obs=obs, var=pd.DataFrame(index=list(genes)), uns=uns)
    return TableModel.parse(made, region=region, region_key="region", instance_key=instance_key)


@pytest.fixture
def counts() -> np.ndarray:
    """Counts; gene E is constant zero, spot 3 has no count at all, gene X is only measured."""
    rng = np.random.default_rng(0)
    values = rng.poisson(rng.uniform(1, 30, (N, len(GENES) + 1))).astype(np.float32)
    values[:, 4] = values[3] = 0
    return values


@pytest.fixture
def predictions() -> np.ndarray:
    return np.random.default_rng(1).normal(3, 1, (N, len(GENES))).astype(np.float32)


@pytest.fixture
def sdata(counts, predictions) -> sd.SpatialData:
    """Measured in the order of ids; predicted shuffled, without regions 5 and 6, with a gene that was not measured."""
    rng = np.random.default_rng(2)
    ids = np.arange(100, 100 + N)
    rows = rng.permutation(np.setdiff1d(np.arange(N), [5, 6]))
    columns = rng.permutation(len(GENES))
    values = np.column_stack([predictions[rows][:, columns], np.zeros(len(rows), np.float32)])
    names = [*(GENES[k] for k in columns), "UNMEASURED"]
    shapes = ShapesModel.parse(rng.uniform(0, 100, (N, 2)), geometry=0, radius=3.0, index=ids)
    measured = table(sparse.csr_matrix(counts), ids, [*GENES, "X"])
    predicted = table(values, ids[rows], names, instance_key="instance_id", note=1000.0)
    return sd.SpatialData(shapes={"spots": shapes}, tables={"counts": measured, "predicted": predicted})


def test_against_numpy(sdata, counts, predictions):
    keep = np.setdiff1d(np.arange(N), [3, 5, 6])
    target = np.log1p(1000 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))[keep, : len(GENES)]
    error = predictions[keep] - target
    known = [np.corrcoef(predictions[keep, g], target[:, g])[0, 1] for g in range(4)]
    mse, mae = (error**2).mean(axis=0), np.abs(error).mean(axis=0)
    scores = evaluate(sdata, table_key="counts", predicted_key="predicted")
    assert set(scores.index) == set(GENES)
    for column, values in {"pcc": [*known, np.nan], "mse": mse, "mae": mae}.items():
        np.testing.assert_allclose(scores.loc[GENES, column], values, rtol=1e-5, err_msg=column)
    expected = {"MSE": mse.mean(), "MAE": mae.mean(), "PCC@F": np.quantile(known, 0.25), "PCC@S": np.median(known)}
    expected |= {"PCC@M": np.mean(known), "n_regions": N - 3, "n_genes": 5}
    assert scores.attrs == pytest.approx(expected, rel=1e-5)
    assert scores["coverage"].isna().all()  # of logarithms there is no interval


def test_a_model_of_counts_is_scored_by_what_it_expects_at_the_measured_depth(sdata, counts, predictions):
    """Regions of two sizes, each with a dispersion of its own; or X as it is, which says another thing."""
    as_it_is = evaluate(sdata, table_key="counts", predicted_key="predicted")
    table = sdata.tables["predicted"]
    alpha = {4.0: np.linspace(0.1, 1, table.n_vars), 64.0: np.linspace(0.05, 0.3, table.n_vars)}
    for area, values in alpha.items():
        table.var[f"dispersion_{area:g}um2"] = values
    ids = table.obs["instance_id"].to_numpy()
    table.obs["area_um2"] = np.where(ids % 2, 4.0, 64.0)
    found = evaluate(sdata, table_key="counts", predicted_key="predicted")
    order = pd.Index(ids).get_indexer(np.setdiff1d(np.arange(N), [3, 5, 6]) + 100)
    total = counts.sum(axis=1)[ids[order] - 100][:, None]
    names = [name for name in table.var_names if name != "UNMEASURED"]
    x = np.asarray(table[order, names].X, float)
    own = np.where((ids[order] % 2)[:, None] == 1, alpha[4.0][:5], alpha[64.0][:5])
    mean, y = np.expm1(x) / 1000 * total, np.arange(4000)[:, None, None]
    expected = (stats.nbinom.pmf(y, 1 / own, 1 / (1 + own * mean)) * np.log1p(1000 * y / total)).sum(axis=0)
    measured = counts[ids[order] - 100][:, [GENES.index(name) for name in names]]
    error = expected - np.log1p(1000 * measured / total)
    np.testing.assert_allclose(found.loc[names, "mse"], (error**2).mean(axis=0), rtol=2e-3)
    inside = coverage(measured.astype(float), mean, own).mean(axis=0)
    np.testing.assert_allclose(found.loc[names, "coverage"], inside, rtol=1e-6)
    assert found.attrs["coverage"] == pytest.approx(inside.mean())
    plain = evaluate(sdata, table_key="counts", predicted_key="predicted", at_measured_depth=False)
    pd.testing.assert_frame_equal(plain, as_it_is)


def test_only_genes_are_scored_and_counted(sdata):
    """Antibodies have no part in the totals, nor a score."""
    genes = sdata.tables["counts"].var_names.isin(["A", "C", "D", "E"])
    sdata.tables["without"] = TableModel.parse(sdata.tables["counts"][:, genes].copy())
    expected = evaluate(sdata, table_key="without", predicted_key="predicted")
    sdata.tables["counts"].var["feature_types"] = np.where(genes, "Gene Expression", "Antibody Capture")
    found = evaluate(sdata, table_key="counts", predicted_key="predicted")
    assert set(found.index) == set(GENES) - {"B"}
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize("is_stored", [False, True])
def test_regions_without_tissue_take_no_part(sdata, tmp_path, is_stored):
    keys = {"table_key": "counts", "predicted_key": "predicted"}
    table = sdata.tables["predicted"]
    off = np.arange(table.n_obs) % 3 == 1
    sdata.tables["predicted"] = table[~off].copy()
    expected = evaluate(sdata, **keys)
    table.X[off], table.obs["on_tissue"] = np.nan, ~off
    sdata.tables["predicted"] = table
    if is_stored:
        sdata.write(tmp_path / "slide.zarr")
        sdata = sd.read_zarr(tmp_path / "slide.zarr", selection=("shapes",))
    found = evaluate(sdata, **keys)
    pd.testing.assert_frame_equal(found, expected)
    assert found.attrs == expected.attrs


@pytest.mark.parametrize("is_stored", [False, True])
def test_blocks_do_not_matter(sdata, tmp_path, is_stored):
    """Of tables in memory and on disk; a block may be one region."""
    expected = evaluate(sdata, table_key="counts", predicted_key="predicted")
    if is_stored:
        sdata.write(tmp_path / "slide.zarr")
        sdata = sd.read_zarr(tmp_path / "slide.zarr", selection=("shapes",))
        assert not sdata.tables
        read = evaluate(sdata, table_key="counts", predicted_key="predicted")
        pd.testing.assert_frame_equal(read.loc[expected.index], expected, rtol=1e-10)
    else:
        sdata.tables["predicted"].X = sparse.csr_matrix(sdata.tables["predicted"].X)
    matched = matched_values(sdata, table_key="counts", predicted_key="predicted", genes=GENES)
    for values in (1, 17, 60):
        blocks = list(matched.blocks(values))
        assert len(blocks) > 2
        predicted, measured = (np.concatenate(each) for each in zip(*blocks, strict=True))
        np.testing.assert_allclose(((predicted - measured) ** 2).mean(axis=0), expected.loc[GENES, "mse"], rtol=1e-5)


@pytest.mark.parametrize(
    ("table_key", "predicted_key", "names"),
    [
        ("predicted", "counts", "'counts'.*swap"),
        ("nowhere", "predicted", "'nowhere'.*'counts', 'predicted'.*table_key="),
        ("counts", "nowhere", "'nowhere'.*'counts', 'predicted'.*predicted_key="),
        ("predicted", "predicted", "'predicted'.*table_key="),  # logarithms, not counts
        ("counts", "of_cells", "'spots'.*'cells'.*shapes_key='spots'"),
    ],
)
def test_tables_that_do_not_go_together(sdata, table_key, predicted_key, names):
    if predicted_key == "of_cells":
        sdata.shapes["cells"] = sdata.shapes["spots"]
        sdata.tables["of_cells"] = table(np.zeros((2, 5), np.float32), [100, 101], GENES, region="cells", note=1e4)
    with pytest.raises(ElementError, match=names):
        evaluate(sdata, table_key=table_key, predicted_key=predicted_key)


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda m, p: p.obs.insert(0, "instance_id", p.obs.pop("instance_id") + 1000), r"0 regions.*\[1\d\d\d"),
        (lambda m, p: setattr(p, "var_names", [f"hg38_{g}" for g in p.var_names]), "28 regions and 0 genes.*'hg38_"),
        (lambda m, p: setattr(m, "X", m.X * 0), "'counts'.*'predicted'"),
        (lambda m, p: p.obs.insert(0, "on_tissue", False), "'counts'.*28.*'predicted'.*0 have tissue"),
        (lambda m, p: setattr(m, "X", m.X * np.nan), "'counts'.*NaN"),
        (lambda m, p: setattr(m, "var_names", ["A", "A", "C", "D", "E", "X"]), "'counts'.*'A'"),
    ],
)
def test_nothing_to_compare(sdata, spoil, names):
    spoil(sdata.tables["counts"], sdata.tables["predicted"])
    with pytest.raises(DataError, match=names):
        evaluate(sdata, table_key="counts", predicted_key="predicted")


@pytest.mark.parametrize("regions", ["spots", ["elsewhere", "spots"]])
def test_coordinate_system_was_renamed_since(sdata, regions) -> None:
    """G6: tables meet in the element that both annotate, whatever its coordinate system is called now."""
    expected = evaluate(sdata, table_key="counts", predicted_key="predicted")
    sdata.tables["predicted"].uns["pixnet_sd"]["coordinate_system"] = "global"
    sdata["elsewhere"] = sdata["spots"]
    sdata.tables["counts"].uns["spatialdata_attrs"]["region"] = regions
    sdata.rename_coordinate_systems({"global": "slide"})
    pd.testing.assert_frame_equal(evaluate(sdata, table_key="counts", predicted_key="predicted"), expected)
