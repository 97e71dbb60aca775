"""Which image is the slide, in which coordinate system regions meet it, and its micrometres per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Image3DModel
from spatialdata.transformations import Affine, Identity, Scale, Translation, set_transformation
from tests.slide.conftest import make_circles, make_labels, similarity

from pixnet_sd.errors import DataError, ElementError, ResolutionError
from pixnet_sd.slide import Slide, find_mpp, open_slide, other_slides, select_coordinate_system, select_image
from pixnet_sd.slide.tables import select_tables

ODD = ("first", "second", "third")
STAINS = [("DAPI", "CD45", "PanCK"), ("GFP", "RFP", "BFP"), ("red", "green", "DAPI")]
SCATTERED = np.random.default_rng(0).uniform(10, 200, (60, 2))
HALF = Scale([0.5, 0.5], axes=("x", "y"))


def fluorescence(channels: Sequence[str], height: int = 60, width: int = 80) -> Any:
    """A dark image with a bright spot."""
    pixels = np.random.default_rng(1).exponential(8, (3, height, width)).clip(0, 255).astype(np.uint8)
    pixels[0, 5:10, 5:10] = 240
    return Image2DModel.parse(pixels, c_coords=list(channels))


def slide(**images: Any) -> SpatialData:
    return SpatialData(images=images, attrs={"pixnet_sd": {"maps": {"pixnet_map": {}}}})


def opened(sdata: SpatialData, **arguments: Any) -> Slide:
    return open_slide(sdata, mpp=0.5, **arguments)


@pytest.mark.parametrize("channels", [tuple("ABCDEF"), ("DAPI",), ("DAPI", "CD45", "18S", "aSMA")])
def test_other_images_are_no_candidates(image, channels) -> None:
    volume = Image3DModel.parse(np.zeros((3, 2, 8, 8), np.uint8), dims=("c", "z", "y", "x"))
    for he in (image(), image(channels="0123")):
        assert select_image(slide(he=he, other=image(channels=channels), stack=volume, pixnet_map=image())) == "he"
    assert select_image(slide(grey=image(channels="0"))) == "grey"  # the only one, whatever it is
    with pytest.raises(DataError, match=r"'stack'.*\('c', 'z', 'y', 'x'\)"):
        opened(slide(stack=volume))
    for images, name in (({}, None), ({"pixnet_map": image()}, "'pixnet_map'")):
        with pytest.raises(ElementError, match=name):
            select_image(slide(**images))


def test_several_images_are_listed(image) -> None:
    listed = r"'a' \(3 c x 10 y x 20 x; channels r, g, b; .*coordinate systems: 'sample'\); 'b'.*image_key="
    elsewhere = slide(a=image(10, 20), b=image(transformations={"elsewhere": Identity()}))
    for sdata in (slide(a=image(10, 20), b=image()), slide(a=image(10, 20), b=image(10, 20, seed=1)), elsewhere):
        with pytest.raises(ElementError, match=listed):
            select_image(sdata)
    assert select_image(elsewhere, coordinate_system="elsewhere") == "b"


def test_image_that_is_not_there(image) -> None:
    with pytest.raises(ElementError, match="'other'"):
        select_image(slide(he=image()), image_key="other")
    for image_key in ("he", None):
        with pytest.raises(ElementError, match="'x'.*'sample'"):
            select_image(slide(he=image()), image_key=image_key, coordinate_system="x")


@pytest.mark.parametrize("beside", [("r", "g", "b"), ("0", "1", "2"), ODD, STAINS[0]])
@pytest.mark.parametrize("own", [("r", "g", "b"), ODD])
@pytest.mark.filterwarnings("ignore:image 'he'")
def test_bright_field_before_fluorescence_whatever_its_channels_are_called(image, own, beside) -> None:
    he = image(channels=own)
    assert opened(slide(overview=fluorescence(beside, 400, 500), he=he)).image_key == "he"
    with pytest.raises(ElementError, match=rf"'he'.*{', '.join(own)}.*'overview'.*r, g, b.*image_key="):
        opened(slide(he=he, overview=image(40, 90)))


@pytest.mark.parametrize("channels", STAINS)
def test_stains_are_no_colours_even_if_bright(image, channels) -> None:
    for element in (image(channels=channels), fluorescence(channels)):
        with pytest.raises(DataError, match=f"'he'.*{', '.join(channels)}.*c_coords="):
            opened(slide(he=element))


@pytest.mark.parametrize("image_key", [None, "he"])
def test_other_names_are_colours_only_on_a_bright_ground(image, image_key) -> None:
    with pytest.warns(UserWarning, match=r"'he'.*first, second, third.*c_coords="):
        assert opened(slide(he=image(channels=ODD)), image_key=image_key).channels == ODD
    with pytest.raises(DataError, match="'he'.*first, second, third"):
        opened(slide(he=fluorescence(ODD)), image_key=image_key)
    with pytest.warns(UserWarning, match="'he' is dark"):
        opened(slide(he=fluorescence("rgb")), image_key=image_key)


@pytest.mark.parametrize(
    ("channels", "order"),
    [("bgr", [2, 1, 0]), (("Blue", "green", "RED"), [2, 1, 0]), ("bgra", [2, 1, 0]), ("012", [0, 1, 2])],
)
def test_colours_are_put_in_order_by_exact_names(image, channels, order) -> None:
    element = image(channels=channels)
    he = opened(slide(he=element))
    np.testing.assert_array_equal(he.read(0, 240, 0, 320), element.values[order].transpose(1, 2, 0))
    assert he.channels == tuple(channels[k] for k in order)


def test_copies_are_told_by_place_and_pixels_and_not_by_name(visium_hd, image) -> None:
    sdata = visium_hd()
    assert select_image(sdata) == "sample_full_image"
    assert select_coordinate_system(sdata, image_key="sample_full_image") == "sample"
    for name, key in (("x", "sample_hires_image"), ("y_full_image", "sample_lowres_image"), ("z", "sample_full_image")):
        sdata[name] = sdata.images.pop(key)
    assert select_image(sdata) == "z"
    assert other_slides(sdata, image_key="x", coordinate_system="sample") == []
    a = image(transformations={"um": HALF})
    for seed in (1, 0):  # of one size, another sample or not even drawn alike
        b = image(480, 640, transformations={"um": Scale([0.25, 0.25], axes=("x", "y"))}, seed=seed)
        with pytest.raises(ElementError, match="'a_full_image'.*'b'"):
            select_image(slide(a_full_image=a, b=b))
        assert other_slides(slide(a=a, b=b), image_key="b", coordinate_system="um") == ["a"]


def test_system_without_scale_before_one_with_then_identity_then_name(image) -> None:
    moved = Translation([5.0, 5.0], axes=("x", "y"))
    systems = {"a_scaled": HALF, "b_moved": moved, "d": Identity(), "c": Identity()}
    for expected in ("c", "d", "b_moved", "a_scaled"):
        assert select_coordinate_system(slide(he=image(transformations=systems)), image_key="he") == expected
        del systems[expected]


def test_only_shared_systems_count(image, circles, table) -> None:
    he, cells = image(transformations={"pixels": Identity(), "um": HALF}), circles(SCATTERED, system="um")
    sdata = SpatialData(images={"he": he}, shapes={"cells": cells}, tables={"t": table("cells", range(60))})
    assert select_coordinate_system(sdata, image_key="he", element_key="cells") == "um"
    assert opened(sdata, region_keys=["cells"]).coordinate_system == "um"
    with pytest.raises(ElementError, match="'pixels'.*'cells' in 'um'"):
        select_coordinate_system(sdata, image_key="he", element_key="cells", coordinate_system="pixels")
    with pytest.raises(ElementError, match="'cells' is in 'um'.*coordinate_system='um'"):
        select_tables(sdata, coordinate_system="pixels", image_key="he")
    set_transformation(sdata["he"], {"sample": Identity()}, set_all=True)
    with pytest.raises(ElementError, match="'he' is in 'sample', element 'cells' in 'um'"):
        select_coordinate_system(sdata, image_key="he", element_key="cells")


TURNED = Affine([[0, -1, 320], [1, 0, 0], [0, 0, 1]], ("x", "y"), ("x", "y"))


@pytest.mark.parametrize("other", [TURNED, Translation([3, 0], ("x", "y")), Scale([1.01, 1.01], ("x", "y"))])
def test_two_systems_that_align_regions_differently(image, circles, other) -> None:
    """For every way in, and whatever is asked for by name is taken."""
    he = image(transformations={"sample": Identity(), "aligned": other})
    sdata = SpatialData(images={"he": he}, shapes={"cells": circles(SCATTERED)})
    set_transformation(sdata["cells"], Identity(), "aligned")
    for arguments in ({"element_key": "cells"}, {"region_keys": ["cells"]}):
        with pytest.raises(ElementError, match=r"'he'.*'cells'.*'sample'.*px.*'aligned'.*coordinate_system="):
            opened(sdata, **arguments)
        assert opened(sdata, coordinate_system="aligned", **arguments).coordinate_system == "aligned"
    set_transformation(sdata["cells"], other, "aligned")
    assert opened(sdata, element_key="cells").coordinate_system == "sample"


def test_bins_that_tell_the_size_are_aligned_in_one_way(visium_hd) -> None:
    sdata = visium_hd(bins=(8,))
    set_transformation(sdata["sample_full_image"], TURNED, "again")
    set_transformation(sdata["sample_square_008um"], Identity(), "again")
    with pytest.raises(ElementError, match="'sample_square_008um'.*coordinate_system="):
        open_slide(sdata)


FULL = {"image_key": "sample_full_image", "coordinate_system": "sample"}
HE = {"image_key": "he", "coordinate_system": "sample"}


def test_caller_then_record_then_bins(visium_hd, image) -> None:
    sdata = visium_hd()
    sdata.attrs["pixnet_sd"] = {"mpp": {"other": 0.2}}
    assert find_mpp(sdata, **FULL)[0] == pytest.approx(0.5)
    sdata.attrs["pixnet_sd"]["mpp"]["sample_full_image"] = 0.499
    assert find_mpp(sdata, **FULL)[0] == 0.499
    assert find_mpp(sdata, **FULL, mpp=0.503) == (0.503, "argument mpp=")  # a small disagreement is not warned about
    he = image(transformations={"sample": Scale([0.25, 0.25], axes=("x", "y"))})
    assert find_mpp(SpatialData(images={"he": he}), **HE, mpp="coordinate_system")[0] == pytest.approx(0.25)


@pytest.mark.parametrize("matrix", [None, similarity(3, -2.0), similarity(0.2, 0.4, flip=True)])
@pytest.mark.parametrize("drawn", [{}, {"circles": True}, {"labels": True}, {"dataset_id": ""}], ids=str)
def test_bins_under_any_similarity(visium_hd, matrix, drawn: dict[str, Any]) -> None:
    """By a table, by what is drawn, which may have holes, and by labels."""
    sdata = visium_hd(mpp=0.4, matrix=matrix, angle=0.3, keep=lambda row, col: (row * col) % 5 != 1, **drawn)
    system = drawn.get("dataset_id", "sample")
    bins = f"16 µm bins '{system}_square_016um'"
    by_table = sdata.tables, 1e-9, f"lattice pitch of the {bins}"
    by_shapes = sdata.shapes, 1e-6, f"neighbour distance of the {bins}"
    by_labels = sdata.labels, 1e-6, "16 µm label pixels of 'sample_square_016um_labels'"
    for elements, rel, rule in (by_shapes, by_labels) if "labels" in drawn else (by_table, by_shapes):
        found = find_mpp(sdata, image_key=f"{system}_full_image", coordinate_system=system)
        assert found == (pytest.approx(0.4, rel=rel), rule)
        copy = find_mpp(sdata, image_key=f"{system}_hires_image", coordinate_system=system)
        assert copy == (pytest.approx(1.6, rel=rel), rule)
        elements.clear()


def test_bins_elsewhere_and_stretched_bins_are_passed_over(visium_hd) -> None:
    sdata = visium_hd()
    for table in sdata.tables.values():
        table.uns["pixnet_sd"] = {}  # bins that pixnet annotated still tell their size
    assert "016um" in find_mpp(sdata, **FULL)[1]
    for place in ({"sample": Scale([1.0, 2.0], axes=("x", "y"))}, {"other": Identity()}):
        set_transformation(sdata.shapes["sample_square_016um"], place, set_all=True)
        by_others = "lattice pitch of the 8 µm bins 'sample_square_008um'"
        assert find_mpp(sdata, **FULL) == (pytest.approx(0.5, rel=1e-9), by_others)


@pytest.mark.parametrize("diameter_um", [55.0, 65.0, 50.0, 80.0])
def test_visium_spots(visium, diameter_um: float) -> None:
    sdata = visium(mpp=0.7, diameter_um=diameter_um)
    is_visium = diameter_um in (55.0, 65.0)  # else spots of another assay
    with nullcontext() if is_visium else pytest.raises(ResolutionError, match="unknown.*'spots'"):
        value, rule = find_mpp(sdata, image_key="tissue_full_image", coordinate_system="global")
        assert (value, rule) == (pytest.approx(0.7, rel=1e-6), "100 µm pitch of Visium spots 'spots'")


GRID = np.stack(np.meshgrid(np.arange(6), np.arange(6)), axis=-1).reshape(-1, 2)
HEX = np.stack([GRID[:, 0] + 0.5 * (GRID[:, 1] % 2), GRID[:, 1] * np.sqrt(3) / 2], axis=1)
LABELS = np.arange(1, 26).reshape(5, 5)
NO_BINS = {
    "roi_100um": make_circles([[40, 80], [90, 80], [160, 80]], 80.0),
    "cells_050um": make_circles(SCATTERED, 9.0),
    "hex_100um": make_circles(HEX * 20 + 20, 10.0),
    "cores_096um": make_circles(GRID * 30 + 20, 9.0),  # a square lattice with gaps
    "over_080um": make_circles(GRID * 30 + 20, 20.0),  # and one that overlaps
    "row_064um": make_circles([[16 * k + 20, 50] for k in range(12)], 8.0),
    "uneven_048um": make_circles(GRID * 30 + 20, np.where(np.arange(36) % 3, 15.0, 5.0)),
    "x_000um": make_circles(GRID * 30 + 20, 15.0),  # no size of a bin
    "spots": make_circles(GRID * 40 + 20, 11.0),  # a square lattice is not Visium
    "cells_100um_labels": make_labels(np.kron(LABELS, np.ones((8, 8), int))),
    "seeds_090um_labels": make_labels(np.kron(LABELS, np.pad([[1]], ((2, 6), (2, 6))))),
}


@pytest.mark.parametrize(("key", "element"), NO_BINS.items(), ids=NO_BINS)
def test_names_of_bins_decide_nothing(visium_hd, image, table, key: str, element) -> None:
    """Whatever is named so and is no lattice of touching squares."""
    sdata = visium_hd(mpp=0.4)
    expected = find_mpp(sdata, **FULL)
    sdata[key] = element
    assert find_mpp(sdata, **FULL) == expected
    sdata["t"] = table(key, [1, 2])
    assert select_tables(sdata) == ["square_008um", "square_016um"]
    with pytest.raises(ResolutionError, match="'he' are unknown"):
        find_mpp(SpatialData.init_from_elements({"he": image(), key: element}), **HE)


def test_lattices_that_disagree(visium_hd) -> None:
    """Each is named with what it tells; regions that are meant are asked before others, and a number ends it."""
    sdata = visium_hd(mpp=0.5)
    sdata["b_square_008um"] = visium_hd(mpp=0.25, bins=(8,))["sample_square_008um"]
    with pytest.raises(ResolutionError, match=r"0\.5 µm.*'sample_square_016um'.*0\.25 µm.*'b_square_008um'.*mpp="):
        find_mpp(sdata, **FULL)
    assert find_mpp(sdata, **FULL, region_keys=["b_square_008um"])[0] == pytest.approx(0.25)
    assert find_mpp(sdata, **FULL, mpp=0.5)[0] == 0.5
    set_transformation(sdata["b_square_008um"], {"sample": Translation([5000, 0], axes=("x", "y"))}, set_all=True)
    assert find_mpp(sdata, **FULL)[0] == pytest.approx(0.5)  # what lies beside the image is not asked


@pytest.mark.parametrize("recorded", [0.25, 0.51])
def test_record_that_the_lattice_contradicts(visium_hd, recorded: float) -> None:
    sdata = visium_hd()
    sdata.attrs["pixnet_sd"] = {"mpp": {"sample_full_image": recorded}}
    with pytest.raises(ResolutionError, match=rf"{recorded} µm/px.*'sample_square_016um'.*0\.5 µm/px.*mpp="):
        find_mpp(sdata, **FULL)
    with pytest.warns(UserWarning, match=rf"{recorded} µm/px.*0\.5 µm/px.*sample_square_016um"):
        assert find_mpp(sdata, **FULL, mpp=recorded)[0] == recorded


def test_bins_of_a_slide_tell_nothing_of_another_in_the_same_system(visium_hd, image) -> None:
    sdata = visium_hd()
    sdata["other"] = image(500, 600, seed=1)
    for key in ("other", "sample_full_image"):
        where = {"image_key": key, "coordinate_system": "sample"}
        with pytest.raises(ResolutionError, match=f"'{key}'.*mpp="):
            find_mpp(sdata, **where)
        with pytest.raises(ElementError, match=f"'{key}'.*'square_008um'.*table_key="):
            select_tables(sdata, **where)
        assert find_mpp(sdata, **where, region_keys=["sample_square_008um"])[0] == pytest.approx(0.5)


def test_absurd_value_of_the_caller(image, visium_hd) -> None:
    he, bins = SpatialData(images={"he": image()}), visium_hd()
    for end in (0.1, 2.0):  # of the range
        assert find_mpp(he, **HE, mpp=end)[0] == end
    for mpp in (2.5, 0.0005):
        assert find_mpp(he, **HE, mpp=mpp, allow_any_mpp=True)[0] == mpp
        with pytest.raises(ResolutionError, match=f"mpp = {mpp}"):
            find_mpp(he, **HE, mpp=mpp)
    for mpp in (0.0, -0.5, np.nan, np.inf):  # and no disagreement with bins is told
        with pytest.raises(ResolutionError, match=f"mpp = {mpp}"):
            find_mpp(bins, **FULL, mpp=mpp, allow_any_mpp=True)
