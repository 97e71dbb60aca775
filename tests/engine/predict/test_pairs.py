"""Two tiles at a time give what one at a time gives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pixnet_sd.engine.predict import PredictPlan, Tiling, Walk, plan_regions, window_side
from pixnet_sd.geometry import Circles, Grid
from pixnet_sd.model import receptive_radius_px


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_prediction_is_the_same(two_threads, make_network, draw, reader, fabric) -> None:
    network, read = make_network(), reader(draw(160, 192))
    tissue = np.ones((40, 48), bool)
    regions = plan_regions(Circles(np.empty((0, 2)), np.empty(0)), Grid(40, 48, 4), tissue, 16)
    head, tiling = network.head.select(np.arange(3)), Tiling(64, receptive_radius_px(network))
    plan = PredictPlan(regions, tiling, window_side(64, 16), head, shown=head)
    visits = plan.visits([(r, min(r + 16, 40), c, c + 16) for r in range(0, 40, 16) for c in range(0, 48, 16)], None)

    maps = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        maps.append(np.zeros((3, 40, 48), np.float32))
        with Walk(network, read, plan, visits, fabric) as walk:
            for result in walk.results(show_progress_bar=False):
                for (row0, row1, col0, col1), lent in result.blocks:
                    with lent() as values:
                        maps[-1][:, row0:row1, col0:col1] = values
        assert torch.get_num_threads() == threads
    np.testing.assert_allclose(maps[1], maps[0], atol=1e-5 * maps[0].std())
