from __future__ import annotations

import numpy as np

from pixnet_sd.geometry import Circles


def test_subset_keeps_targets_with_regions_and_drops_empty_sizes(slide_of) -> None:
    circles = Circles([[1, 2], [3, 4], [5, 6]], [1, 2, 3])
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    slide = slide_of(circles, circles, values=[values, values])
    part = slide.subset((np.array([], int), np.array([2, 0])))
    (measured,) = part.measured
    assert measured.size_name == "size1"
    np.testing.assert_array_equal(measured.regions.radius, [3, 1])
    np.testing.assert_array_equal(measured.values, values[[2, 0]])
    assert (part.name, part.read, part.height, part.width) == (slide.name, slide.read, slide.height, slide.width)
