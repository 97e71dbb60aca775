"""Warnings point at the user's line, however deep inside they arise."""

from __future__ import annotations

import pytest
from tests.slide.conftest import make_visium_hd

import pixnet_sd as ps


def test_of_the_first_caller_outside_the_package() -> None:
    sdata = make_visium_hd()
    with pytest.warns(UserWarning, match="disagrees with 0.5 µm/px") as found:
        ps.pl.training_regions(sdata, mpp=0.6, working_mpp=1.0, tile_px=64, validation=None, show=False)
    assert [w.filename for w in found if "disagrees" in str(w.message)] == [__file__]
