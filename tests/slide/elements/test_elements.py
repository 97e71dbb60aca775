"""Maps between elements and coordinate systems."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spatialdata.transformations import Affine, Scale, Sequence, Translation

from pixnet_sd.errors import ElementError, ResolutionError
from pixnet_sd.slide.elements import affine_matrix, similarity_scale


def similarity(scale: float, angle: float, flip: bool, shift: tuple[float, float]) -> np.ndarray:
    cos, sin, sign = scale * np.cos(angle), scale * np.sin(angle), -1.0 if flip else 1.0
    return np.array([[cos, -sin * sign, shift[0]], [sin, cos * sign, shift[1]], [0, 0, 1]])


far = st.floats(-1e5, 1e5)
similarities = st.builds(similarity, st.floats(1e-3, 1e3), st.floats(-np.pi, np.pi), st.booleans(), st.tuples(far, far))


@given(similarities, similarities)
def test_scales_of_similarities_multiply_and_invert(first: np.ndarray, second: np.ndarray) -> None:
    scale = similarity_scale(first, "x")
    assert scale == pytest.approx(np.hypot(first[0, 0], first[1, 0]), rel=1e-9)
    assert similarity_scale(first @ second, "x") == pytest.approx(scale * similarity_scale(second, "x"), rel=1e-6)
    assert similarity_scale(np.linalg.inv(first), "x") == pytest.approx(1 / scale, rel=1e-6)


def test_other_maps_are_refused() -> None:
    assert similarity_scale(np.diag([1.0, 1.0009, 1.0]), "x") == pytest.approx(np.sqrt(1.0009))
    sheared = np.array([[1, 0.2, 0], [0, 1, 0], [0, 0, 1.0]])
    for matrix in (np.diag([1.0, 1.01, 1.0]), sheared, np.diag([1.0, 0.0, 1.0]), np.diag([np.nan, 1.0, 1.0])):
        with pytest.raises(ResolutionError, match="image 'he'"):
            similarity_scale(matrix, "image 'he'")


def test_matrix_of_a_sequence(image) -> None:
    turn = Affine(similarity(2.0, np.pi / 2, False, (3, 4)), input_axes=("x", "y"), output_axes=("x", "y"))
    element = image(transformations={"": Sequence([Scale([2.0], axes=("x",)), turn, Translation([1.0], axes=("y",))])})
    # (1, 0) -> (2, 0) -> 2 * (0, 2) + (3, 4) -> + (0, 1)
    np.testing.assert_allclose(affine_matrix(element, "") @ [1, 0, 1], [3, 9, 1], atol=1e-12)
    element = image(scale_factors=(2, 2), transformations={"a": Scale([3.0, 3.0], axes=("x", "y"))})
    np.testing.assert_allclose(affine_matrix(element, "a"), np.diag([3, 3, 1.0]))  # of scale 0
    with pytest.raises(ElementError, match="'nowhere'.*'a'"):
        affine_matrix(element, "nowhere")
