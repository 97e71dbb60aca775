from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation

from pixnet_sd.errors import ElementError, ResolutionError
from pixnet_sd.slide.elements import affine_matrix, similarity_scale

XY = {"input_axes": ("x", "y"), "output_axes": ("x", "y")}


def similarity(scale: float, angle: float, flip: bool, shift: tuple[float, float]) -> np.ndarray:
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    sign = -1.0 if flip else 1.0
    return np.array([[cos, -sin * sign, shift[0]], [sin, cos * sign, shift[1]], [0, 0, 1]])


similarities = st.builds(
    similarity,
    st.floats(1e-3, 1e3),
    st.floats(-np.pi, np.pi),
    st.booleans(),
    st.tuples(st.floats(-1e5, 1e5), st.floats(-1e5, 1e5)),
)


@given(similarities)
def test_scale_of_any_similarity(matrix: np.ndarray) -> None:
    assert similarity_scale(matrix, "x") == pytest.approx(np.hypot(matrix[0, 0], matrix[1, 0]), rel=1e-9)


@given(similarities, similarities)
def test_scales_multiply_and_invert(first: np.ndarray, second: np.ndarray) -> None:
    product = similarity_scale(first, "x") * similarity_scale(second, "x")
    assert similarity_scale(first @ second, "x") == pytest.approx(product, rel=1e-6)
    assert similarity_scale(np.linalg.inv(first), "x") == pytest.approx(1 / similarity_scale(first, "x"), rel=1e-6)


def test_anisotropy_up_to_a_thousandth_is_accepted() -> None:
    assert similarity_scale(np.diag([1.0, 1.0009, 1.0]), "x") == pytest.approx(np.sqrt(1.0009))


@pytest.mark.parametrize(
    "matrix", [np.diag([1.0, 1.01, 1.0]), np.array([[1, 0.2, 0], [0, 1, 0], [0, 0, 1.0]]), np.diag([1.0, 0.0, 1.0])]
)
def test_other_maps_are_refused_with_their_singular_values(matrix: np.ndarray) -> None:
    with pytest.raises(ResolutionError, match=r"image 'he'.*singular values"):
        similarity_scale(matrix, "image 'he'")


def test_nan_is_refused() -> None:
    with pytest.raises(ResolutionError, match="not finite"):
        similarity_scale(np.diag([np.nan, 1.0, 1.0]), "x")


def test_matrix_of_a_sequence(image) -> None:
    turn = Affine(similarity(2.0, np.pi / 2, False, (3, 4)), **XY)
    element = image(transformations={"": Sequence([Scale([2.0], axes=("x",)), turn, Translation([1.0], axes=("y",))])})
    # (1, 0) -> (2, 0) -> 2 * (0, 2) + (3, 4) -> + (0, 1)
    np.testing.assert_allclose(affine_matrix(element, "") @ [1, 0, 1], [3, 9, 1], atol=1e-12)


def test_multiscale_image_uses_scale_0(image) -> None:
    placed = {"a": Scale([3.0, 3.0], axes=("x", "y")), "b": Identity()}
    element = image(scale_factors=(2, 2), transformations=placed)
    np.testing.assert_allclose(affine_matrix(element, "a"), np.diag([3, 3, 1.0]))


def test_unknown_system_lists_those_there(image) -> None:
    with pytest.raises(ElementError, match=r"'nowhere'.*has '', 'b'"):
        affine_matrix(image(transformations={"b": Identity(), "": Identity()}), "nowhere")
