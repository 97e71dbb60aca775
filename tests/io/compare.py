"""Whether two stores hold the same; `spatialdata.testing` cannot be imported under pytest's strict markers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from anndata import AnnData
from geopandas.testing import assert_geodataframe_equal
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

__all__ = ["assert_same"]


def assert_same(found: SpatialData, expected: SpatialData) -> None:
    """Names, coordinate systems, transformations and everything in the elements."""
    names = {name: kind for kind, name, _ in expected.gen_elements()}
    assert {name: kind for kind, name, _ in found.gen_elements()} == names
    assert set(found.coordinate_systems) == set(expected.coordinate_systems)
    for name, kind in names.items():
        if kind != "tables":
            assert get_transformation(found[name], get_all=True) == get_transformation(expected[name], get_all=True)
        _COMPARE[kind](found[name], expected[name])


def _compare_images(found: Any, expected: Any) -> None:
    if isinstance(expected, xr.DataTree):
        xr.testing.assert_identical(_bare(found), _bare(expected))
    else:
        xr.testing.assert_equal(found, expected)


def _bare(tree: xr.DataTree) -> xr.DataTree:
    return tree.map_over_datasets(lambda data: data.drop_attrs())


def _compare_tables(found: AnnData, expected: AnnData) -> None:
    assert found.shape == expected.shape
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found.X, part), getattr(expected.X, part))
        assert getattr(found.X, part).dtype == getattr(expected.X, part).dtype
    pd.testing.assert_frame_equal(found.obs, expected.obs)
    pd.testing.assert_frame_equal(found.var, expected.var)
    assert set(found.obsm) == set(expected.obsm)
    for key in expected.obsm:
        np.testing.assert_array_equal(found.obsm[key], expected.obsm[key])
    assert found.uns == expected.uns


_COMPARE = {"images": _compare_images, "shapes": assert_geodataframe_equal, "tables": _compare_tables}
