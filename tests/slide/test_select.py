"""Which image is the slide, and in which coordinate system regions meet it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Image3DModel
from spatialdata.transformations import Affine, Identity, Scale, Translation, set_transformation

from pixnet_sd.errors import DataError, ElementError
from pixnet_sd.slide import Slide, open_slide, other_slides, select_coordinate_system, select_image
from pixnet_sd.slide.tables import select_tables

GRID = [[20 * x, 20 * y] for x in (1, 4, 9) for y in (1, 4, 9)]
ODD = ("first", "second", "third")
STAINS = [("DAPI", "CD45", "PanCK"), ("GFP", "RFP", "BFP"), ("red", "green", "DAPI")]
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
    he, cells = image(transformations={"pixels": Identity(), "um": HALF}), circles(GRID, system="um")
    sdata = SpatialData(images={"he": he}, shapes={"cells": cells}, tables={"t": table("cells", range(9))})
    assert select_coordinate_system(sdata, image_key="he", element_key="cells") == "um"
    assert opened(sdata, region_keys=["cells"]).coordinate_system == "um"
    with pytest.raises(ElementError, match="'pixels'.*'cells' in 'um'"):
        select_coordinate_system(sdata, image_key="he", element_key="cells", coordinate_system="pixels")
    with pytest.raises(ElementError, match="'cells' is in 'um'.*coordinate_system='um'"):
        select_tables(sdata, coordinate_system="pixels", image_key="he")
    with pytest.raises(ElementError, match="'nuclei'"):
        select_coordinate_system(sdata, image_key="he", element_key="nuclei")
    set_transformation(sdata["he"], {"sample": Identity()}, set_all=True)
    with pytest.raises(ElementError, match="'he' is in 'sample', element 'cells' in 'um'"):
        select_coordinate_system(sdata, image_key="he", element_key="cells")


TURNED = Affine([[0, -1, 320], [1, 0, 0], [0, 0, 1]], ("x", "y"), ("x", "y"))


@pytest.mark.parametrize("other", [TURNED, Translation([3, 0], ("x", "y")), Scale([1.01, 1.01], ("x", "y"))])
def test_two_systems_that_align_regions_differently(image, circles, other) -> None:
    """For every way in, and whatever is asked for by name is taken."""
    he = image(transformations={"sample": Identity(), "aligned": other})
    sdata = SpatialData(images={"he": he}, shapes={"cells": circles(GRID)})
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
