from __future__ import annotations

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.transformations import Identity, Scale

from pixnet_sd.errors import ElementError, ResolutionError
from pixnet_sd.slide import find_mpp, open_slide

FULL = {"image_key": "sample_full_image", "coordinate_system": "sample"}
HE = {"image_key": "he", "coordinate_system": "sample"}


def turned(scale: float, angle: float, flip: bool = False) -> np.ndarray:
    cos, sin, sign = scale * np.cos(angle), scale * np.sin(angle), -1 if flip else 1
    return np.array([[cos, -sin * sign, 30.0], [sin, cos * sign, -20.0], [0, 0, 1]])


def test_caller_first(visium_hd) -> None:
    sdata = visium_hd()
    sdata.attrs["pixnet_sd"] = {"mpp": {"sample_full_image": 0.3}}
    assert find_mpp(sdata, **FULL, mpp=0.51) == (0.51, "argument mpp=")


def test_record_before_bins(visium_hd) -> None:
    sdata = visium_hd()
    sdata.attrs["pixnet_sd"] = {"mpp": {"other": 0.2}}
    assert find_mpp(sdata, **FULL)[0] == pytest.approx(0.5)
    sdata.attrs["pixnet_sd"]["mpp"]["sample_full_image"] = 0.499
    value, rule = find_mpp(sdata, **FULL)
    assert value == 0.499
    assert "recorded" in rule


def test_coordinate_system_in_um(image) -> None:
    he = image(transformations={"sample": Scale([0.25, 0.25], axes=("x", "y"))})
    value, rule = find_mpp(SpatialData(images={"he": he}), **HE, mpp="coordinate_system")
    assert value == pytest.approx(0.25)
    assert "'sample'" in rule


@pytest.mark.parametrize("matrix", [None, turned(1, 1.0), turned(3, -2.0), turned(0.2, 0.4, flip=True)])
@pytest.mark.parametrize("labels", [False, True])
def test_bins_under_any_similarity(visium_hd, matrix, labels: bool) -> None:
    value, rule = find_mpp(visium_hd(mpp=0.4, matrix=matrix, labels=labels), **FULL)
    assert value == pytest.approx(0.4, rel=1e-6)
    assert "16 µm" in rule


def test_empty_dataset_id(visium_hd) -> None:
    sdata = visium_hd(dataset_id="")
    assert find_mpp(sdata, image_key="_full_image", coordinate_system="")[0] == pytest.approx(0.5)


def test_image_and_bins_with_different_transforms(visium_hd) -> None:
    value, _ = find_mpp(visium_hd(), image_key="sample_hires_image", coordinate_system="sample")
    assert value == pytest.approx(0.5 / 0.25)


def test_visium(visium) -> None:
    value, rule = find_mpp(visium(mpp=0.7), image_key="tissue_full_image", coordinate_system="global")
    assert value == pytest.approx(0.7, rel=1e-6)
    assert "Visium" in rule


def test_unknown(image, circles) -> None:
    sdata = SpatialData(images={"he": image()}, shapes={"cells": circles([[1, 2]])})
    with pytest.raises(ResolutionError, match=r"'he' are unknown.*'cells'.*Give mpp="):
        find_mpp(sdata, **HE)


def test_downscaled_copy_is_named_as_the_cause(visium_hd) -> None:
    with pytest.raises(ResolutionError, match=r"5 µm per pixel.*lowres.*image_key="):
        find_mpp(visium_hd(), image_key="sample_lowres_image", coordinate_system="sample")


@pytest.mark.parametrize(("mpp", "cause"), [(2.5, "downscaled copy"), (0.0005, "mm")])
def test_absurd_value_of_the_caller(image, mpp: float, cause: str) -> None:
    sdata = SpatialData(images={"he": image()})
    with pytest.raises(ResolutionError, match=cause):
        find_mpp(sdata, **HE, mpp=mpp)
    assert find_mpp(sdata, **HE, mpp=mpp, allow_any_mpp=True)[0] == mpp


@pytest.mark.parametrize("mpp", [0.1, 2.0])
def test_ends_of_the_range_are_inside(image, mpp: float) -> None:
    assert find_mpp(SpatialData(images={"he": image()}), **HE, mpp=mpp)[0] == mpp


@pytest.mark.parametrize("mpp", [0.0, -0.5])
def test_no_number_of_micrometres_beside_bins(visium_hd, recwarn, mpp: float) -> None:
    with pytest.raises(ResolutionError, match="not a positive number"):
        open_slide(visium_hd(), mpp=mpp)
    assert not [w for w in recwarn if "disagrees" in str(w.message)]


@pytest.mark.parametrize("mpp", [0.0, -0.5, np.nan, np.inf])
def test_no_number_of_micrometres(image, mpp: float) -> None:
    with pytest.raises(ResolutionError, match="not a positive number"):
        find_mpp(SpatialData(images={"he": image()}), **HE, mpp=mpp, allow_any_mpp=True)


def test_unknown_word(image) -> None:
    with pytest.raises(ResolutionError, match="'auto'"):
        find_mpp(SpatialData(images={"he": image()}), **HE, mpp="auto")


def test_disagreement_with_bins_is_warned_about(visium_hd) -> None:
    with pytest.warns(UserWarning, match=r"0\.25 µm/px.*disagrees with 0\.5 µm/px.*16 µm bins"):
        assert find_mpp(visium_hd(), **FULL, mpp=0.25)[0] == 0.25


@pytest.mark.filterwarnings("error::UserWarning")
def test_small_disagreement_is_not(visium_hd) -> None:
    assert find_mpp(visium_hd(), **FULL, mpp=0.503)[0] == 0.503


def test_stretched_image(image) -> None:
    he = image(transformations={"sample": Scale([1.0, 1.1], axes=("x", "y")), "other": Identity()})
    sdata = SpatialData(images={"he": he})
    with pytest.raises(ResolutionError, match=r"image 'he'.*singular values"):
        find_mpp(sdata, **HE, mpp=0.5)
    with pytest.raises(ElementError, match="nowhere"):
        find_mpp(sdata, image_key="he", coordinate_system="nowhere", mpp=0.5)
