from __future__ import annotations

import numpy as np
import pytest

from pixnet_sd.errors import ResolutionError
from pixnet_sd.slide.elements import check_regions_on_image

IMAGE = {"width": 400, "height": 100, "what": "Shapes 'cells'"}


def boxes(xy: list[tuple[float, float]], half: float = 2.0) -> np.ndarray:
    centres = np.array(xy, dtype=float)
    return np.concatenate([centres - half, centres + half], axis=1)


@pytest.mark.filterwarnings("error")
def test_inside_and_across_the_edge() -> None:
    assert check_regions_on_image(boxes([(10, 10), (399, 99), (-1, 50), (401, 50)]), **IMAGE).all()


def test_some_outside_are_told_and_marked() -> None:
    with pytest.warns(UserWarning, match="Shapes 'cells': 1 of 3 regions lie wholly outside"):
        touches = check_regions_on_image(boxes([(10, 10), (500, 50), (300, 50)]), **IMAGE)
    np.testing.assert_array_equal(touches, [True, False, True])


def test_swapped_axes() -> None:
    xy = [(y, x) for x in range(110, 400, 20) for y in range(5, 100, 20)]
    with pytest.raises(
        ResolutionError, match=r"100% of \d+ regions lie outside.*100% would lie inside.*swapped.*x 3 to"
    ):
        check_regions_on_image(boxes(xy), **IMAGE)


@pytest.mark.filterwarnings("error")
def test_few_outside_are_not_taken_for_swapped() -> None:
    assert check_regions_on_image(boxes([(10, 90), (50, 50), (60, 101)]), **IMAGE).all()


def test_no_contact_says_both_extents() -> None:
    with pytest.raises(
        ResolutionError, match=r"none of 2.*x 998 to 2002 and y 8 to 12, the image x 0 to 400 and y 0 to 100"
    ):
        check_regions_on_image(boxes([(1000, 10), (2000, 10)]), **IMAGE)
