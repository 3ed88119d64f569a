"""Borrowed weights in 8 bits or less: kept as they are, and dequantised whenever a layer computes.

ComfyUI's files have a Linear layer's weight as float8 values with a scale, `weight_scale`, and its format,
`comfy_quant`. Other formats are unpacked by the host that lends them, and refused by name in files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import WeightsError

_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_FLOAT8 = tuple(getattr(torch, name) for name in _FORMATS if hasattr(torch, name))  # before 2.1 there are none
_FORMAT = ".comfy_quant"
_SCALE = ".weight_scale"
_REMEDY = "Use a bf16, fp16 or fp8 version of the model; the adapter also works with the quantised one."
_INPUT_SCALE = ".input_scale"  # with which a host may quantise inputs; not needed to read the weight


def without_scales(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a network without those that describe quantisation, and the scales of the quantised ones.

    Args:
        tensors: As a host lends them.

    Returns:
        The tensors; and the name of each weight that has a scale → the scale, ().

    Raises:
        WeightsError: A weight's quantisation is not supported.
    """
    plain: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_FORMAT):
            _require_format(name.removesuffix(_FORMAT), tensor)
        elif name.endswith(_SCALE):
            scales[f"{name.removesuffix(_SCALE)}.weight"] = tensor
        elif not name.endswith(_INPUT_SCALE):
            plain[name] = tensor
    for name, scale in scales.items():
        weight = plain.get(name)
        if weight is None or weight.dtype not in _FLOAT8 or scale.numel() != 1:
            raise WeightsError(
                f"The base model's quantisation is not supported: {name} has scales of shape {tuple(scale.shape)}.",
                _REMEDY,
            )
    return plain, scales


def _require_format(module: str, stated: Tensor) -> None:
    """Check what a host says of a weight.

    Raises:
        WeightsError: It is quantised in a way that can't be read.
    """
    try:
        kind = str(json.loads(bytes(stated.tolist()).decode())["format"])
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        kind = "an unknown format"
    if kind not in _FORMATS:
        raise WeightsError(
            f"The base model is quantised as {kind} ({module}), which is not supported for training.",
            f"{_REMEDY} In ComfyUI, it can be used as it is.",
        )


@dataclass(frozen=True)
class PackedWeight:
    """A matrix that a host stores in its own format, and unpacks itself.

    Attributes:
        shape: (out, in).
        stored: The tensors that store it, on one device: its values first, then scales.
        unpack: Returns the matrix from these tensors, its shape and its type.
    """

    shape: tuple[int, int]
    stored: tuple[Tensor, ...]
    unpack: Callable[[Sequence[Tensor], tuple[int, int], torch.dtype], Tensor]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The matrix, (out, in)."""
        if self.stored[0].is_meta:  # as much at once as a host may take that unpacks by plain operations
            numbers = torch.empty(self.shape, dtype=torch.float32, device="meta")
            return (numbers * numbers).to(dtype)
        return self.unpack(self.stored, self.shape, dtype)

    def part(self, number: int, count: int) -> PackedWeight:
        """One of several parts with equally many rows; views of the stored tensors.

        Raises:
            WeightsError: Its stored tensors can't be split by rows.
        """
        if count == 1:
            return self
        rows = self.shape[0]
        is_split = rows % count == 0 and self.stored[0].shape[0] == rows
        if not is_split or any(tensor.ndim and tensor.shape[0] not in (1, rows) for tensor in self.stored):
            raise WeightsError(
                f"A weight of shape {self.shape} is quantised in such a way that it can't be split into {count} parts.",
                _REMEDY,
            )
        parts = [tensor.chunk(count)[number] if tensor.ndim and len(tensor) > 1 else tensor for tensor in self.stored]
        return replace(self, shape=(rows // count, self.shape[1]), stored=tuple(parts))

    def to(self, device: torch.device) -> PackedWeight:
        """The same on a device."""
        return replace(self, stored=tuple(tensor.to(device) for tensor in self.stored))


def placeholders(packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    """For each weight, a placeholder of its shape without memory."""
    return {name: torch.empty(weight.shape, device="meta") for name, weight in packed.items()}


class StoredLinear(nn.Linear):
    """A frozen Linear layer with its weight stored in few bits; compare `Nf4Linear`.

    Its weight is borrowed: moving the network moves it, and casting the network changes the type in which it computes.
    """

    def __init__(self, shape: Sequence[int], bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        """Begin without a weight.

        Args:
            shape: Of the weight, (out, in).
            bias: (out,) or None.
            dtype: Of the computation.
        """
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.register_parameter("bias", bias)
        self.dtype = dtype

    def unpacked(self) -> Tensor:
        """The weight, (out, in), in the type of the computation; a new tensor."""
        raise NotImplementedError

    @property
    def stored_device(self) -> torch.device:
        """Where its weight is."""
        raise NotImplementedError

    def move(self, device: torch.device) -> None:
        """Move its weight, which keeps its type."""
        raise NotImplementedError

    def held(self) -> Sequence[Tensor]:
        """The tensors that store the weight, without a scale."""
        raise NotImplementedError

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Read the weight from other tensors than `held`, with the same content."""
        raise NotImplementedError

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The dequantised weight, (out, in); a new tensor at every access."""
        return nn.Parameter(self.unpacked(), requires_grad=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """As every module; but a layer whose weight is set is an ordinary one from then on."""
        if name == "weight":
            self.become_ordinary(value)
        else:
            super().__setattr__(name, value)

    def become_ordinary(self, weight: nn.Parameter) -> None:
        """Become an ordinary layer with that weight."""
        self._buffers.clear()
        self.__dict__.pop("_packed", None)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.register_parameter("weight", weight)

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, (…, in) → (…, out), with the dequantised weight."""
        result: Tensor = LinearWithoutSaving.apply(input.to(self.dtype), self)  # type: ignore[no-untyped-call]
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move to another device and compute in another type with the network."""
        example = fn(torch.empty(0, dtype=self.dtype, device=self.stored_device))
        self.dtype = example.dtype
        if example.device.type == "mps":  # which has no numbers of eight bits and less
            self.become_ordinary(self.weight)
            return nn.Linear._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        buffers = dict(self._buffers)
        self._buffers.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(buffers)
        self.move(example.device)
        return self


class Fp8Linear(StoredLinear):
    """A layer with its weight stored in float8.

    Attributes:
        packed: The weight as it is stored, (out, in), float8.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        """Take tensors as they are.

        Args:
            weight: (out, in), float8.
            scale: What the weight is multiplied with, (); None for 1.
            bias: (out,) or None.
            dtype: Of the computation.
        """
        super().__init__(weight.shape, bias, dtype)
        self.packed: Tensor
        self.register_buffer("packed", weight, persistent=False)
        self._scale = scale

    def unpacked(self) -> Tensor:
        """See `StoredLinear.unpacked`."""
        weight = self.packed.to(self.dtype)
        return weight if self._scale is None else weight * self._scale.to(self.dtype)

    @property
    def stored_device(self) -> torch.device:
        """See `StoredLinear.stored_device`."""
        return self.packed.device

    def move(self, device: torch.device) -> None:
        """See `StoredLinear.move`."""
        self.packed = self.packed.to(device)
        if self._scale is not None:
            self._scale = self._scale.to(device)

    def held(self) -> Sequence[Tensor]:
        """See `StoredLinear.held`."""
        return [self.packed]

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """See `StoredLinear.hold`."""
        [self.packed] = tensors


