"""What the kinds of layers share: their contract, arithmetic of factors, and DoRA's decomposition."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...core.errors import AdapterError

BROKEN = "Download or copy the adapter file again, or choose another."
DORA_SCALE = "dora_scale"


class Layer(Protocol):
    """What every kind of layer can tell. Frozen; its tensors keep the type and device they were given with."""

    @property
    def alpha(self) -> float:
        """Numerator of the scale."""

    @property
    def rank(self) -> int:
        """Rank of the factorisation, the scale's denominator."""

    @property
    def kind(self) -> str:
        """Name of the kind for people, such as "LoRA", "DoRA", "LoHa", "LoKr with DoRA", "OFT", "full difference"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the change: (out, in), (out, in, k, k), or flat (out, in·k·k) where no tensor knows the kernel."""

    @property
    def needs_weight(self) -> bool:
        """Whether the change depends on the weight that is changed, and is not proportional to the layer's strength."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under the names that follow the module's in a file, without alpha."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The change as a product of two plain factors, exactly.

        Returns:
            up (out, rank) and down (rank, in[, k, k]), float32, the scale in `up`; the rank may be above that of the
            layer. None where the change depends on the weight, or is not low-rank by its form.
        """

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """What the layer adds to its module's weight at strength 1; carries no gradient.

        Args:
            weight: The module's weight, (out, in) or (out, in, k, k), on any device; for layers that need it.

        Returns:
            float32, on the device of the layer's tensors. Of the shape `shape`, which has as many numbers as the
            weight but may be flat, or miss a kernel of 1×1: the caller reshapes it. Of the weight's shape for layers
            that need it.

        Raises:
            AdapterError: The layer needs a weight and has none, or one of another size.
        """


@dataclass(frozen=True)
class Parts:
    """The tensors of one module, asked for by name."""

    name: str
    kind: str
    tensors: Mapping[str, Tensor]

    def need(self, part: str) -> Tensor:
        """A tensor that must be there, with two dimensions or more and none of them empty."""
        if part not in self.tensors:
            raise AdapterError(f"The adapter is incomplete: the {self.kind} {self.name} lacks its {part}.", BROKEN)
        if self.tensors[part].ndim < 2 or not self.tensors[part].numel():
            raise self.misfit([part], "but should be a matrix")
        return self.tensors[part]

    def need_pair(self, outer: str, inner: str, core: str) -> None:
        """Two factors must be there, a core may be, and their ranks must agree.

        Args:
            outer: Name of (out, rank[, 1, 1]); a LoHa's or LoKr's is (rank, out) with a core.
            inner: Name of (rank, in, …); (rank, in[, 1, 1]) with a core.
            core: Name of (rank, rank, …).
        """
        inside, outside = self.need(inner), self.need(outer)
        middle = self.need(core) if core in self.tensors else None
        turned = middle is not None and self.kind != "LoRA"
        fits = outside.flatten(1).shape[0 if turned else 1] == inside.shape[0]
        if middle is not None:
            fits &= middle.shape[:2] == (inside.shape[0],) * 2 and inside.shape[1:].numel() == inside.shape[1]
        if not fits:
            raise self.misfit([part for part in (inner, outer, core) if part in self.tensors], "which don't fit")

    def fields(self) -> dict[str, Tensor]:
        """The tensors by the fields of their layer."""
        return {field_of(part): tensor for part, tensor in self.tensors.items()}

    def misfit(self, parts: Iterable[str], why: str) -> AdapterError:
        """The error about the shapes of some tensors."""
        shapes = ", ".join(f"{part} {tuple(self.tensors[part].shape)}" for part in parts)
        return AdapterError(f"The adapter is damaged: {self.name} has {shapes}, {why}.", BROKEN)


