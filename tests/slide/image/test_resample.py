from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.slide.image import make_taps, resample


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def out_size(size: int, scale: float) -> int:
    return int(np.ceil(size / scale - 1e-6))


def box(source: np.ndarray, scale: float, row0: int, row1: int, col0: int, col1: int) -> np.ndarray:
    rows = make_taps(row0, row1, scale, source.shape[0])
    cols = make_taps(col0, col1, scale, source.shape[1])
    return resample(source[rows.start : rows.stop, cols.start : cols.stop], rows, cols)


def whole(source: np.ndarray, scale: float) -> np.ndarray:
    height, width = (out_size(size, scale) for size in source.shape[:2])
    return box(source, scale, 0, height, 0, width)


def reference(source: np.ndarray, scale: float) -> np.ndarray:
    """The definition in float64: a triangle around each centre, over every pixel of the axis."""

    def matrix(size: int) -> np.ndarray:
        centre = np.minimum((np.arange(out_size(size, scale)) + 0.5) * scale, size)
        weights = np.maximum(0, 1 - np.abs(np.arange(size) + 0.5 - centre[:, None]) / max(1, scale))
        return weights / weights.sum(axis=1, keepdims=True)

    return np.einsum("ij,jkc,lk->ilc", matrix(source.shape[0]), source, matrix(source.shape[1]))


# Scales within 1/20 px of 1 over the whole axis are taken as 1, on purpose: not close to what the definition gives.
scales = st.one_of(
    st.floats(0.3, 9.0).filter(lambda scale: abs(scale - 1) > 0.05), st.sampled_from([0.5, 1.0, 1.0 + 1e-9, 2.0, 8.0])
)
sizes = st.integers(1, 70)


@settings(deadline=None, max_examples=40)
@given(height=sizes, width=sizes, scale=scales, data=st.data())
def test_any_tiling_gives_the_same_pixels(height: int, width: int, scale: float, data: st.DataObject) -> None:
    source = picture(height, width)
    full = whole(source, scale)
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=4), label="cuts")}) for n in full.shape[:2]]
    for row0, row1 in zip(cuts[0], cuts[0][1:], strict=False):
        for col0, col1 in zip(cuts[1], cuts[1][1:], strict=False):
            np.testing.assert_array_equal(box(source, scale, row0, row1, col0, col1), full[row0:row1, col0:col1])


@settings(deadline=None, max_examples=25)
@given(height=sizes, width=sizes, scale=scales)
def test_follows_the_definition(height: int, width: int, scale: float) -> None:
    source = picture(height, width)
    assert np.abs(whole(source, scale) - reference(source, scale)).max() < 0.8  # 0.5 is the rounding to uint8


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 4000), scale=st.floats(0.2, 64.0), data=st.data())
def test_taps_are_whole_and_inside_the_source(size: int, scale: float, data: st.DataObject) -> None:
    n = out_size(size, scale)
    dst0 = data.draw(st.integers(0, n - 1))
    taps = make_taps(dst0, data.draw(st.integers(dst0 + 1, min(n, dst0 + 50))), scale, size)
    assert 0 <= taps.start < taps.stop <= size
    assert (taps.weights.sum(axis=1) == 4096).all()
    assert (taps.weights >= 0).all()
    assert (taps.weights == np.rint(taps.weights)).all()
