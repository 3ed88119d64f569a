"""Devices: choosing one and a precision, moving networks and tensors, measuring memory, out-of-memory errors."""

from __future__ import annotations

import contextlib
import gc
import os
import traceback
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .errors import OutOfMemoryError, SettingsError, suggest

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" takes CUDA, else MPS, else the CPU.

    Raises:
        SettingsError: The device is not available, or several processes would share it.
    """
    several_processes = "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    if several_processes and (name == "mps" or ":" in name):
        raise SettingsError(
            f"Several processes can't share the device {name}.",
            f"Use {suggest('device', 'auto')}, so that each process gets its own GPU.",
        )
    device = torch.device(_best_device() if name == "auto" else name)
    if not _is_available(device):
        raise SettingsError(
            f"The device {device} is not available on this computer.",
            f"Use {suggest('device', 'auto')}, or install a PyTorch build that supports your GPU.",
        )
    return device


def _best_device() -> str:
    if torch.cuda.is_available():
        local_rank = os.environ.get("LOCAL_RANK")  # set if a launcher started this process, one for each GPU
        return "cuda" if local_rank is None else f"cuda:{local_rank}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _is_available(device: torch.device) -> bool:
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    if device.type == "mps":
        return torch.backends.mps.is_available()
    return True


def pick_precision(precision: str, device: torch.device) -> str:
    """The precision to train in: fp32, bf16 or fp16; "auto" takes the fastest that the device supports well.

    Raises:
        SettingsError: The device can't train at that precision.
    """
    if precision == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if precision == "fp16" and device.type != "cuda":
        raise SettingsError(
            f"{suggest('precision', 'fp16')} needs a CUDA GPU; the device is {device.type}.", "Use bf16, fp32 or auto."
        )
    return precision


def to_device(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a network to a device and dtype.

    If all its tensors already have the device and dtype, they stay borrowed. Otherwise this makes one private copy
    in the channels-last memory format, the fastest for 2D convolutions; networks with 3D ones keep their format.
    """
    target = torch.empty(0, device=device).device  # with its index, if the device has one
    parameters = list(network.parameters())
    tensors = [*parameters, *(buffer for buffer in network.buffers() if buffer.element_size() > 1)]  # else quantised
    is_typed = all(tensor.dtype == dtype or not tensor.is_floating_point() for tensor in tensors)
    if is_typed and all(tensor.device == target for tensor in [*parameters, *network.buffers()]):
        return network
    # nn.Module.to, since diffusers' own warns of modules to be kept in float32, of which there are none
    is_of_videos = any(parameter.ndim > 4 for parameter in parameters)
    keeps_layout = device.type == "mps" or is_of_videos  # MPS has trouble with another
    layout = torch.preserve_format if keeps_layout else torch.channels_last
    return nn.Module.to(network, device=device, dtype=dtype, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without blocking; a GPU waits for the copy when it needs it.

    That needs page-locked memory. PyTorch manages that memory and keeps the order of operations.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class NumberOnItsWay:
    """A number on a device that is read later, without waiting for the operations queued since."""

    def __init__(self, number: Tensor) -> None:
        """Ask for it.

        Args:
            number: 0-D.
        """
        self._number = number.detach()
        self._arrived: torch.cuda.Event | None = None
        if number.device.type == "cuda":
            self._number = self._number.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def __float__(self) -> float:
        """The number, as soon as it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._number)


def release(device: torch.device) -> None:
    """Free the device memory of networks that are no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of the peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that are free, or reserved by this process but not in use."""
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    return free + reserved


def used_memory(device: torch.device) -> int:
    """Bytes: the peak since the last reset on CUDA, the current use on MPS, the process's resident size on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import psutil

    return int(psutil.Process().memory_info().rss)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, from any device, means out of memory."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in message for phrase in _OUT_OF_MEMORY)


@contextlib.contextmanager
def explained_memory_errors(what_to_lower: str) -> Iterator[None]:
    """Turn out-of-memory errors of any device into `OutOfMemoryError`.

    Args:
        what_to_lower: Completes the remedy "Lower …"; settings are named by `suggest`.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        for exception in (error, error.__context__):
            if exception is not None:
                traceback.clear_frames(exception.__traceback__)  # else the error would keep the networks alive
        raise OutOfMemoryError("Out of memory.", f"Lower {what_to_lower}.") from error