def by_field(layer: object, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a layer under their names in a file."""
    parts = {name: getattr(layer, field_of(name)) for name in names}
    return {name: part for name, part in parts.items() if part is not None}


def field_of(part: str) -> str:
    """The field of a tensor, from its name in a file: "down" of "lora_down.weight", "w1_a" of "hada_w1_a"."""
    return re.sub(r"^(lora|hada|lokr|oft)_|\.weight$", "", part)


def plain_factors(outer: Tensor, inner: Tensor, core: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Factors as (out, rank) and (rank, in, …), float32: a core goes into the inner one, the scale into the outer.

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
    """A product of factors in float32.

    Args:
        outer: (out, rank[, 1, 1]); with a core (rank, out).
        inner: (rank, in, …), of which everything behind the rank is kept; with a core (rank, in).
        core: (rank, rank, …), the core of a Tucker decomposition.
    """
    outer, inner = outer.float(), inner.float()
    if core is not None:
        return torch.einsum("rs...,ro,si->oi...", core.float(), outer, inner)
    return (outer.flatten(1) @ inner.flatten(1)).reshape(product_shape(outer, inner, None))


def product_shape(outer: Tensor, inner: Tensor, core: Tensor | None) -> tuple[int, ...]:
    """The shape of what `_product` gives."""
    if core is not None:
        return (outer.shape[1], inner.shape[1], *core.shape[2:])
    return (outer.shape[0], *inner.shape[1:])


def _is_per_output(scale: Tensor, shape: Sequence[int]) -> bool:
    return scale.ndim > 0 and scale.shape[0] == shape[0] == scale.numel()


def is_scale(scale: Tensor, shape: Sequence[int]) -> bool:
    """Whether a dora_scale has a number per output or per input of a weight, whose shape may be flat."""
    per_input = scale.ndim > 1 and scale.shape[0] == 1 and scale.numel() > 0 and shape[1] % scale.numel() == 0
    return _is_per_output(scale, shape) or per_input


def require_weight(weight: Tensor | None, kind: str) -> Tensor:
    """The weight that a layer needs to know what it adds.

    Raises:
        AdapterError: There is none.
    """
    if weight is None:
        raise AdapterError(
            f"What {kind} adds depends on the weight that it changes, and no weight was given.",
            "Give the base model along with the adapter.",
        )
    return weight


def decomposed(plain: Tensor, scale: Tensor | None, weight: Tensor | None) -> Tensor:
    """DoRA's change of a weight: scale / (‖W + Δ‖ + ε) · (W + Δ) − W, or Δ itself without a scale.

    The norm is each output row's, as in PEFT and in LyCORIS with `wd_on_output`; each input column's with a scale of
    (1, in[, 1, 1]), as in LyCORIS without it. ε is float32's machine epsilon, as LyCORIS has it; PEFT adds none.

    Args:
        plain: Δ, of as many numbers as the weight.
        scale: (out, …) or (1, in, …).
        weight: W, (out, in) or (out, in, k, k).
    """
    if scale is None:
        return plain
    weight = require_weight(weight, "DoRA")
    per_output = _is_per_output(scale, weight.shape)
    if plain.numel() != weight.numel() or not (per_output or scale.numel() == weight.shape[1]):
        raise AdapterError(
            f"A DoRA for a weight of {tuple(plain.shape)} doesn't fit a weight of {tuple(weight.shape)}.",
            "Use an adapter that was made for a model of this shape.",
        )
    original = weight.to(plain.device, torch.float32)
    plain = plain.reshape(weight.shape)
    kept = 0 if per_output else 1
    across = tuple(axis for axis in range(weight.ndim) if axis != kept)
    norm: Tensor = torch.linalg.vector_norm(original + plain, dim=across, keepdim=True)
    ratio = scale.float().reshape(norm.shape) / (norm + torch.finfo(torch.float32).eps)
    return (ratio - 1) * original + ratio * plain


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product and of similar lengths, which half precision fits; exact, by powers of two."""
    ratios = torch.linalg.vector_norm(down, dim=1) / torch.linalg.vector_norm(up, dim=0)
    powers = torch.exp2((ratios.log2() / 2).round().nan_to_num(0.0, 0.0, 0.0))
    return up * powers, down / powers[:, None]
