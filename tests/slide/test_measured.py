from __future__ import annotations

import numpy as np
import pytest
import shapely
from spatialdata import SpatialData

from pixnet_sd.errors import DataError, ElementError, ResolutionError
from pixnet_sd.geometry import Lattice
from pixnet_sd.slide import open_slide
from pixnet_sd.slide.tables import measured

XY = [[20, 30], [60, 80], [200, 100], [300, 220]]
X = np.array([[1, 2, 0], [3, 0, 4], [5, 5, 5], [0, 7, 1]], dtype=np.float32)
IDS = ["p", "q", "r", "s"]


@pytest.fixture
def spots(circles, table):
    """Four spots with a table whose rows come in the given order of ids."""

    def make(order=("p", "q", "r", "s"), x=None, xy=XY, ids=IDS) -> SpatialData:
        x = X[[IDS.index(i) for i in order]] if x is None else x
        shapes = {"spots": circles(xy, 5.0, index=ids)}
        return SpatialData(shapes=shapes, tables={"t": table("spots", list(order), x=x)})

    return make


def dense(found) -> np.ndarray:
    return found.rows(np.arange(len(found))).toarray()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("order", [("p", "q", "r", "s"), ("s", "p", "r", "q"), ("q", "s")])
def test_rows_are_joined_by_id(spots, frame, order) -> None:
    (found,) = measured(spots(order), frame())
    place = [IDS.index(i) for i in order]
    assert (found.table_key, found.element_key, len(found)) == ("t", "spots", len(order))
    assert tuple(found.instances) == order
    assert list(found.var_names) == ["GENE0", "GENE1", "GENE2"]
    np.testing.assert_array_equal(found.regions.centre_xy, np.array(XY)[place])
    np.testing.assert_array_equal(dense(found), X[place])
    assert found.is_complete


def test_rows_without_region_are_left_out(spots, frame) -> None:
    sdata = spots(("s", "q", "p"))
    sdata.shapes["spots"] = sdata.shapes["spots"].drop("q")
    with pytest.warns(UserWarning, match=r"1 of 3 rows have no region in element 'spots' \(first 'q'\)"):
        (found,) = measured(sdata, frame())
    assert list(found.instances) == ["s", "p"]
    np.testing.assert_array_equal(found.regions.centre_xy, [XY[3], XY[0]])
    np.testing.assert_array_equal(dense(found), X[[3, 0]])


def test_ids_of_another_type(spots, frame) -> None:
    with pytest.raises(DataError, match=r"none of its 4 instance ids.*'p'.*of the same type"):
        measured(spots(ids=[0, 1, 2, 3]), frame())


def test_spots_off_the_image_are_left_out(spots, frame) -> None:
    with pytest.warns(UserWarning, match="1 of 4 regions lie wholly outside"):
        (found,) = measured(spots(xy=[*XY[:3], [900, 900]]), frame())
    assert list(found.instances) == ["p", "q", "r"]
    assert not found.is_complete
    np.testing.assert_array_equal(dense(found), X[:3])


def test_no_spot_on_the_image(spots, frame) -> None:
    with pytest.raises(ResolutionError, match="Table 't', element 'spots': none of 4 regions touches"):
        measured(spots(xy=np.array(XY) + 1000), frame())


def test_swapped_axes(spots, frame) -> None:
    with pytest.raises(ResolutionError, match="x and y swapped"):
        measured(spots(xy=[[30, 250], [80, 260], [100, 300], [220, 310]]), frame())


def test_gene_names_are_unique(spots, frame) -> None:
    sdata = spots()
    sdata.tables["t"].var_names = ["A", "B", "A"]
    with pytest.raises(DataError, match=r"1 gene names occur more than once.*'A'.*var_names_make_unique"):
        measured(sdata, frame())


def test_no_table(circles, frame) -> None:
    with pytest.raises(ElementError, match="No table"):
        measured(SpatialData(shapes={"spots": circles(XY)}), frame())


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("dataset_id", ["sample", ""])
def test_visium_hd(visium_hd, frame, dataset_id: str, labels: bool) -> None:
    sdata = visium_hd(dataset_id=dataset_id, labels=labels, bins=(16, 8))
    small, large = measured(sdata, open_slide(sdata, working_mpp=1.0))
    assert (small.table_key, large.table_key) == ("square_008um", "square_016um")
    assert isinstance(large.regions, Lattice)
    np.testing.assert_allclose(large.regions.area, 16**2, rtol=1e-6)
    table, shapes = sdata.tables["square_016um"], sdata.shapes[f"{dataset_id}_square_016um"]
    centres = shapely.get_coordinates(shapely.centroid(shapes.geometry.loc[table.obs["location_id"]].to_numpy()))
    np.testing.assert_allclose(large.regions.centre_xy, centres * 0.5, atol=1e-6)
    np.testing.assert_array_equal(dense(large), table.X.toarray())


def test_take_keeps_everything_together(spots, frame) -> None:
    (found,) = measured(spots(), frame())
    part = found.take(np.array([False, True, False, True]))
    assert list(part.instances) == ["q", "s"]
    np.testing.assert_array_equal(part.regions.centre_xy, [XY[1], XY[3]])
    np.testing.assert_array_equal(dense(part), X[[1, 3]])
    assert found.take(np.ones(4, bool)) is found


def test_take_of_bins_in_another_order_than_the_table(visium_hd, frame) -> None:
    sdata = visium_hd()
    order = np.random.default_rng(0).permutation(sdata.tables["square_008um"].n_obs)
    sdata.tables["square_008um"] = sdata.tables["square_008um"][order].copy()
    found = measured(sdata, frame())[0]
    keep = np.random.default_rng(1).random(len(found)) < 0.3
    part = found.take(keep)
    np.testing.assert_array_equal(dense(part), dense(found)[keep])
    by_id = sdata.tables["square_008um"].obs.reset_index().set_index("location_id").index.get_indexer(part.instances)
    np.testing.assert_array_equal(dense(part), sdata.tables["square_008um"].X.toarray()[by_id])


def test_bins_without_a_shape_are_left_out(visium_hd, frame) -> None:
    sdata = visium_hd(bins=(8,))
    sdata.shapes["sample_square_008um"] = sdata.shapes["sample_square_008um"].drop([0, 7])
    with pytest.warns(UserWarning, match=r"2 of 192 rows have no region in element .* \(first 0\)"):
        (found,) = measured(sdata, frame())
    assert isinstance(found.regions, Lattice)
    assert not {0, 7} & set(found.instances)
    assert len(found) == len(found.regions) == 190
