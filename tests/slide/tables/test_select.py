"""Tables with measured expression: found by themselves where they can be told, named where they cannot."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from spatialdata import SpatialData
from spatialdata.transformations import Identity, Scale, Translation, set_transformation
from tests.slide.conftest import make_image, make_table

from pixnet_sd.errors import DataError, ElementError
from pixnet_sd.slide.elements import table_link
from pixnet_sd.slide.tables import select_tables


@pytest.mark.parametrize(("dataset_id", "labels"), [("sample", False), ("", True)])
def test_all_bins_by_size_and_no_cells(visium_hd, circles, table, dataset_id: str, labels: bool) -> None:
    sdata = visium_hd(dataset_id=dataset_id, bins=(16, 8), labels=labels)
    sdata["cells"] = circles([[1, 2], [3, 4]], system=dataset_id)
    sdata["cell_table"] = table("cells", [0, 1])
    for where in ({}, {"coordinate_system": dataset_id}):
        assert select_tables(sdata, **where) == ["square_008um", "square_016um"]
    for named in (["square_016um"], ["square_016um", "square_008um"]):
        assert select_tables(sdata, table_key=named) == named
    assert select_tables(sdata, table_key="square_016um") == ["square_016um"]
    for missing in (["square_016um", "other"], [], ["square_016um", "square_016um"]):
        with pytest.raises(ElementError, match="'square_016um'.*table_key="):
            select_tables(sdata, table_key=missing)


def test_no_table_or_only_of_another_slide_and_none_of_ours(circles, table) -> None:
    with pytest.raises(ElementError, match="'free', 'lost'"):
        select_tables(SpatialData(tables={"free": ad.AnnData(np.ones((2, 2))), "lost": table("gone", [0])}))
    shapes = {"a": circles([[1, 2]], system="A"), "b": circles([[1, 2]], system="B")}
    tables = {"ta": table("a", [0]), "tb": table("b", [0]), "pixnet": table("b", [0])}
    tables["pixnet"].uns["pixnet_sd"] = {}
    sdata = SpatialData(shapes=shapes, tables=tables)
    assert select_tables(sdata, coordinate_system="B") == ["tb"]
    with pytest.raises(ElementError, match="'C'.*coordinate_system='A'"):
        select_tables(sdata, coordinate_system="C")


def test_link(circles, table) -> None:
    shapes = {"a": circles([[1, 2], [5, 6]], system="A", index=["u", "v"]), "b": circles([[1, 2]], system="B")}
    sdata = SpatialData(shapes=shapes, tables={"t": table(["a", "b", "a"], ["v", "w", "u"])})
    link = table_link(sdata, table_key="t", coordinate_system="A")
    assert (link.table_key, link.element_key, list(link.instances)) == ("t", "a", ["v", "u"])
    np.testing.assert_array_equal(link.rows, [0, 2])
    with pytest.raises(ElementError, match="'a', 'b'"):
        table_link(sdata, table_key="t")
    with pytest.raises(ElementError, match="'C'"):
        table_link(sdata, table_key="t", coordinate_system="C")


UNLINKED = {
    "no region": (ad.AnnData(np.ones((2, 2))), {}, ElementError, "'t'"),
    "region is gone": (make_table("gone", [0]), {}, ElementError, "'t'.*'gone'"),
    "no rows": (ad.AnnData(np.ones((0, 5))), {}, DataError, "'t'.*0 rows x 5 genes"),
    "no genes": (make_table("spots", [0], genes=0), {}, DataError, "'t'.*1 rows x 0 genes"),
    "no row": (make_table("spots", [0]), {"region": pd.Categorical(["other"])}, DataError, "'t'.*'spots'"),
    "id twice": (make_table("spots", [0, 1]), {"location_id": [1, 1]}, DataError, "'t'.*1"),
    "no id": (make_table("spots", [0, 1]), {"location_id": [0.0, np.nan]}, DataError, "'t'.*1"),
    "bytes": (make_table("spots", [0, 1]), {"location_id": [b"a", b"b"]}, DataError, "'t'"),
}


@pytest.mark.parametrize(("made", "obs", "error", "names"), UNLINKED.values(), ids=UNLINKED)
def test_tables_that_cannot_be_linked(circles, made, obs, error, names) -> None:
    sdata = SpatialData(shapes={"spots": circles([[1, 2], [3, 4]])}, tables={"t": made})
    for name, values in obs.items():
        sdata.tables["t"].obs[name] = values
    with pytest.raises(error, match=names):
        table_link(sdata, table_key="t")


@pytest.mark.parametrize(
    ("bins", "change"),
    [(True, lambda x: x * 500.3), (False, lambda x: x - 1), (True, lambda x: x * 0), (False, np.log)],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_counts_before_a_normalised_copy(visium_hd, circles, table, bins: bool, change, caplog) -> None:
    """R8: one table for the same regions, that with counts; it is said which was left out."""
    caplog.set_level("INFO", "pixnet_sd")
    sdata = visium_hd(bins=(8,)) if bins else SpatialData(shapes={"cells": circles([[1, 2], [3, 4]])})
    key, region = ("square_008um", "sample_square_008um") if bins else ("table", "cells")
    if not bins:
        sdata["table"] = table("cells", [0, 1])
    for name in ("a_copy", "b_copy"):
        sdata[name] = sdata[key].copy()
        sdata[name].X = change(sdata[key].X.toarray())
    assert select_tables(sdata) == [key]
    assert "'a_copy'" in caplog.text
    assert select_tables(sdata, table_key="a_copy") == ["a_copy"]
    sdata["second"] = sdata[key].copy()
    with pytest.raises(ElementError, match=rf"'{region}'.*'second'.*table_key="):
        select_tables(sdata)
    with pytest.raises(ElementError, match=rf"'second' and '{key}'.*table_key=.*'{region}'"):
        select_tables(sdata, table_key=["second", key])
    del sdata.tables["second"], sdata.tables[key]
    with pytest.raises(ElementError, match=f"'{region}': 'a_copy', 'b_copy'.*table_key="):
        select_tables(sdata)  # none has counts


@pytest.mark.parametrize("size", [8, 16, 2])
def test_bins_of_two_samples_in_one_system(visium_hd, size: int) -> None:
    """R7: of one size, or of two sizes with two images; by name they can be taken."""
    one, other = visium_hd(bins=(8,)), visium_hd(dataset_id="b", bins=(size,))
    sdata = SpatialData(images={"he": one["sample_full_image"]}, shapes=one.shapes, tables=one.tables)
    regions = f"b_square_{size:03}um"
    sdata[regions], sdata["b_table"] = other[regions], other[f"square_{size:03}um"]
    set_transformation(sdata[regions], {"sample": Identity()}, set_all=True)
    where = {"coordinate_system": "sample", "image_key": "he"}
    if size != 8:
        assert set(select_tables(sdata, **where)) == {"square_008um", "b_table"}  # as if they were of one
        sdata["b_he"] = make_image(400, 500, seed=1)
    with pytest.raises(ElementError, match="('square_008um'.*'b_table'|'b_table'.*'square_008um').*table_key="):
        select_tables(sdata, **where)
    assert select_tables(sdata, table_key="b_table", **where) == ["b_table"]
    set_transformation(sdata[regions], Scale([0.5, 0.5], axes=("x", "y")), "sample")
    sdata.images.pop("b_he", None)
    with pytest.raises(ElementError, match="'b_table'.*table_key="):  # another resolution
        select_tables(sdata, **where)
    far = Translation([5000, 0], axes=("x", "y"))
    set_transformation(sdata[regions], far, "sample")
    assert select_tables(sdata, **where) == ["square_008um"]  # what lies beside the image is not of it
