"""What may stand in the notes of an object."""

from __future__ import annotations

from contextlib import suppress

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


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KEYS = st.sampled_from(["model", "mpp", "maps"]) | st.text(max_size=3)
NOTES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))


@given(NOTES)
def test_any_notes(notes) -> None:
    """They are taken as they are, or refused in words."""
    with suppress(PixNetError):
        assert check_notes(notes) == (notes or {})
