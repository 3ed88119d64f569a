"""What all types of layers share: their protocol, arithmetic of factors, and DoRA's decomposition."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...core.errors import AdapterError

DAMAGED_FILE_REMEDY = "Download or copy the adapter file again, or choose another."
DORA_SCALE = "dora_scale"


class Layer(Protocol):
    """The protocol of all types of layers. Frozen; its tensors keep their dtype and device."""

    @property
    def alpha(self) -> float:
        """Numerator of the scale."""

    @property
    def rank(self) -> int:
        """Rank of the factorisation, the scale's denominator."""

    @property
    def kind(self) -> str:
        """Name of the type, such as "LoRA", "DoRA", "LoHa", "LoKr with DoRA", "OFT", "full difference"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta: (out, in), (out, in, k, k), or flat (out, in·k·k) if no tensor shows the kernel."""

    @property
    def needs_weight(self) -> bool:
        """Whether the delta depends on the weight that it is added to, and is not proportional to the strength."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by suffix, the part of a file's key after the module's name; without alpha."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The delta as a product of two factors without a core, exactly.

        Returns:
            up (out, rank) and down (rank, in[, k, k]), float32, the scale in `up`; the rank may be above that of the
            layer. None where the delta depends on the weight, or is not low-rank by its form.
        """

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """What the layer adds to its module's weight at strength 1; carries no gradient.

        Args:
            weight: The module's weight, (out, in) or (out, in, k, k), on any device; for layers that need it.

        Returns:
            float32, on the device of the layer's tensors. Of the shape `shape`, which has as many elements as the
            weight but may be flat, or lack a kernel of 1×1: the caller reshapes it. Of the weight's shape for layers
            that need it.

        Raises:
            AdapterError: The layer needs a weight and has none, or one of another size.
        """


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one module as in a file, from which a layer is made.

    Attributes:
        name: The module's name, for messages.
        kind: The kind of the layer, for messages.
        tensors: Suffix, such as "lora_down.weight" → tensor.
    """

    name: str
    kind: str
    tensors: Mapping[str, Tensor]

    def require(self, suffix: str) -> Tensor:
        """A tensor that must be there, with two dimensions or more and none of them empty.

        Raises:
            AdapterError: It is missing, or of another shape.
        """
        if suffix not in self.tensors:
            raise AdapterError(
                f"The adapter is incomplete: the {self.kind} {self.name} lacks its {suffix}.", DAMAGED_FILE_REMEDY
            )
        tensor = self.tensors[suffix]
        if tensor.ndim < 2 or not tensor.numel():
            raise self.shape_error([suffix], "but it should be a matrix")
        return tensor

    def require_factors(self, outer: str, inner: str, core: str) -> None:
        """Check that both factors exist, and that their ranks and that of a core, if there is one, agree.

        Args:
            outer: Suffix of (out, rank[, 1, 1]); a LoHa's or LoKr's is (rank, out) with a core.
            inner: Suffix of (rank, in, …); (rank, in[, 1, 1]) with a core.
            core: Suffix of (rank, rank, …).

        Raises:
            AdapterError: A factor is missing, or the shapes don't match.
        """
        inner_factor = self.require(inner)
        outer_factor = self.require(outer)
        core_tensor = self.require(core) if core in self.tensors else None
        rank = inner_factor.shape[0]
        outer_is_transposed = core_tensor is not None and self.kind != "LoRA"
        agree = outer_factor.flatten(1).shape[0 if outer_is_transposed else 1] == rank
        if core_tensor is not None:
            agree &= core_tensor.shape[:2] == (rank, rank)
            agree &= inner_factor.shape[1:].numel() == inner_factor.shape[1]
            agree &= self.kind == "LoRA" or inner_factor.ndim == outer_factor.ndim == 2
        if not agree:
            present = [suffix for suffix in (inner, outer, core) if suffix in self.tensors]
            raise self.shape_error(present, "which don't fit")

    def by_field(self) -> dict[str, Tensor]:
        """The tensors by the fields of their layer."""
        return {field_name(suffix): tensor for suffix, tensor in self.tensors.items()}

    def shape_error(self, suffixes: Iterable[str], why: str) -> AdapterError:
        """The error about the shapes of some tensors."""
        shapes = ", ".join(f"{suffix} {tuple(self.tensors[suffix].shape)}" for suffix in suffixes)
        return AdapterError(f"The adapter is damaged: {self.name} has {shapes}, {why}.", DAMAGED_FILE_REMEDY)


def tensors_by_suffix(layer: object, suffixes: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a layer by their suffixes in a file; those that it lacks are left out."""
    tensors = {suffix: getattr(layer, field_name(suffix)) for suffix in suffixes}
    return {suffix: tensor for suffix, tensor in tensors.items() if tensor is not None}


