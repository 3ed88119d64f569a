"""A frozen network's Linear layers in 4 bits: NF4 with double quantisation (QLoRA, Dettmers et al. 2023).

bitsandbytes quantises and dequantises. The layer itself is our own: its `weight` is the dequantised one, so that every
adapter layer reads shapes and norms as usual, and its backward pass dequantises again instead of keeping the weight.
The quantised weights are not saved: quantisation is deterministic, so resuming stays exact.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import SettingsError, suggest
from .stored_weights import LinearWithoutSaving, StoredLinear

_BLOCK = 64  # weights that share a scale
_OUTER_BLOCK = 256  # scales that share a scale of their own
_BYTES_OF_CODES = (16 + 256) * 4 + 4  # the tables of both levels, and the mean of the scales


def load_bitsandbytes() -> Any:
    """Import bitsandbytes without its side effects.

    On some processors its import asks the package `kernels` for a kernel, which downloads one, or warns that there is
    none; nothing here uses it. It also compiles functions for devices without its own kernels; that is deferred until
    one is called, since importing the compiler takes longer than the rest of bitsandbytes.

    Raises:
        SettingsError: It is not installed, or can't be imported.
    """
    missing = object()
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    kernels = sys.modules.get("kernels", missing)
    if "bitsandbytes" not in sys.modules:
        logger.setLevel(logging.ERROR)
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        with _compiling_when_called():
            import bitsandbytes.functional

        return bitsandbytes
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise SettingsError(
            f"The package bitsandbytes is required but can't be used: {error}.",
            f'Install it: "{sys.executable}" -m pip install bitsandbytes; or set '
            f"{suggest('base_quantization', 'none')}.",
        ) from error
    finally:
        logger.setLevel(level)
        if sys.modules.get("kernels", missing) is None:
            del sys.modules["kernels"]
            if kernels is not missing:
                sys.modules["kernels"] = kernels  # type: ignore[assignment]


@contextlib.contextmanager
def _compiling_when_called() -> Iterator[None]:
    """Let `torch.compile` import its compiler not before the function that it returns is called."""
    compile_now = torch.compile

    def compile_when_called(model: Any = None, **options: Any) -> Any:
        if model is None:
            return lambda decorated: compile_when_called(decorated, **options)
        if not inspect.isfunction(model):  # of another thread: a network stays one
            return compile_now(model, **options)
        compiled = functools.cache(lambda: compile_now(model, **options))

        @functools.wraps(model)
        def call(*arguments: Any, **keywords: Any) -> Any:
            return compiled()(*arguments, **keywords)

        return call

    torch.compile = compile_when_called
    try:
        yield
    finally:
        torch.compile = compile_now


def load_bitsandbytes_if_installed() -> None:
    """Import bitsandbytes, if it is installed, before another library does so with its side effects."""
    with contextlib.suppress(SettingsError):
        load_bitsandbytes()


def require_quantizable(quantization: str, device: torch.device) -> None:
    """Check that weights can be quantised on a device, by trying it.

    Args:
        quantization: The setting base_quantization.
        device: Where training runs.

    Raises:
        SettingsError: They can't; the remedy names what to install or choose.
    """
    if quantization == "none":
        return
    functional = load_bitsandbytes().functional
    try:
        packed, state = _quantized(functional, torch.linspace(-1, 1, 2 * _BLOCK).view(2, _BLOCK), device)
        functional.dequantize_4bit(packed, state)
    except Exception as error:  # the library raises different ones on every platform
        raise SettingsError(
            f"bitsandbytes can't store 4-bit weights on {device}: {error}.",
            f"Update it (pip install -U bitsandbytes), or set {suggest('base_quantization', 'none')}.",
        ) from error


class Nf4Linear(nn.Linear):
    """A frozen Linear layer with its weight stored in 4 bits.

    The weight is split into blocks of 64 values; each is divided by its largest and rounded to one of 16 quantiles
    of a normal distribution (section 3, "4-bit NormalFloat"); the scales are stored in 8 bits ("Double Quantization").
    That takes 4.127 bits per weight.
    """

    def __init__(self, linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> None:
        """Quantise a layer; its own tensors are only read.

        Args:
            linear: A layer with weight (out, in).
            device: Of the quantised weight; on "meta" it takes no memory and needs no bitsandbytes.
            dtype: Of the computation.
        """
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.dtype = dtype
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
        """The dequantised weight, (out, in); a new tensor at every access."""
        if self._state is None:
            weight = torch.empty((self.out_features, self.in_features), dtype=self.dtype, device="meta")
        else:
            weight = self._functional.dequantize_4bit(self.packed, self._state)
        return nn.Parameter(weight, requires_grad=False)

    def held(self) -> Sequence[Tensor]:
        """The tensors that store the weight, without its scales."""
        return [self.packed]

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Read the weight from other tensors than `held`, with the same content."""
        [self.packed] = tensors

    def move_scales(self, device: torch.device) -> None:
        """Move the weight's scales."""
        if self._state is not None:
            self._state.to(device)

    @property
    def quantized_bytes(self) -> int:
        """Size of the quantised weight in bytes."""
        return _quantized_bytes(self.in_features * self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, (…, in) → (…, out), with the dequantised weight."""
        result: Tensor = LinearWithoutSaving.apply(input.to(self.dtype), self)  # type: ignore[no-untyped-call]
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move to another device with the network; scales and codes keep their types."""
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.packed.device)).device
        if device != self.packed.device:
            self.packed = self.packed.to(device)
            self._state.to(device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def quantize(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace every Linear layer of a network by a 4-bit one, one after the other.

    So the device never holds more than one unquantised layer. Convolutions and norms are not changed.

    Args:
        network: Built around borrowed tensors, which stay untouched.
        device: Of the quantised weights.
        dtype: Of the computation.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear or isinstance(child, StoredLinear):
                setattr(parent, name, Nf4Linear(child, device, dtype).train(child.training))


def _quantized(functional: Any, weight: Tensor, device: torch.device) -> tuple[Tensor, Any]:
    packed, state = functional.quantize_4bit(
        weight.to(device), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return packed, state


def _quantized_bytes(numbers: int) -> int:
    blocks = -(-numbers // _BLOCK)
    return -(-numbers // 2) + blocks + 4 * -(-blocks // _OUTER_BLOCK) + _BYTES_OF_CODES
