from __future__ import annotations

import numpy as np

from pixnet_sd.datasets.drawn import bin_barcodes, cell_barcodes, spot_barcodes


def test_names_of_the_format():
    assert bin_barcodes(2, np.array([0, 12]), np.array([345, 3349])).tolist() == [
        b"s_002um_00000_00345-1",
        b"s_002um_00012_03349-1",
    ]
    assert bin_barcodes(16, np.array([7]), np.array([8])).tolist() == [b"s_016um_00007_00008-1"]
    assert cell_barcodes(np.array([1, 123456789])).tolist() == [b"cellid_000000001-1", b"cellid_123456789-1"]


def test_names_of_spots_are_bases_and_all_different():
    names = spot_barcodes(np.arange(5000)).tolist()
    assert len(set(names)) == 5000
    assert all(len(name) == 18 and set(name[:16]) <= set(b"ACGT") and name.endswith(b"-1") for name in names)


def test_no_names():
    assert len(bin_barcodes(2, np.zeros(0, dtype=int), np.zeros(0, dtype=int))) == 0