def field_name(suffix: str) -> str:
    """The field of a tensor, from its suffix in a file: "down" of "lora_down.weight", "w1_a" of "hada_w1_a"."""
    return re.sub(r"^(lora|hada|lokr|oft)_|\.weight$", "", suffix)


def two_factors(outer: Tensor, inner: Tensor, core: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Factors as (out, rank) and (rank, in, …), float32: a core goes into the inner one, the scale into the outer one.

    Args:
        outer: As in `product`.
        inner: As in `product`.
        core: As in `product`.
        scale: Of the product.
    """
    outer, inner = outer.float(), inner.float()
    if core is None:
        return outer.flatten(1) * scale, inner
    return outer.T * scale, torch.einsum("rs...,si->ri...", core.float(), inner)


def product(outer: Tensor, inner: Tensor, core: Tensor | None = None) -> Tensor:
    """The product of two factors and an optional core, float32.

    Args:
        outer: (out, rank[, 1, 1]); with a core (rank, out).
        inner: (rank, in, …), whose dimensions after the rank are kept; with a core (rank, in).
        core: (rank, rank, …), the core of a Tucker decomposition.
    """
    outer, inner = outer.float(), inner.float()
    if core is not None:
        return torch.einsum("rs...,ro,si->oi...", core.float(), outer, inner)
    return (outer.flatten(1) @ inner.flatten(1)).reshape(product_shape(outer, inner, None))


def product_shape(outer: Tensor, inner: Tensor, core: Tensor | None) -> tuple[int, ...]:
    """The shape of what `product` returns."""
    if core is not None:
        return (outer.shape[1], inner.shape[1], *core.shape[2:])
    return (outer.shape[0], *inner.shape[1:])


def _is_per_output(scale: Tensor, shape: Sequence[int]) -> bool:
    return scale.ndim > 0 and scale.shape[0] == shape[0] == scale.numel()


def dora_scale_fits(scale: Tensor, shape: Sequence[int]) -> bool:
    """Whether a dora_scale has one value per output or per input of a weight, whose shape may be flat."""
    per_input = scale.ndim > 1 and scale.shape[0] == 1 and scale.numel() > 0 and shape[1] % scale.numel() == 0
    return _is_per_output(scale, shape) or per_input


def require_weight(weight: Tensor | None, kind: str) -> Tensor:
    """The weight that a layer needs to compute its delta.

    Raises:
        AdapterError: There is none.
    """
    if weight is None:
        raise AdapterError(
            f"The change by {kind} depends on the weight, but no weight was given.",
            "Provide the base model along with the adapter.",
        )
    return weight


def dora_delta(delta: Tensor, scale: Tensor | None, weight: Tensor | None) -> Tensor:
    """DoRA's delta of a weight: scale / (‖W + Δ‖ + ε) · (W + Δ) − W, or Δ itself without a scale.

    The norm is each output row's, as in PEFT and in LyCORIS with `wd_on_output`; each input column's with a scale of
    (1, in[, 1, 1]), as in LyCORIS without it. ε is float32's machine epsilon, as LyCORIS has it; PEFT adds none.

    Args:
        delta: Δ, with as many elements as the weight.
        scale: (out, …) or (1, in, …).
        weight: W, (out, in) or (out, in, k, k).
    """
    if scale is None:
        return delta
    weight = require_weight(weight, "DoRA")
    per_output = _is_per_output(scale, weight.shape)
    fits = delta.numel() == weight.numel() and (per_output or scale.numel() == weight.shape[1])
    if not fits:
        raise AdapterError(
            f"A DoRA for a weight of shape {tuple(delta.shape)} does not fit a weight of shape {tuple(weight.shape)}.",
            "Use an adapter made for a model of this size.",
        )
    original = weight.to(delta.device, torch.float32)
    delta = delta.reshape(weight.shape)
    scaled_axis = 0 if per_output else 1
    other_axes = tuple(axis for axis in range(weight.ndim) if axis != scaled_axis)
    norm: Tensor = torch.linalg.vector_norm(original + delta, dim=other_axes, keepdim=True)
    ratio = scale.float().reshape(norm.shape) / (norm + torch.finfo(torch.float32).eps)
    return (ratio - 1) * original + ratio * delta


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Factors with the same product and similar norms, which fit half precision; exact, by powers of two."""
    down_norms = torch.linalg.vector_norm(down, dim=1, dtype=torch.float64)  # whose squares float32 might not hold
    up_norms = torch.linalg.vector_norm(up, dim=0, dtype=torch.float64)
    exponents = ((down_norms / up_norms).log2() / 2).round().nan_to_num(0.0, 0.0, 0.0).clamp(-120, 120)
    powers = torch.exp2(exponents).to(up.dtype)
    return up * powers, down / powers[:, None]
