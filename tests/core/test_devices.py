"""Which device and precision a run takes. The computer's own devices are stood in for: no machine has them all."""

from __future__ import annotations

import pytest
import torch
from pack.trainer.core import devices
from pack.trainer.core.errors import OutOfMemoryError, SettingsError
from torch import nn


@pytest.fixture
def computer(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A computer with neither CUDA nor MPS, and no launcher."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return monkeypatch


def test_auto_takes_cuda_then_mps_then_the_cpu(computer: pytest.MonkeyPatch) -> None:
    assert devices.pick_device("auto") == torch.device("cpu")
    computer.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.pick_device("auto") == torch.device("mps")
    computer.setattr(torch.cuda, "is_available", lambda: True)
    computer.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.pick_device("auto") == torch.device("cuda")
    computer.setenv("LOCAL_RANK", "1")
    computer.setenv("WORLD_SIZE", "2")
    assert devices.pick_device("auto") == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["cuda", "cuda:2", "mps"])
def test_a_device_that_is_not_there_is_refused(name: str, computer: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as refused:
        devices.pick_device(name)
    assert refused.value.problem == f"The device {name} is not available on this computer."
    computer.setattr(torch.cuda, "device_count", lambda: 2)
    if name == "cuda:2":  # the third of two
        with pytest.raises(SettingsError):
            devices.pick_device(name)


@pytest.mark.parametrize("name", ["mps", "cuda:0"])
def test_several_processes_share_no_device(name: str, computer: pytest.MonkeyPatch) -> None:
    computer.setenv("LOCAL_RANK", "0")
    computer.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError) as refused:
        devices.pick_device(name)
    assert name in refused.value.problem
    assert "device = auto" in refused.value.remedy


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_precision_of_a_gpu(capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.pick_precision("auto", torch.device("cuda")) == precision


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_precision_without_cuda(device: str) -> None:
    assert devices.pick_precision("auto", torch.device(device)) == "fp32"
    assert devices.pick_precision("bf16", torch.device(device)) == "bf16"
    with pytest.raises(SettingsError) as refused:
        devices.pick_precision("fp16", torch.device(device))
    assert f"the device is {device}" in refused.value.problem


def test_a_network_that_fits_stays_borrowed() -> None:
    network = nn.Conv2d(3, 4, 3)
    weight = network.weight.data_ptr()
    assert devices.to_device(network, torch.device("cpu"), torch.float32).weight.data_ptr() == weight
    moved = devices.to_device(network, torch.device("cpu"), torch.bfloat16)
    assert moved.weight.dtype == torch.bfloat16
    assert moved.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_memory_errors_of_any_device_are_explained(error: Exception, is_memory: bool) -> None:
    with pytest.raises(OutOfMemoryError if is_memory else RuntimeError) as raised, devices.explained_memory_errors("x"):
        raise error
    if is_memory:
        assert raised.value.remedy == "Lower x."
    else:
        assert raised.value is error
