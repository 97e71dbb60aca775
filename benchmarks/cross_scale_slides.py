"""Slides for `cross_scale.py`: generated tissue with bins and spots, and test regions whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
import spatialdata as sd
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import get_transformation

import pixnet_sd as ps

__all__ = ["BIN_UM", "MPP", "SPOT_UM", "TestRegions", "log_normalised", "test_slide", "training_slide", "varying_genes"]

MPP = 1.0
BIN_UM, SPOT_UM = (2, 8, 16), (55, 100)
PITCH_UM = 100.0
MORE = {2: 5, 8: 2, 16: 1}  # test regions, for totals of which noise is not the most
COVERED = 0.9  # of a spot has to be tissue

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TestRegions:
    """Regions of one size on a test slide.

    Attributes
    ----------
    size_um
        Side of a bin, or diameter of a spot.
    key
        Name of their element.
    centre_px
        Shape (n, 2).
    counts, truth
        Drawn counts, and what is expected in the tissue, shape (n, genes).
    """

    size_um: int
    key: str
    centre_px: Array
    counts: Array
    truth: Array

    def thinned(self) -> TestRegions:
        """As many as there are of the larger sizes, for methods that take long for each."""
        some = slice(None, None, MORE.get(self.size_um, 1))
        return replace(self, centre_px=self.centre_px[some], counts=self.counts[some], truth=self.truth[some])


def training_slide(size_um: float, seed: int) -> sd.SpatialData:
    """A slide with tables of 2, 8 and 16 µm bins, and of 55 and 100 µm spots (``spots_055um``, ``spots_100um``)."""
    sdata = _sample(size_um, seed)
    bins = sdata.tables["square_002um"]
    centres = np.stack(np.meshgrid(*[np.arange(PITCH_UM / 2, size_um, PITCH_UM)] * 2), axis=-1).reshape(-1, 2) / MPP
    for spot_um in SPOT_UM:
        member = _members(bins.obsm["spatial"], centres, spot_um)
        kept = _covered(member, spot_um)
        _add_table(sdata, spot_um, centres[kept], member[kept] @ bins.X, bins.var)
    return sdata


def test_slide(size_um: float, seed: int, n_regions: int) -> tuple[sd.SpatialData, list[TestRegions]]:
    """A slide with an image and test regions only, drawn at random once: the same for all methods."""
    sdata, rng = _sample(size_um, seed), np.random.default_rng(seed)
    shapes, found = {}, []
    for bin_um in BIN_UM:
        table, element = sdata.tables[f"square_{bin_um:03d}um"], sdata.shapes[f"sample_square_{bin_um:03d}um"]
        n_bins = min(n_regions * MORE[bin_um], table.n_obs)
        pick = np.sort(rng.choice(table.n_obs, n_bins, replace=False))
        truth = ps.datasets.sample_truth_bins(bin_um, size_um=size_um, mpp=MPP, seed=seed, library_size=False)
        key = f"test_{bin_um:03d}um"
        shapes[key] = element.loc[table.obs["location_id"].to_numpy()[pick]]
        found.append(
            TestRegions(
                bin_um, key, table.obsm["spatial"][pick], _dense(table.X[pick]), truth.to_numpy(np.float64)[pick]
            )
        )
        if bin_um == BIN_UM[0]:
            bins, fine_truth = table, truth.to_numpy(np.float64)
    for spot_um in SPOT_UM:
        centres = bins.obsm["spatial"][np.sort(rng.choice(bins.n_obs, 3 * n_regions))]
        member = _members(bins.obsm["spatial"], centres, spot_um)
        kept = np.flatnonzero(_covered(member, spot_um))[:n_regions]
        key = f"test_{spot_um:03d}um"
        shapes[key] = _circles(sdata, centres[kept], spot_um)
        found.append(TestRegions(spot_um, key, centres[kept], _dense(member[kept] @ bins.X), member[kept] @ fine_truth))
    images = {"sample_full_image": sdata.images["sample_full_image"]}
    return sd.SpatialData(images=images, shapes=shapes), found


def _sample(size_um: float, seed: int) -> sd.SpatialData:
    return ps.datasets.sample(size_um=size_um, mpp=MPP, bin_um=BIN_UM, seed=seed)


def _members(xy: Array, centres: Array, diameter_um: float) -> sparse.csr_array:
    """Which 2 µm bins have their centre in which circle, (circles, bins)."""
    inside = cKDTree(xy).query_ball_point(centres, diameter_um / 2 / MPP)
    rows = np.repeat(np.arange(len(centres)), [len(part) for part in inside])
    columns = np.concatenate([np.asarray(part, np.int64) for part in inside])
    return sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(centres), len(xy)))


def _covered(member: sparse.csr_array, diameter_um: float) -> NDArray[np.bool_]:
    area = np.asarray(member.sum(axis=1)).ravel() * BIN_UM[0] ** 2
    return np.asarray(area > COVERED * np.pi * (diameter_um / 2) ** 2)


def _circles(sdata: sd.SpatialData, centres: Array, diameter_um: float) -> gpd.GeoDataFrame:
    frame = gpd.GeoDataFrame({"radius": np.full(len(centres), diameter_um / 2 / MPP)}, geometry=shapely.points(centres))
    transforms = get_transformation(sdata.shapes["sample_square_016um"], get_all=True)
    return ShapesModel.parse(frame, transformations=transforms)


def _add_table(sdata: sd.SpatialData, spot_um: int, centres: Array, counts: Any, var: pd.DataFrame) -> None:
    key = f"spots_{spot_um:03d}um"
    sdata.shapes[f"{key}_circles"] = _circles(sdata, centres, spot_um)
    obs = pd.DataFrame(
        {"region": pd.Categorical([f"{key}_circles"] * len(centres)), "spot": np.arange(len(centres))},
        index=[f"{key}_{k}" for k in range(len(centres))],
    )
    table = ad.AnnData(X=sparse.csr_matrix(counts, dtype=np.float32), obs=obs, var=var)
    sdata.tables[key] = TableModel.parse(table, region=f"{key}_circles", region_key="region", instance_key="spot")


def _dense(counts: Any) -> Array:
    return np.asarray(counts.toarray(), np.float64)


def log_normalised(counts: Array, target_sum: float = 1e4) -> Array:
    """``log1p(target_sum * x / sum x)``; 0 for a region without counts."""
    return np.log1p(target_sum * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-12))


def varying_genes(sdata: sd.SpatialData) -> Sequence[bool]:
    """Genes whose density is not the same all over the tissue."""
    return sdata.tables["square_016um"].var["spatially_varying"].to_numpy(bool)
