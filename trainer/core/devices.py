"""Devices: choosing one and a precision, moving networks there, memory, and its exhaustion explained."""

from __future__ import annotations

import contextlib
import gc
import os
import traceback
from collections.abc import Iterator

import torch
from torch import nn

from .errors import OutOfMemoryError, SettingsError

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" takes CUDA, else MPS, else the CPU.

    Raises:
        SettingsError: This computer has no such device, or several processes would share it.
    """
    several = "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    if several and (name == "mps" or ":" in name):
        raise SettingsError(
            f"Several processes can't share the device {name}.", "Use --device auto, so that each takes its own GPU."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes that a launcher started
            name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.device(name)
    missing = (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise SettingsError(f"There is no device {name} here.", "Use --device auto, or install PyTorch for your GPU.")
    return device


def pick_precision(precision: str, device: torch.device) -> str:
    """The precision to train in: fp32, bf16 or fp16; "auto" takes what the device computes well.

    Raises:
        SettingsError: The device can't train at that precision.
    """
    if precision == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if precision == "fp16" and device.type != "cuda":
        raise SettingsError(f"precision fp16 needs a CUDA GPU; the device is {device.type}.", "Use bf16, fp32 or auto.")
    return precision


def to_device(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Bring a network to a device and dtype.

    Tensors that are there already stay borrowed. When something must be converted, the one private copy that
    this makes is laid out channels-last, which convolutions compute fastest with.
    """
    there = torch.empty(0, device=device).device  # with its index, if the device has one
    tensors = [*network.parameters(), *network.buffers()]
    if all(t.device == there and (t.dtype == dtype or not t.is_floating_point()) for t in tensors):
        return network
    # nn.Module.to, since diffusers' own warns of modules to be kept in float32, of which there are none
    layout = torch.preserve_format if device.type == "mps" else torch.channels_last  # MPS has trouble with the latter
    return nn.Module.to(network, device=device, dtype=dtype, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def release(device: torch.device) -> None:
    """Give memory of dropped networks back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of the peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that are free, or held by this process for tensors to come."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def used_memory(device: torch.device) -> int:
    """Bytes: the peak since the last reset on CUDA, the current use on MPS, the process's resident size on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import psutil

    return int(psutil.Process().memory_info().rss)


@contextlib.contextmanager
def explained_memory_errors(what_to_lower: str) -> Iterator[None]:
    """Turn out-of-memory errors of any device into `OutOfMemoryError`.

    Args:
        what_to_lower: Ends the remedy: "Lower …".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        if not isinstance(error, MemoryError) and not any(words in text for words in _NO_MEMORY):
            raise
        for one in (error, error.__context__):
            if one is not None:
                traceback.clear_frames(one.__traceback__)  # else the error would keep the networks alive
        raise OutOfMemoryError("The memory does not suffice.", f"Lower {what_to_lower}.") from error
