from __future__ import annotations

import pytest
import torch

from pixnet_sd.engine import fixed_shapes, make_fabric
from pixnet_sd.errors import PixNetError


def test_cpu_in_full_precision() -> None:
    fabric = make_fabric("cpu")
    assert fabric.device == torch.device("cpu")
    with fabric.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_cpu_when_there_is_no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert make_fabric().device.type == "cpu"


def test_a_torch_device_will_do() -> None:
    assert make_fabric(torch.device("cpu")).device.type == "cpu"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_absent_gpu(monkeypatch, device) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PixNetError, match=r"no CUDA GPU.*device='cpu'"):
        make_fabric(device)


def test_gpu_number_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PixNetError, match=r"'cuda:5'.*2 CUDA GPU"):
        make_fabric("cuda:5")


def test_absent_mps(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(PixNetError, match=r"'mps'.*device='cpu'"):
        make_fabric("mps")


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "meta", ""])
def test_no_such_kind_of_device(device: str) -> None:
    with pytest.raises(PixNetError, match=f"{device!r}.*'cpu'"):
        make_fabric(device)


def test_float32_on_a_gpu_that_only_emulates_bf16(monkeypatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    made = {}
    monkeypatch.setattr("pixnet_sd.engine._device.Fabric", lambda **options: made.update(options))
    make_fabric("cuda:0")
    assert asked == [False]
    assert made["precision"] == "32-true"


@pytest.mark.parametrize(("device", "inside"), [("cuda", True), ("cpu", False)])
def test_kernels_are_tried_on_a_gpu_and_the_setting_is_put_back(device: str, inside: bool) -> None:
    assert not torch.backends.cudnn.benchmark

    def fail_within() -> None:
        with fixed_shapes(torch.device(device)):
            assert torch.backends.cudnn.benchmark == inside
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert not torch.backends.cudnn.benchmark


@pytest.mark.gpu
def test_gpu_by_default_in_bf16() -> None:
    fabric = make_fabric()
    assert fabric.device.type == "cuda"
    with fabric.autocast():
        ones = torch.ones(2, 2, device=fabric.device)
        assert (ones @ ones).dtype == torch.bfloat16
