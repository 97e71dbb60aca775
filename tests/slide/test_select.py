from __future__ import annotations

import pytest
from spatialdata import SpatialData
from spatialdata.transformations import Identity, Scale, Translation, set_transformation

from pixnet_sd._errors import ElementError
from pixnet_sd.slide._select import select_coordinate_system, select_image


@pytest.mark.parametrize("dataset_id", ["sample", ""])
def test_full_image_of_a_reader(visium_hd, dataset_id: str, caplog) -> None:
    caplog.set_level("INFO", "pixnet_sd")
    assert select_image(visium_hd(dataset_id=dataset_id)) == f"{dataset_id}_full_image"
    assert f"{dataset_id}_hires_image" in caplog.text


def test_only_image(image) -> None:
    assert select_image(SpatialData(images={"he": image()})) == "he"


def test_named_image(visium_hd) -> None:
    assert select_image(visium_hd(), image_key="sample_hires_image") == "sample_hires_image"


def test_no_image() -> None:
    with pytest.raises(ElementError, match="no slide image"):
        select_image(SpatialData())


def test_only_a_map_of_ours(image) -> None:
    sdata = SpatialData(images={"pixnet_map": image()}, attrs={"pixnet_sd": {"maps": {"pixnet_map": {}}}})
    with pytest.raises(ElementError, match="Only images written by pixnet_sd"):
        select_image(sdata)


def test_map_of_ours_is_no_candidate(image) -> None:
    images = {"he": image(), "pixnet_map": image()}
    assert select_image(SpatialData(images=images, attrs={"pixnet_sd": {"maps": {"pixnet_map": {}}}})) == "he"


@pytest.mark.parametrize("channels", [tuple("ABCDEF"), ("DAPI",), ("DAPI", "CD45", "18S", "aSMA")])
def test_fluorescence_and_gene_maps_are_no_candidates(image, channels) -> None:
    assert select_image(SpatialData(images={"he": image(), "other": image(channels=channels)})) == "he"


def test_channels_may_have_no_names_or_rgba(image) -> None:
    sdata = SpatialData(images={"he": image(channels=("0", "1", "2", "3")), "dapi": image(channels=("DAPI",))})
    assert select_image(sdata) == "he"


def test_the_only_image_is_taken_whatever_it_is(image) -> None:
    assert select_image(SpatialData(images={"grey": image(channels=("0",))})) == "grey"


def test_several_images_are_listed(image) -> None:
    sdata = SpatialData(images={"a": image(10, 20), "b": image()})
    with pytest.raises(ElementError, match=r"'a' \(3 c x 10 y x 20 x; coordinate systems: 'sample'\); 'b'.*image_key="):
        select_image(sdata)


def test_two_full_images_are_ambiguous(image) -> None:
    with pytest.raises(ElementError, match="Several images"):
        select_image(SpatialData(images={"a_full_image": image(), "b_full_image": image()}))


def test_full_image_beside_an_unrelated_one_is_ambiguous(image) -> None:
    images = {"a_full_image": image(), "b": image(transformations={"elsewhere": Identity()})}
    with pytest.raises(ElementError, match="Several images"):
        select_image(SpatialData(images=images))
    assert select_image(SpatialData(images=images), coordinate_system="elsewhere") == "b"


def test_no_image_in_the_coordinate_system(image) -> None:
    with pytest.raises(ElementError, match=r"'elsewhere'.*'he'"):
        select_image(SpatialData(images={"he": image()}), coordinate_system="elsewhere")


def test_named_image_is_missing_or_elsewhere_or_no_image(visium_hd) -> None:
    sdata = visium_hd()
    with pytest.raises(ElementError, match=r"no image 'he'.*sample_full_image"):
        select_image(sdata, image_key="he")
    with pytest.raises(ElementError, match="another kind of element"):
        select_image(sdata, image_key="sample_square_008um")
    with pytest.raises(ElementError, match="not in coordinate system 'x'"):
        select_image(sdata, image_key="sample_full_image", coordinate_system="x")


@pytest.mark.parametrize("dataset_id", ["sample", ""])
def test_system_of_pixels_is_preferred(visium_hd, dataset_id: str) -> None:
    sdata = visium_hd(dataset_id=dataset_id)
    key = f"{dataset_id}_full_image"
    assert select_coordinate_system(sdata, image_key=key) == dataset_id
    bins = f"{dataset_id}_square_008um"
    assert select_coordinate_system(sdata, image_key=key, element_key=bins) == dataset_id


def test_system_without_scale_before_one_with_then_identity_then_name(image) -> None:
    systems = {
        "a_scaled": Scale([0.5, 0.5], axes=("x", "y")),
        "b_moved": Translation([5.0, 5.0], axes=("x", "y")),
        "d": Identity(),
        "c": Identity(),
    }
    sdata = SpatialData(images={"he": image(transformations=systems)})
    order = []
    while systems:
        order.append(select_coordinate_system(sdata, image_key="he"))
        del systems[order[-1]]
        if systems:
            set_transformation(sdata.images["he"], dict(systems), set_all=True)
    assert order == ["c", "d", "b_moved", "a_scaled"]


def test_only_shared_systems_count(image, circles) -> None:
    he = image(transformations={"pixels": Identity(), "um": Scale([0.5, 0.5], axes=("x", "y"))})
    sdata = SpatialData(images={"he": he}, shapes={"cells": circles([[1, 2]], system="um")})
    assert select_coordinate_system(sdata, image_key="he", element_key="cells") == "um"
    with pytest.raises(ElementError, match=r"'pixels' is not shared.*'cells' in 'um'"):
        select_coordinate_system(sdata, image_key="he", element_key="cells", coordinate_system="pixels")


def test_no_shared_system_lists_both(image, circles) -> None:
    sdata = SpatialData(images={"he": image()}, shapes={"cells": circles([[1, 2]], system="um")})
    with pytest.raises(ElementError, match=r"'he' is in 'sample', element 'cells' in 'um'"):
        select_coordinate_system(sdata, image_key="he", element_key="cells")


def test_no_such_element(image) -> None:
    with pytest.raises(ElementError, match="no shapes or labels element 'cells'"):
        select_coordinate_system(SpatialData(images={"he": image()}), image_key="he", element_key="cells")
