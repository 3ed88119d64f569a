"""A frozen network's Linear layers in four bits: NF4 with double quantisation (QLoRA, Dettmers et al. 2023).

bitsandbytes turns weights into four bits and back. The layer itself is our own: its `weight` is the dequantised one, so
that every kind of adapter reads shapes and norms as always, and its backward pass dequantises again instead of keeping
the weight. Nothing is saved of it: the same weights give the same four bits, so that resuming stays exact.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import SettingsError

_BLOCK, _OUTER_BLOCK = 64, 256  # numbers that share a scale; scales that share one in turn
_BYTES_OF_CODES = (16 + 256) * 4 + 4  # the tables of both levels, and the scales' mean


def load_bitsandbytes() -> Any:
    """Import bitsandbytes without what it does beside.

    On some processors its import asks the package `kernels` for a kernel, which downloads one, or warns that there is
    none; nothing here uses it.

    Raises:
        SettingsError: It is not installed, or does not work here.
    """
    logger, missing = logging.getLogger("bitsandbytes"), object()
    level, kernels = logger.level, sys.modules.get("kernels", missing)
    if "bitsandbytes" not in sys.modules:
        logger.setLevel(logging.ERROR)
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes.functional

        return bitsandbytes
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise SettingsError(
            f"The package bitsandbytes is needed and can't be used: {error}.",
            f'Install it: "{sys.executable}" -m pip install bitsandbytes; or set base_quantization to none.',
        ) from error
    finally:
        logger.setLevel(level)
        if sys.modules.get("kernels", missing) is None:
            del sys.modules["kernels"]
            if kernels is not missing:
                sys.modules["kernels"] = kernels  # type: ignore[assignment]


def load_bitsandbytes_if_there() -> None:
    """Import bitsandbytes, if it is installed, before another library does it less carefully."""
    with contextlib.suppress(SettingsError):
        load_bitsandbytes()


def require_quantizable(quantization: str, device: torch.device) -> None:
    """Try whether weights can be quantised on a device.

    Args:
        quantization: The setting base_quantization.
        device: Where training runs.

    Raises:
        SettingsError: They can't; says what to install or to choose.
    """
    if quantization == "none":
        return
    functional = load_bitsandbytes().functional
    try:
        packed, state = _quantized(functional, torch.linspace(-1, 1, 2 * _BLOCK).view(2, _BLOCK), device)
        functional.dequantize_4bit(packed, state)
    except Exception as error:  # of a library that has other ones on every platform
        raise SettingsError(
            f"bitsandbytes can't hold weights in four bits on {device}: {error}.",
            "Update it (pip install -U bitsandbytes), or set base_quantization to none.",
        ) from error


class Nf4Linear(nn.Linear):
    """A frozen Linear layer whose weight is held in four bits.

    The weight is cut into blocks of 64 numbers; each is divided by its largest one and rounded to one of 16 quantiles
    of a normal distribution (section 3, "4-bit NormalFloat"); the scales are held in 8 bits ("Double Quantization").
    That takes 4.127 bits a number.
    """

    def __init__(self, linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> None:
        """Quantise a layer; its own tensors are read alone.

        Args:
            linear: A layer with weight (out, in).
            device: Where the quantised weight lies; on "meta" it takes no memory and needs no bitsandbytes.
            dtype: Type in which is computed.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, dtype
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(device, dtype), requires_grad=False)
        self.packed: Tensor
        self._state: Any = None
        if device.type == "meta":
            self.packed = torch.empty(_quantized_bytes(linear.weight.numel()), dtype=torch.uint8, device=device)
        else:
            source = linear.weight.detach().to(device, torch.float32)
            self._functional = load_bitsandbytes().functional
            self.packed, self._state = _quantized(self._functional, source, device)
            self._state.dtype = dtype

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The dequantised weight, (out, in); made anew at every reading."""
        if self._state is None:
            found = torch.empty((self.out_features, self.in_features), dtype=self.dtype, device="meta")
        else:
            found = self._functional.dequantize_4bit(self.packed, self._state)
        return nn.Parameter(found, requires_grad=False)

    @property
    def quantized_bytes(self) -> int:
        """Bytes that the weight takes."""
        return _quantized_bytes(self.in_features * self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, (…, in) → (…, out), with the dequantised weight."""
        result: Tensor = _Product.apply(input.to(self.dtype), self)  # type: ignore[no-untyped-call]
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move with the network to another device; scales and codes keep their types."""
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.packed.device)).device
        if device != self.packed.device:
            self.packed = self.packed.to(device)
            self._state.to(device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """x · Wᵀ + b, keeping neither x nor W: the backward pass needs W alone, and dequantises it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear) -> Tensor:
        """(…, in) → (…, out)."""
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """(…, out) → (…, in)."""
        return gradients[0] @ ctx.layer.weight, None


def quantize(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace every Linear layer of a network by one in four bits, one after the other.

    So no more than one layer is ever on the device as it was. Convolutions and norms stay.

    Args:
        network: Built around borrowed tensors, which stay untouched.
        device: Where the quantised weights go.
        dtype: Type in which is computed.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Nf4Linear(child, device, dtype).train(child.training))


def _quantized(functional: Any, weight: Tensor, device: torch.device) -> tuple[Tensor, Any]:
    packed, state = functional.quantize_4bit(
        weight.to(device), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return packed, state


def _quantized_bytes(numbers: int) -> int:
    blocks = -(-numbers // _BLOCK)
    return -(-numbers // 2) + blocks + 4 * -(-blocks // _OUTER_BLOCK) + _BYTES_OF_CODES
