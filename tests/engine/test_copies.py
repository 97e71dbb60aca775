from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from pixnet_sd.engine import Copies

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass
class Item:
    values: Tensor

    def moved(self, move) -> Item:
        return Item(move(self.values))


@pytest.mark.parametrize("device", DEVICES)
def test_there_and_back(device: str) -> None:
    copies = Copies(torch.device(device))
    values = torch.arange(12.0).view(3, 4)
    there = copies.up(values)
    assert there.device.type == device
    np.testing.assert_array_equal(copies.down(there.T * 2)(), values.T * 2)


def test_a_cpu_copies_nothing() -> None:
    copies, items = Copies(torch.device("cpu")), [Item(torch.ones(3))]
    assert copies.up(items[0].values) is items[0].values
    assert next(copies.arriving(items)) is items[0]


@pytest.mark.gpu
def test_batches_are_whole_while_the_device_is_busy() -> None:
    """Memory of a batch that its user has dropped is not written to before the device has read it."""
    copies = Copies(torch.device("cuda"))
    busy = torch.rand(4096, 4096, device="cuda")
    sums = []
    for k, item in enumerate(copies.arriving(Item(torch.full((1 << 22,), float(k)).pin_memory()) for k in range(12))):
        for _ in range(5):
            busy = busy @ busy / busy.norm()
        sums.append((k, item.values.double().mean() + 0 * busy[0, 0].nan_to_num()))
    assert [float(total) for _, total in sums] == [float(k) for k, _ in sums]
