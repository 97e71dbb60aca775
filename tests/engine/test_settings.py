from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixnet_sd.engine.train import TrainSettings
from pixnet_sd.engine.train._objective import learning_rate


@given(st.floats(0, 1))
def test_constant_unless_annealed(progress: float) -> None:
    assert learning_rate(TrainSettings(lr=3e-4), progress) == 3e-4


def test_one_cycle() -> None:
    settings = TrainSettings(lr=2e-3, anneal=True)
    rates = np.array([learning_rate(settings, p) for p in np.linspace(0, 1, 101)])
    assert rates.argmax() == 20
    assert rates[20] == pytest.approx(2e-3)
    assert (np.diff(rates[:21]) > 0).all()
    assert (np.diff(rates[20:]) < 0).all()
    assert 0 < rates[0] < 1e-4
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert np.abs(np.diff(rates)).max() < 2e-4  # no jumps
