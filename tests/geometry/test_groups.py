"""Groups of neighbours: whole, near each other, and of about the size asked for."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pixnet_sd.geometry import neighbour_groups


@given(st.data(), st.integers(0, 60), st.floats(0.1, 50))
def test_groups_have_about_what_is_asked_for(data: st.DataObject, n: int, least: float) -> None:
    """Within an amount at either end of the piece."""
    points = data.draw(arrays.arrays(float, (n, 2), elements=st.floats(-1e4, 1e4)))
    amount = data.draw(arrays.arrays(float, n, elements=st.floats(0, 20)))
    group = neighbour_groups(points, amount, least)
    assert sorted(set(group.tolist())) == list(range(group.max(initial=-1) + 1))
    sums = np.bincount(group, amount)
    assert (sums <= least + amount.max(initial=0) + 1e-6).all()
    alone = amount >= least
    if alone.all():
        assert len(set(group.tolist())) == n


def test_on_a_lattice_they_are_squares() -> None:
    x, y = np.meshgrid(np.arange(32), np.arange(32))
    points, order = np.stack([x.ravel(), y.ravel()], axis=1), np.random.default_rng(0).permutation(1024)
    group = neighbour_groups(points[order] * 7.3, np.ones(1024), 16)
    blocks = (points[order] // 4) @ [1, 8]
    assert len(set(zip(group.tolist(), blocks.tolist(), strict=True))) == len(set(group.tolist())) == 64
