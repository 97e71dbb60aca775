"""Scores against plain NumPy, on tables whose rows and columns are in any order and partly missing."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from scipy import sparse
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Identity

from pixnet_sd.errors import DataError, ElementError
from pixnet_sd.slide.elements import open_store
from pixnet_sd.tl import evaluate

GENES = ["A", "B", "C", "D", "E"]
N = 30


def table(values, ids, genes, *, region="spots", instance_key="spot", uns=None) -> ad.AnnData:
    obs = pd.DataFrame({"region": pd.Categorical([region] * len(ids)), instance_key: ids}, index=[f"r{i}" for i in ids])
    made = ad.AnnData(values, obs=obs, var=pd.DataFrame(index=list(genes)), uns=uns or {})
    return TableModel.parse(made, region=region, region_key="region", instance_key=instance_key)


@pytest.fixture
def counts() -> np.ndarray:
    """Counts; gene E is constant zero, spot 3 has no count at all, gene X is only measured."""
    rng = np.random.default_rng(0)
    found = rng.poisson(rng.uniform(1, 30, (N, len(GENES) + 1)))
    found[:, 4] = 0
    found[3] = 0
    return found.astype(np.float32)


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
    shapes = ShapesModel.parse(
        rng.uniform(0, 100, (N, 2)), geometry=0, radius=3.0, index=ids, transformations={"global": Identity()}
    )
    measured = table(sparse.csr_matrix(counts), ids, [*GENES, "X"])
    predicted = table(values, ids[rows], names, instance_key="instance_id", uns={"pixnet_sd": {"target_sum": 1000.0}})
    return sd.SpatialData(shapes={"spots": shapes}, tables={"counts": measured, "predicted": predicted})


def reference(counts, predictions) -> dict[str, np.ndarray]:
    """Of spots other than 3, 5 and 6."""
    keep = np.setdiff1d(np.arange(N), [3, 5, 6])
    target = np.log1p(1000 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))[keep, : len(GENES)]
    error = predictions[keep] - target
    pcc = [np.corrcoef(predictions[keep, g], target[:, g])[0, 1] if target[:, g].std() else np.nan for g in range(5)]
    return {"pcc": np.array(pcc), "mse": (error**2).mean(axis=0), "mae": np.abs(error).mean(axis=0)}


def test_against_numpy(sdata, counts, predictions):
    found = evaluate(sdata, table_key="counts", predicted_key="predicted")
    expected = reference(counts, predictions)
    assert set(found.index) == set(GENES)
    for column, values in expected.items():
        np.testing.assert_allclose(found.loc[GENES, column], values, rtol=1e-5, err_msg=column)
    known = expected["pcc"][~np.isnan(expected["pcc"])]
    assert found.attrs == pytest.approx(
        {
            "MSE": expected["mse"].mean(),
            "MAE": expected["mae"].mean(),
            "PCC@F": np.quantile(known, 0.25),
            "PCC@S": np.median(known),
            "PCC@M": known.mean(),
            "n_regions": N - 3,
            "genes": 5,
        },
        rel=1e-5,
    )


def test_order_does_not_matter(sdata):
    first = evaluate(sdata, table_key="counts", predicted_key="predicted")
    rng = np.random.default_rng(3)
    for key in ("counts", "predicted"):
        found = sdata.tables[key]
        found = found[rng.permutation(found.n_obs), rng.permutation(found.n_vars)].copy()
        del sdata.tables[key]
        sdata.tables[key] = found
    again = evaluate(sdata, table_key="counts", predicted_key="predicted")
    pd.testing.assert_frame_equal(again.loc[first.index], first, rtol=1e-6)


def test_only_genes_are_scored_and_counted(sdata, counts):
    """Antibodies have no part in the totals, nor a score."""
    names = [*GENES, "X"]
    without = sdata.tables["counts"][:, [n for n in names if n not in ("B", "X")]].copy()
    sdata.tables["without"] = TableModel.parse(without)
    expected = evaluate(sdata, table_key="without", predicted_key="predicted")
    kinds = ["Antibody Capture" if name in ("B", "X") else "Gene Expression" for name in names]
    sdata.tables["counts"].var["feature_types"] = kinds
    found = evaluate(sdata, table_key="counts", predicted_key="predicted")
    assert set(found.index) == set(GENES) - {"B"}
    pd.testing.assert_frame_equal(found, expected)
    assert found.attrs == pytest.approx(expected.attrs)


@pytest.mark.parametrize("block_values", [1, 17, 60])
def test_blocks_do_not_matter(sdata, monkeypatch, block_values):
    """Neither of regions that are predicted, nor of counts."""
    first = evaluate(sdata, table_key="counts", predicted_key="predicted")
    monkeypatch.setattr("pixnet_sd.tl._evaluate._BLOCK_VALUES", block_values)
    monkeypatch.setattr("pixnet_sd.slide.tables._counts._BLOCK_STORED", 5 * block_values)
    again = evaluate(sdata, table_key="counts", predicted_key="predicted")
    pd.testing.assert_frame_equal(again, first, rtol=1e-10)
    assert again.attrs["n_regions"] == first.attrs["n_regions"]
    assert np.isnan(again.loc["E", "pcc"])


def test_tables_on_disk_are_read_in_blocks(sdata, tmp_path, monkeypatch):
    first = evaluate(sdata, table_key="counts", predicted_key="predicted")
    sdata.write(tmp_path / "slide.zarr")
    monkeypatch.setattr("pixnet_sd.slide.elements._stored._SMALL_BYTES", 0)
    opened = open_store(tmp_path / "slide.zarr")
    assert not opened.tables
    monkeypatch.setattr("pixnet_sd.tl._evaluate._BLOCK_VALUES", 17)
    again = evaluate(opened, table_key="counts", predicted_key="predicted")
    pd.testing.assert_frame_equal(again, first, rtol=1e-10)


def test_perfect(sdata, counts):
    found = evaluate(sdata, table_key="counts", predicted_key="predicted")
    predicted = sdata.tables["predicted"]
    target = np.log1p(1000 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    rows = predicted.obs["instance_id"].to_numpy() - 100
    for gene in GENES:
        predicted.X[:, predicted.var_names.get_loc(gene)] = target[rows, GENES.index(gene)]
    perfect = evaluate(sdata, table_key="counts", predicted_key="predicted")
    assert perfect.attrs["MSE"] == pytest.approx(0, abs=1e-10)
    assert perfect.attrs["PCC@F"] == pytest.approx(1)
    assert found.attrs["PCC@M"] < 0.5


def test_sparse_predictions(sdata):
    first = evaluate(sdata, table_key="counts", predicted_key="predicted")
    sdata.tables["predicted"].X = sparse.csr_matrix(sdata.tables["predicted"].X)
    pd.testing.assert_frame_equal(evaluate(sdata, table_key="counts", predicted_key="predicted"), first)


def test_keys_swapped(sdata):
    with pytest.raises(ElementError, match=r"'counts' was not written by pixnet_sd's predict. Did you swap the two"):
        evaluate(sdata, table_key="predicted", predicted_key="counts")


@pytest.mark.parametrize("keys", [("nowhere", "predicted"), ("counts", "nowhere")])
def test_no_such_table(sdata, keys):
    with pytest.raises(ElementError, match=r"There is no table 'nowhere'. Tables: .*'counts', 'predicted'"):
        evaluate(sdata, table_key=keys[0], predicted_key=keys[1])


def test_prediction_against_itself(sdata):
    """Predicted values are logs, not counts."""
    with pytest.raises(ElementError, match="'predicted' holds predictions: give table_key= of a table with raw counts"):
        evaluate(sdata, table_key="predicted", predicted_key="predicted")


def test_different_elements(sdata):
    sdata.shapes["cells"] = sdata.shapes["spots"]
    uns = {"pixnet_sd": {"target_sum": 1e4}}
    sdata.tables["of_cells"] = table(np.zeros((2, 5), np.float32), [100, 101], GENES, region="cells", uns=uns)
    with pytest.raises(ElementError, match=r"'spots'.*'cells'. Predict with shapes_key='spots'"):
        evaluate(sdata, table_key="counts", predicted_key="of_cells")


@pytest.mark.parametrize("lost", ["regions", "genes"])
def test_nothing_in_common(sdata, lost):
    predicted = sdata.tables["predicted"]
    if lost == "regions":
        predicted.obs["instance_id"] += 1000
        message = r"have 0 regions and 5 genes in common. Regions are called \[100, 101, 102\] and \[1\d\d\d"
    else:
        predicted.var_names = [f"hg38_{name}" for name in predicted.var_names]
        message = r"28 regions and 0 genes in common.*genes \['A', 'B', 'C'\] and \['hg38_"
    with pytest.raises(DataError, match=message):
        evaluate(sdata, table_key="counts", predicted_key="predicted")


def test_no_region_with_counts(sdata):
    sdata.tables["counts"].X = sparse.csr_matrix((N, 6), dtype=np.float32)
    with pytest.raises(DataError, match="none of the regions that 'predicted' predicts has a count"):
        evaluate(sdata, table_key="counts", predicted_key="predicted")


def test_counts_that_are_none(sdata, counts):
    sdata.tables["counts"].X = sparse.csr_matrix(np.where(counts == counts.max(), np.nan, counts))
    with pytest.raises(DataError, match="NaN"):
        evaluate(sdata, table_key="counts", predicted_key="predicted")
    sdata.tables["counts"].X = sparse.csr_matrix(np.log1p(counts))
    with pytest.warns(UserWarning, match="'counts'.*logarithms"):
        evaluate(sdata, table_key="counts", predicted_key="predicted")


def test_genes_named_twice(sdata):
    sdata.tables["counts"].var_names = ["A", "A", "C", "D", "E", "X"]
    with pytest.raises(DataError, match="'counts': 1 gene names occur more than once .*'A'"):
        evaluate(sdata, table_key="counts", predicted_key="predicted")


def test_after_predict(fitted, predict):
    predict(fitted, shapes_key="sample_square_008um", write=None)
    found = evaluate(sd.read_zarr(fitted.path), table_key="square_008um", predicted_key="pixnet_sample_square_008um")
    assert found.attrs["n_regions"] == 408
    assert np.isfinite(found.to_numpy()).all()


@pytest.mark.parametrize("regions", ["spots", ["elsewhere", "spots"]])
def test_coordinate_system_was_renamed_since(sdata, regions) -> None:
    """G6: tables meet in the element that both annotate, whatever its coordinate system is called now."""
    expected = evaluate(sdata, table_key="counts", predicted_key="predicted")
    sdata.tables["predicted"].uns["pixnet_sd"]["coordinate_system"] = "global"
    sdata["elsewhere"] = sdata["spots"]
    sdata.tables["counts"].uns["spatialdata_attrs"]["region"] = regions
    sdata.rename_coordinate_systems({"global": "slide"})
    pd.testing.assert_frame_equal(evaluate(sdata, table_key="counts", predicted_key="predicted"), expected)
