from __future__ import annotations

from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from pixnet_sd.errors import DataError
from pixnet_sd.geometry import Circles, Polygons
from pixnet_sd.slide.elements import regions_from_shapes

SQUARE = shapely.box(2, 3, 8, 9)
RING = shapely.Polygon(shapely.box(0, 0, 10, 10).exterior, [shapely.box(2, 2, 5, 6).exterior])
ISLANDS = shapely.MultiPolygon([shapely.box(20, 20, 24, 24), shapely.Polygon(shapely.affinity.translate(RING, 30, 0))])


def frame(geometry: list[Any], **columns: Any) -> gpd.GeoDataFrame:
    return gpd.GeoDataFrame(columns, geometry=geometry, index=[f"c{i}" for i in range(len(geometry))])


def filled(regions: Polygons, size: int = 48) -> list[set[tuple[int, int]]]:
    """Pixels (row, col) of each region."""
    pixels: list[set[tuple[int, int]]] = [set() for _ in range(len(regions))]
    for region, row, start, stop in zip(*regions.spans(0, size, 0, size), strict=True):
        pixels[region] |= {(row, col) for col in range(start, stop)}
    return pixels


def by_shapely(geometry: list[Any], size: int = 48) -> list[set[tuple[int, int]]]:
    row, col = (index.ravel() for index in np.mgrid[:size, :size])
    hits = [shapely.contains_xy(g, col + 0.5, row + 0.5) for g in geometry]
    return [set(zip(row[hit].tolist(), col[hit].tolist(), strict=True)) for hit in hits]


def test_points_with_radius_are_circles() -> None:
    regions = regions_from_shapes(frame([shapely.Point(3, 4), shapely.Point(5, 6)], radius=[1.0, 2.0]), "x")
    assert isinstance(regions, Circles)
    np.testing.assert_array_equal(regions.centre_xy, [[3, 4], [5, 6]])
    np.testing.assert_array_equal(regions.radius, [1, 2])


def test_polygons_holes_and_multipolygons_in_order() -> None:
    geometry = [RING, SQUARE, ISLANDS, shapely.reverse(RING)]
    regions = regions_from_shapes(frame(geometry), "x")
    assert isinstance(regions, Polygons)
    np.testing.assert_allclose(regions.area, shapely.area(geometry))
    np.testing.assert_allclose(regions.centre_xy, shapely.get_coordinates(shapely.centroid(geometry)))
    np.testing.assert_allclose(regions.bounds, shapely.bounds(geometry))
    assert filled(regions) == by_shapely(geometry)


def test_rings_are_not_closed() -> None:
    regions = regions_from_shapes(frame([RING, SQUARE]), "x")
    np.testing.assert_array_equal(regions.ring_offsets, [0, 4, 8, 12])
    np.testing.assert_array_equal(regions.ring_region, [0, 0, 1])


def test_third_coordinate_is_left_out() -> None:
    assert regions_from_shapes(frame([shapely.force_3d(SQUARE, 7.0)]), "x").vertices.shape == (4, 2)


# Hundredths plus an odd fraction: no vertex, and so no pixel centre, lies where rounding decides.
PLACE = st.integers(300, 4000).map(lambda v: v / 100 + 0.00314159)
RADIUS = st.integers(100, 700).map(lambda v: v / 100 + 0.00173205)


@given(st.lists(st.tuples(PLACE, PLACE, RADIUS), min_size=1, max_size=6))
def test_any_polygons_fill_as_shapely_says(discs: list[tuple[float, float, float]]) -> None:
    geometry = [shapely.Point(x, y).buffer(r, quad_segs=3) for x, y, r in discs]
    merged = shapely.union_all(geometry)
    assert filled(regions_from_shapes(frame([*geometry, merged]), "x")) == by_shapely([*geometry, merged])


BOWTIE = shapely.Polygon([(0, 0), (4, 4), (4, 0), (0, 4)])
NAN = shapely.Polygon([(0, 0), (4, np.nan), (4, 0)])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (shapely.GeometryCollection([SQUARE]), "neither polygons nor multipolygons"),
        (shapely.Point(1, 2), "neither polygons nor multipolygons"),
        (shapely.LineString([(0, 0), (1, 1)]), "neither polygons nor multipolygons"),
        (shapely.Polygon(), "missing or empty"),
        (None, "missing or empty"),
        (NAN, "NaN or infinite"),
        (BOWTIE, "invalid"),
    ],
)
def test_bad_geometries_are_counted_and_named(bad: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"Shapes 'cells': 2 of 4 geometries are .*{message}.*first: 'c1', 'c3'"):
        regions_from_shapes(frame([SQUARE, bad, RING, bad]), "Shapes 'cells'")


def test_points_need_a_radius() -> None:
    with pytest.raises(DataError, match="without a column 'radius'"):
        regions_from_shapes(frame([shapely.Point(1, 2)]), "x")


@pytest.mark.parametrize("radius", [0.0, -1.0, np.nan, np.inf])
def test_radius_is_positive(radius: float) -> None:
    with pytest.raises(DataError, match=r"1 of 2 .*positive radius \(first: 'c1'\)"):
        regions_from_shapes(frame([shapely.Point(1, 2), shapely.Point(1, 2)], radius=[1.0, radius]), "x")


def test_centres_are_finite() -> None:
    with pytest.raises(DataError, match="1 of 2 geometries"):
        regions_from_shapes(frame([shapely.Point(1, 2), shapely.Point(1, np.nan)], radius=[1.0, 1.0]), "x")


def test_empty_element() -> None:
    with pytest.raises(DataError, match="is empty"):
        regions_from_shapes(frame([]), "x")
