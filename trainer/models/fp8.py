"""Weights that a host lends in eight bits: kept as they are, and dequantised whenever a layer computes.

ComfyUI's files hold a Linear layer's weight as float8 numbers beside a scale, `weight_scale`, and how it is quantised,
`comfy_quant`. Other formats than one scale for the whole weight are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import WeightsError

_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_FLOAT8 = tuple(getattr(torch, name) for name in _FORMATS if hasattr(torch, name))  # before 2.1 there are none
_FORMAT = ".comfy_quant"
_SCALE = ".weight_scale"
_INPUT_SCALE = ".input_scale"  # with which a host may quantise inputs; not needed to read the weight


def without_scales(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a network without what describes how others are quantised, and the scales of these others.

    Args:
        tensors: As a host lends them.

    Returns:
        The tensors; and the name of each weight that has a scale → the scale, ().

    Raises:
        WeightsError: A weight is quantised in a way that can't be read.
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
                f"The base model is quantised in a way that can't be read: {name} has scales of the shape "
                f"{tuple(scale.shape)}.",
                "Use a bf16, fp16 or fp8 version of the model; the adapter fits the others, too.",
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
            f"The base model is quantised as {kind} ({module}), which can't be read for training.",
            "Use a bf16, fp16 or fp8 version of the model; the adapter fits the quantised one, too.",
        )


class Fp8Linear(nn.Linear):
    """A frozen Linear layer whose weight is stored in eight bits; see `Nf4Linear` for what it has in common.

    Its weight is borrowed: moving the network moves it, and casting the network changes the type in which it computes.

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
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.packed: Tensor
        self.register_buffer("packed", weight, persistent=False)
        self.register_parameter("bias", bias)
        self.dtype = dtype
        self._scale = scale

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The dequantised weight, (out, in); a new tensor at every access."""
        weight = self.packed.to(self.dtype)
        if self._scale is not None:
            weight = weight * self._scale.to(self.dtype)
        return nn.Parameter(weight, requires_grad=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """As every module; but a layer whose weight is set is an ordinary one from then on."""
        if name == "weight":
            self.become_ordinary(value)
        else:
            super().__setattr__(name, value)

    def become_ordinary(self, weight: nn.Parameter) -> None:
        """Become an ordinary layer with that weight."""
        del self.packed
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.register_parameter("weight", weight)

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, (…, in) → (…, out), with the dequantised weight."""
        result: Tensor = LinearWithoutSaving.apply(input.to(self.dtype), self)  # type: ignore[no-untyped-call]
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move to another device and compute in another type with the network."""
        example = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device))
        self.dtype = example.dtype
        if example.device.type == "mps":  # which has no such numbers
            self.become_ordinary(self.weight)
            return nn.Linear._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        packed = self._buffers.pop("packed")
        assert packed is not None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers["packed"] = packed.to(example.device)
        if self._scale is not None:
            self._scale = self._scale.to(example.device)
        return self


class LinearWithoutSaving(torch.autograd.Function):
    """x · Wᵀ + b, which saves neither x nor W: the backward pass needs only W, and dequantises it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        """(…, in) → (…, out)."""
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """(…, out) → (…, in)."""
        return gradients[0] @ ctx.layer.weight, None


def as_ordinary_layers(network: nn.Module) -> None:
    """Give every layer whose weight is stored in eight bits an ordinary weight, to train it."""
    for module in network.modules():
        if isinstance(module, Fp8Linear):
            module.become_ordinary(module.weight)


def keep_in_eight_bits(network: nn.Module, scales: Mapping[str, Tensor], file_names: Mapping[str, str]) -> None:
    """Replace each Linear layer whose weight is stored in float8 by one that keeps it so.

    Args:
        network: Built around tensors that stay untouched.
        scales: Name of a weight → what it is multiplied with.
        file_names: Name of a weight → its name in the file, where that differs; for messages.

    Raises:
        WeightsError: A weight with a scale is none of a Linear layer.
    """
    dtype = next((p.dtype for p in network.parameters() if p.dtype not in _FLOAT8), torch.float32)
    left = set(scales)
    for path, module in list(network.named_modules()):
        if not isinstance(module, nn.Linear) or module.weight.dtype not in _FLOAT8:
            continue
        name = f"{path}.weight"
        left.discard(name)
        parent, _, attribute = path.rpartition(".")
        layer = Fp8Linear(module.weight.detach(), scales.get(name), module.bias, dtype)
        setattr(network.get_submodule(parent), attribute, layer.train(module.training))
    if left:
        name = min(left)
        raise WeightsError(
            f"The base model's {file_names.get(name, name)} has a scale, which only Linear layers can have.",
            "Use a bf16 or fp16 version of the model.",
        )
