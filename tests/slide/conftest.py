"""Tiny SpatialData objects, shaped as readers of spatialdata-io shape them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from numpy.typing import NDArray
from scipy import sparse
from spatialdata import SpatialData, rasterize_bins, rasterize_bins_link_table_to_labels, read_zarr
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, BaseTransformation, Identity, Scale
from spatialdata.transformations import Sequence as Chain

from pixnet_sd.geometry import Circles
from pixnet_sd.slide.tables import Counts, Measured, measured

HEIGHT_PX, WIDTH_PX = 240, 320
ORIGIN_UM = np.array([14.0, 8.0])
SPAN_UM = np.array([128, 96])  # of the bins, along x and y


def make_image(
    height: int = HEIGHT_PX,
    width: int = WIDTH_PX,
    *,
    channels: Sequence[str] = ("r", "g", "b"),
    scale_factors: Sequence[int] | None = None,
    transformations: dict[str, BaseTransformation] | None = None,
    seed: int = 0,
) -> Any:
    """An image element of random uint8."""
    pixels = np.random.default_rng(seed).integers(0, 255, (len(channels), height, width), dtype=np.uint8)
    place = transformations or {"sample": Identity()}
    return Image2DModel.parse(pixels, c_coords=list(channels), scale_factors=scale_factors, transformations=place)


def make_table(
    region: str | Sequence[str],
    instances: Sequence[Any] | NDArray[Any],
    *,
    x: Any = None,
    genes: int = 5,
    obs: dict[str, Any] | None = None,
) -> ad.AnnData:
    """A table whose rows annotate instances of one element, or (a name a row) of several."""
    n = len(instances)
    x = sparse.csr_matrix(np.random.default_rng(0).poisson(3, (n, genes)).astype(np.float32)) if x is None else x
    rows = [region] * n if isinstance(region, str) else list(region)
    frame = pd.DataFrame(
        {"region": pd.Categorical(rows), "location_id": np.asarray(instances), **(obs or {})},
        index=[f"row{i}" for i in range(n)],
    )
    table = ad.AnnData(x, obs=frame, var=pd.DataFrame(index=[f"GENE{i}" for i in range(x.shape[1])]))
    name = region if isinstance(region, str) else sorted(set(rows))
    return TableModel.parse(table, region=name, region_key="region", instance_key="location_id")


def make_visium_hd(
    *,
    dataset_id: str = "sample",
    mpp: float = 0.5,
    bins: Sequence[int] = (8, 16),
    angle: float = 0.02,
    circles: bool = False,
    labels: bool = False,
    small_images: bool = True,
    matrix: NDArray[np.float64] | None = None,
    keep: Callable[[NDArray[Any], NDArray[Any]], NDArray[np.bool_]] | None = None,
) -> SpatialData:
    """What ``spatialdata_io.visium_hd`` returns, 120 x 160 µm of it.

    `matrix` (3 x 3) places image and bins alike in the coordinate system; `keep(row, col)` picks bins.
    """
    place = Identity() if matrix is None else Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))
    hires, lowres = Scale([0.25, 0.25], axes=("x", "y")), Scale([0.1, 0.1], axes=("x", "y"))
    systems = {dataset_id: place, f"{dataset_id}_downscaled_hires": hires, f"{dataset_id}_downscaled_lowres": lowres}
    shape = round(HEIGHT_PX * 0.5 / mpp), round(WIDTH_PX * 0.5 / mpp)
    full = make_image(*shape, scale_factors=(2, 2), transformations=systems)
    images = {f"{dataset_id}_full_image": full}
    for name, scale, n in (("hires", hires, 4), ("lowres", lowres, 10)) if small_images else ():
        small = full["scale0"].image.coarsen(y=n, x=n).mean().round().astype(np.uint8)
        placed = {f"{dataset_id}_downscaled_{name}": Identity(), dataset_id: Chain([scale.inverse(), place])}
        images[f"{dataset_id}_{name}_image"] = Image2DModel.parse(
            small.values, c_coords=list("rgb"), transformations=placed
        )
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shapes, tables = {}, {}
    for size in bins:
        key = f"{dataset_id}_square_{size:03}um"
        row, col = np.indices(SPAN_UM[::-1] // size).reshape(2, -1)
        if keep is not None:
            row, col = np.stack([row, col])[:, keep(row, col)]
        xy = (np.stack([col + 0.5, row + 0.5], axis=1) * size @ turn.T + ORIGIN_UM) / mpp
        points = gpd.GeoDataFrame({"radius": size / mpp / 2}, geometry=shapely.points(xy), index=np.arange(len(xy)))
        # As the reader does it: squares lie along the axes although the lattice is turned.
        squares = gpd.GeoDataFrame(geometry=points.buffer(size / mpp / 2, cap_style="square"))
        shapes[key] = ShapesModel.parse(points if circles else squares, transformations=dict(systems))
        tables[f"square_{size:03}um"] = make_table(
            key, np.arange(len(xy)), obs={"array_row": row, "array_col": col, "in_tissue": 1}
        )
    sdata = SpatialData(images=images, shapes=shapes, tables=tables)
    for table_key in tables if labels else ():
        shapes_key = f"{dataset_id}_{table_key}"
        bins = rasterize_bins(sdata, shapes_key, table_key, "array_col", "array_row", return_region_as_labels=True)
        sdata[f"{shapes_key}_labels"] = bins
        rasterize_bins_link_table_to_labels(sdata, table_key, f"{shapes_key}_labels")
    return sdata


def make_visium(*, mpp: float = 0.5, diameter_um: float = 65.0) -> SpatialData:
    """What ``spatialdata_io.visium`` returns: circles on a hexagonal lattice."""
    row, col = np.indices((6, 6)).reshape(2, -1)
    um = np.stack([col + 0.5 * (row % 2), row * np.sqrt(3) / 2], axis=1) * 100 + 70
    image = make_image(round(700 / mpp), round(750 / mpp), transformations={"global": Identity()})
    spots = make_circles(um / mpp, diameter_um / mpp / 2, system="global")
    table = make_table("spots", np.asarray(spots.index))
    return SpatialData(images={"tissue_full_image": image}, shapes={"spots": spots}, tables={"table": table})


def make_circles(xy: Any, radius: Any = 5.0, *, index: Any = None, system: str = "sample") -> Any:
    """Circles element from centres (n, 2) px."""
    points = gpd.GeoDataFrame({"radius": np.broadcast_to(radius, len(xy))}, geometry=shapely.points(xy), index=index)
    return ShapesModel.parse(points, transformations={system: Identity()})


def make_labels(values: NDArray[Any], **options: Any) -> Any:
    """Labels element in coordinate system sample."""
    return Labels2DModel.parse(values, dims=("y", "x"), transformations={"sample": Identity()}, **options)


def similarity(scale: float, angle: float, flip: bool = False, shift: Sequence[float] = (30, -20)) -> NDArray[Any]:
    """Map of (x, y, 1)."""
    cos, sin, sign = scale * np.cos(angle), scale * np.sin(angle), -1.0 if flip else 1.0
    return np.array([[cos, -sin * sign, shift[0]], [sin, cos * sign, shift[1]], [0, 0, 1]])


def make_measured(x: Any, genes: Any, radius: float = 5.0, rows: Any = None, make: Any = sparse.csr_matrix) -> Measured:
    """Circles, the k-th with the counts of row ``rows[k]`` of x."""
    x = np.asarray(x)
    return Measured(
        table_key=f"t{radius:.0f}",
        element_key="spots",
        regions=Circles(np.arange(2.0 * len(x)).reshape(-1, 2), radius),
        instances=pd.RangeIndex(len(x)),
        counts=Counts.of(make(x), np.arange(len(x)) if rows is None else rows, "x"),
        var_names=pd.Index(list(genes)),
    )


# what makes them, for tests to ask for by name
image = pytest.fixture(lambda: make_image)
table = pytest.fixture(lambda: make_table)
circles = pytest.fixture(lambda: make_circles)
visium_hd = pytest.fixture(lambda: make_visium_hd)
visium = pytest.fixture(lambda: make_visium)


@pytest.fixture
def frame() -> SimpleNamespace:
    """What `measured` needs of a slide."""
    place = {"image_key": None, "coordinate_system": "sample", "working_from_system": np.eye(3)}
    return SimpleNamespace(**place, working_shape=(HEIGHT_PX, WIDTH_PX))


@pytest.fixture
def opened(visium_hd, frame, tmp_path):
    """The only table of a slide, in memory or in a store, after a change."""

    def make(change=lambda table: None, is_stored=False) -> Measured:
        sdata = visium_hd(bins=(8,))
        table = sdata.tables["square_008um"]
        table.X = sparse.csr_matrix(table.X.toarray() * [1, 500, 1, 1, 70])
        change(table)
        if is_stored:
            sdata.write(tmp_path / "slide.zarr", overwrite=True)
            sdata = read_zarr(tmp_path / "slide.zarr", selection=("images",))
        return measured(sdata, frame)[0]

    return make
