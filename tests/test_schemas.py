"""What may stand in the notes of an object."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixnet_sd._schemas import check_notes
from pixnet_sd.errors import PixNetError, StoreError


def test_notes_that_are_taken() -> None:
    notes = {"model": "/some/folder", "mpp": {"image": 0.5, "other": 1, "third": np.float64(0.25)}}
    notes |= {"maps": {"pixnet_map": {"genes": ["A"], "mpp": 0.5}}, "tables": {"t": {}}}
    for each in ({}, notes, {"of a later version": object(), "lab": None}):
        assert check_notes(each) == each


@pytest.mark.parametrize(
    ("notes", "where"),
    [
        ([], "list"),
        ({"model": 5}, "model"),
        ({"mpp": 0.5}, "mpp"),
        *(({"mpp": {"image": mpp}}, "mpp.image") for mpp in (0, -0.5, "0.5", True, None, float("nan"))),
        ({"maps": ["pixnet_map"]}, "maps"),
        ({"maps": {"pixnet_map": "path"}}, "maps.pixnet_map"),
        ({"tables": {"t": [10**5000]}}, "tables.t"),
    ],
)
def test_notes_that_are_refused(notes, where: str) -> None:
    with pytest.raises(StoreError, match=rf"sdata.attrs\['pixnet_sd'\].*{where}"):
        check_notes(notes)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["model", "mpp", "maps"]) | st.text(max_size=3), inner, max_size=4)
        ),
    )
)
def test_any_notes(notes) -> None:
    try:
        taken = check_notes(notes)
    except PixNetError:
        return
    assert taken == (notes or {}) or notes is None
