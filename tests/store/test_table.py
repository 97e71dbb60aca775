"""The first plot that a user makes has to work: these tests look at what is drawn."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import squidpy as sq
from spatialdata import join_spatialelement_table
from tests.store.putting import commit

from pixnet_sd.errors import DataError
from pixnet_sd.store import Transaction, circles_element, region_table, thumbnail
from pixnet_sd.store.gene_map import GeneMapWriter, image_transforms, map_layout

GENES = ["ERBB2", "MT-CO1", "KRT8"]


@pytest.fixture(autouse=True)
def _agg():
    mpl.use("Agg")
    yield
    plt.close("all")


def grid():
    x, y = np.meshgrid(np.arange(20, 400, 20.0), np.arange(20, 290, 20.0))
    return np.c_[x.ravel(), y.ravel()]


def make_table(sdata, **changes):
    centres = grid()
    arguments = {
        "values": np.c_[centres[:, 0], centres[:, 1], centres.sum(1)].astype(np.float32),
        "genes": GENES,
        "instance_ids": np.arange(len(centres)) + 7,
        "region": "pixnet_circles_8um_shapes",
        "centres_px": centres,
        "spot_diameter_px": 16.0,
        "picture": thumbnail(sdata, "_full_image", max_px=100),
        "library_id": "",
        "obs": {"area_um2": np.full(len(centres), 200.0), "n_px": np.full(len(centres), 50)},
        "var": pd.DataFrame({"pcc": [0.1, 0.2]}, index=["KRT8", "ERBB2"]),
    }
    arguments.update(changes)
    return region_table(**arguments)


@pytest.fixture
def predicted(slide):
    circles = circles_element(grid(), 8.0, image_transforms(slide, "_full_image"), index=np.arange(len(grid())) + 7)
    transforms = image_transforms(slide, "_full_image")
    options = {"layout": map_layout(3, (75, 105), 64), "transforms": transforms, "pitch_image_px": 4.0}
    with Transaction(slide, {"pixnet_map": "images"}) as out:
        writer = GeneMapWriter(out, key="pixnet_map", channels=GENES, fingerprint="", **options)
        for row0, row1, col0, col1 in writer.pending:
            gradient = np.arange(col0, col1, dtype=np.float32)
            writer.write((row0, row1, col0, col1), np.broadcast_to(gradient, (3, row1 - row0, col1 - col0)))
        others = {"pixnet_circles_8um_shapes": circles, "pixnet_circles_8um": make_table(slide)}
        out.commit({"pixnet_map": writer.element(), **others})
    return sd.read_zarr(slide.path)


def test_columns(slide):
    table = make_table(slide)
    assert table.X.dtype == np.float32
    assert table.var["pcc"].tolist()[0] == 0.2
    assert np.isnan(table.var["pcc"].tolist()[1])
    assert table.obs["area_um2"].eq(200).all()
    assert table.obs_names[0] == "7"
    np.testing.assert_array_equal(table.obsm["spatial"], grid())


def test_table_annotates_its_shapes(predicted):
    element, table = join_spatialelement_table(
        sdata=predicted, spatial_element_names="pixnet_circles_8um_shapes", table_name="pixnet_circles_8um"
    )
    joined = element["pixnet_circles_8um_shapes"]
    assert len(joined) == table.n_obs == len(grid())
    np.testing.assert_allclose(np.c_[joined.geometry.x, joined.geometry.y], table.obsm["spatial"])


def test_squidpy_draws_every_spot_on_the_slide(predicted):
    table = predicted.tables["pixnet_circles_8um"]
    axes = sq.pl.spatial_scatter(table, color="ERBB2", return_ax=True)
    spots = axes.collections[0]
    centres = np.array([path.vertices.mean(0) for path in spots.get_paths()])
    assert len(centres) == table.n_obs
    colours = spots.get_array()
    assert np.corrcoef(colours, table[:, "ERBB2"].X.ravel())[0, 1] > 0.999
    scale = table.uns["spatial"]["pixnet"]["scalefactors"]["tissue_hires_scalef"]
    extents = np.array([path.get_extents().size for path in spots.get_paths()])
    np.testing.assert_allclose(extents.max(), 16 * scale, rtol=0.02)
    assert len(axes.images) == 1
    assert axes.images[0].get_array().shape[:2] == (50, 70)
    assert axes.images[0].get_array().std() > 0


def test_squidpy_draws_without_a_picture(slide):
    table = make_table(slide, picture=None)
    axes = sq.pl.spatial_scatter(table, color="ERBB2", img=False, return_ax=True)
    assert len(axes.collections[0].get_paths()) == table.n_obs


@pytest.mark.parametrize("system", ["", "mirrored"])
def test_spatialdata_plot_draws_the_map(predicted, system):
    import spatialdata_plot  # noqa: F401  (registers `.pl`)

    axes = predicted.pl.render_images("pixnet_map", channel="ERBB2").pl.show(coordinate_systems=system, return_ax=True)
    drawn = np.asarray(axes.images[0].get_array())
    assert drawn.size > 0
    assert np.isfinite(drawn).all()
    assert drawn.std() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"genes": ["A", "B"]}, "2 genes, but values of shape"),
        ({"genes": ["A", "B", "A"]}, "gene A is named twice"),
        ({"instance_ids": np.zeros(len(grid()), dtype=int)}, "region 0 is named twice"),
        ({"centres_px": grid()[1:]}, "centres of shape"),
    ],
)
def test_refused(slide, changes, message):
    with pytest.raises(DataError, match=message):
        make_table(slide, **changes)


def test_text_ids_survive(slide):
    ids = [f"cell_{i}" for i in range(len(grid()))]
    circles = circles_element(grid(), 8.0, image_transforms(slide, "_full_image"), index=ids)
    table = make_table(slide, instance_ids=ids, region="spots", picture=None)
    commit(slide, {"spots": circles, "t": table})
    again = sd.read_zarr(slide.path)
    assert again.tables["t"].obs["instance_id"].tolist() == again.shapes["spots"].index.tolist() == ids