class PackedLinear(StoredLinear):
    """A layer with a weight that a host unpacks.

    The stored tensors are buffers, so that their memory is counted, except for scales in float types, which are small.
    """

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        """Take tensors as they are.

        Args:
            packed: The weight.
            bias: (out,) or None.
            dtype: Of the computation.
        """
        super().__init__(packed.shape, bias, dtype)
        self._packed = packed
        self._show()

    def _show(self) -> None:
        for number, tensor in enumerate(self._packed.stored):
            if tensor.element_size() == 1 or not tensor.is_floating_point():
                self.register_buffer(f"packed_{number}", tensor, persistent=False)

    def unpacked(self) -> Tensor:
        """See `StoredLinear.unpacked`."""
        with torch.no_grad():
            return self._packed.weight(self.dtype)

    @property
    def stored_device(self) -> torch.device:
        """See `StoredLinear.stored_device`."""
        return self._packed.stored[0].device

    def move(self, device: torch.device) -> None:
        """See `StoredLinear.move`."""
        self._packed = self._packed.to(device)
        self._buffers.clear()
        self._show()

    def held(self) -> Sequence[Tensor]:
        """See `StoredLinear.held`."""
        return self._packed.stored

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """See `StoredLinear.hold`."""
        self._packed = replace(self._packed, stored=tuple(tensors))
        self._buffers.clear()
        self._show()


class LinearWithoutSaving(torch.autograd.Function):
    """x · Wᵀ + b, which saves neither x nor W: the backward pass needs only W, and dequantises it again.

    It saves an empty tensor. Reading that makes gradient checkpointing recompute the layer's block first, which may
    have to be copied to the device for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        """(…, in) → (…, out)."""
        ctx.layer = layer
        ctx.save_for_backward(x.new_empty(0))
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """(…, out) → (…, in)."""
        _ = ctx.saved_tensors
        return gradients[0] @ ctx.layer.weight, None


def as_ordinary_layers(network: nn.Module) -> None:
    """Convert every layer with a weight stored in few bits to an ordinary one, to train it."""
    for module in network.modules():
        if isinstance(module, StoredLinear):
            module.become_ordinary(module.weight)


def keep_as_stored(
    network: nn.Module,
    scales: Mapping[str, Tensor],
    packed: Mapping[str, PackedWeight],
    file_names: Mapping[str, str],
) -> None:
    """Replace each Linear layer with a weight stored in few bits by one that keeps it that way.

    Args:
        network: Built around tensors that stay untouched.
        scales: Name of a weight in float8 → its scale.
        packed: Name of a weight in a host-specific format → the weight; the network has none there.
        file_names: Name of a weight → its name in the file, where that differs; for messages.

    Raises:
        WeightsError: Such a weight is not that of a Linear layer.
    """
    plain = [p.dtype for name, p in network.named_parameters() if p.dtype not in _FLOAT8 and name not in packed]
    dtype = next(iter(plain), torch.float32)
    left = {*scales, *packed}
    for path, module in list(network.named_modules()):
        name = f"{path}.weight"
        if not isinstance(module, nn.Linear) or (module.weight.dtype not in _FLOAT8 and name not in packed):
            continue
        left.discard(name)
        parent, _, attribute = path.rpartition(".")
        layer: StoredLinear
        if name in packed:
            layer = PackedLinear(packed[name], module.bias, dtype)
        else:
            layer = Fp8Linear(module.weight.detach(), scales.get(name), module.bias, dtype)
        setattr(network.get_submodule(parent), attribute, layer.train(module.training))
    if left:
        name = min(left)
        shown = file_names.get(name, name)
        how = (
            "has a scale, which only Linear layers can have"
            if name in scales
            else "is quantised but not a Linear layer"
        )
        raise WeightsError(
            f"The base model's {shown} {how}.",
            "Use a bf16 or fp16 version of the model.",
        )
