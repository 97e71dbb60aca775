from __future__ import annotations

import numpy as np
import spatialdata as sd
from spatialdata.transformations import get_transformation

from pixnet_sd.store import circles_element, squares_element
from pixnet_sd.store.gene_map import image_transforms

CENTRES = np.array([[10.0, 20.0], [30.5, 40.25]])


def test_circles(slide):
    transforms = image_transforms(slide, "_full_image")
    circles = circles_element(CENTRES, 8.0, transforms, index=["a", "b"])
    assert circles.index.tolist() == ["a", "b"]
    assert circles["radius"].tolist() == [8.0, 8.0]
    np.testing.assert_array_equal(np.c_[circles.geometry.x, circles.geometry.y], CENTRES)
    assert get_transformation(circles, get_all=True) == transforms


def test_squares(slide):
    squares = squares_element(CENTRES, 6.0, image_transforms(slide, "_full_image"))
    assert squares.index.tolist() == [0, 1]
    np.testing.assert_allclose(squares.geometry.bounds, np.c_[CENTRES - 3, CENTRES + 3])
    np.testing.assert_allclose(squares.geometry.area, 36)


def test_they_lie_on_the_image_in_every_system(slide):
    circles = circles_element(CENTRES, 8.0, image_transforms(slide, "_full_image"))
    for system, transform in get_transformation(slide.images["_full_image"], get_all=True).items():
        matrix = transform.to_affine_matrix(("x", "y"), ("x", "y"))
        moved = sd.transform(circles, to_coordinate_system=system)
        expected = np.c_[CENTRES, [1, 1]] @ matrix.T
        np.testing.assert_allclose(np.c_[moved.geometry.x, moved.geometry.y], expected[:, :2])
