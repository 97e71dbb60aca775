from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pixnet_sd.slide.image import make_taps, resample


def out_size(size: int, scale: float) -> int:
    return int(np.ceil(size / scale - 1e-6))


def whole(source: np.ndarray, scale: float) -> np.ndarray:
    rows, cols = (make_taps(0, out_size(size, scale), scale, size) for size in source.shape[:2])
    return resample(source[rows.start : rows.stop, cols.start : cols.stop], rows, cols)


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


@settings(deadline=None, max_examples=25)
@given(height=sizes, width=sizes, scale=scales)
def test_follows_the_definition(height: int, width: int, scale: float) -> None:
    source = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert np.abs(whole(source, scale) - reference(source, scale)).max() < 0.8  # 0.5 is the rounding to uint8
