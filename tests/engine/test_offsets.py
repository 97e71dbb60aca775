from __future__ import annotations

import numpy as np
import pytest
import torch

from pixnet_sd.engine.offsets import SlideOffsets
from pixnet_sd.nn.regions import Circles


def circles(n: int) -> Circles:
    return Circles(np.arange(2.0 * n).reshape(-1, 2), 5.0)


@pytest.mark.parametrize("logarithmic", [False, True])
def test_start_at_the_difference_of_means_and_cancel(slide_of, logarithmic: bool) -> None:
    rng = np.random.default_rng(0)
    values = [rng.uniform(1, 5, (n, 3)).astype(np.float32) * s for n, s in ((4, 1.0), (12, 3.0))]
    slides = [slide_of(circles(len(v)), values=[v], name=str(k)) for k, v in enumerate(values)]
    offsets = SlideOffsets(slides, logarithmic=logarithmic)
    first, second = (offsets.of(k)(slice(None)).detach().numpy() for k in range(2))
    np.testing.assert_allclose(4 * first + 12 * second, 0, atol=1e-5)
    if not logarithmic:
        np.testing.assert_allclose(second - first, values[1].mean(0) - values[0].mean(0), rtol=1e-5)
    else:  # of shares of the last output, which is all counts
        assert first[-1] == pytest.approx(0, abs=1e-6)
        assert (
            np.sign(second - first)[:2].tolist()
            == np.sign(
                values[1].mean(0)[:2] / values[1].mean(0)[2] - values[0].mean(0)[:2] / values[0].mean(0)[2]
            ).tolist()
        )
    np.testing.assert_array_equal(offsets.of(1)(slice(1, 3)).detach(), second[1:3])


def test_are_learnt(slide_of) -> None:
    slides = [slide_of(circles(2), values=[np.full((2, 2), k, np.float32)], name=str(k)) for k in range(2)]
    offsets = SlideOffsets(slides, logarithmic=False)
    offsets.of(0)(slice(None)).sum().backward()
    assert torch.equal(offsets.shift.grad, torch.tensor([[0.5, 0.5], [-0.5, -0.5]]))
