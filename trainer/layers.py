"""The adapter of one module, one class per kind: its tensors, its shape, and what it adds to the module's weight.

| kind | what is added to a weight W | source |
|---|---|---|
| LoRA, LoCon | Δ = alpha / rank · up · down | Hu et al. 2021 (arXiv 2106.09685); kohya-ss/sd-scripts |
| LoHa | Δ = alpha / rank · (w1_a · w1_b) ⊙ (w2_a · w2_b) | Hyeon-Woo et al. 2021 (arXiv 2108.06098); LyCORIS |
| LoKr | Δ = alpha / rank · w1 ⊗ w2 | Yeh et al. 2023 (arXiv 2309.14859); LyCORIS |
| DoRA, of each | dora_scale / ‖W + Δ‖ · (W + Δ) − W | Liu et al. 2024 (arXiv 2402.09353); LyCORIS, PEFT |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .errors import AdapterError

_BROKEN = "Download or copy the adapter file again, or choose another."
_LORA = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_OWN = {"LoRA": _LORA, "LoHa": _LOHA, "LoKr": _LOKR}
_DORA = "dora_scale"


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
        """Name of the kind for people: "LoRA", "DoRA", "LoHa", "LoKr", "LoHa with DoRA", "LoKr with DoRA"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the change: (out, in), (out, in, k, k), or flat (out, in·k·k) where no tensor knows the kernel."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under the names that follow the module's in a file, without alpha."""

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """What the layer adds to its module's weight at strength 1; carries no gradient.

        Args:
            weight: The module's weight, (out, in) or (out, in, k, k), on any device. Only DoRA needs it.

        Returns:
            float32, on the device of the layer's tensors. Of the shape `shape`, which has as many numbers as the
            weight but may be flat, or miss a kernel of 1×1: the caller reshapes it. DoRA: of the weight's shape.

        Raises:
            AdapterError: A DoRA without its weight, or a weight of another size.
        """


@dataclass(frozen=True)
class LoraLayer:
    """Two factors, or three for a Tucker-decomposed convolution.

    Attributes:
        down: (rank, in) or (rank, in, k, k).
        up: (out, rank) or (out, rank, 1, 1).
        alpha: Numerator of the scale.
        mid: (rank, rank, k, k), the core of a Tucker-decomposed convolution; None otherwise.
        dora_scale: (out, 1[, 1, 1]), DoRA's length of each output's row; (1, in[, 1, 1]) in LyCORIS's older form.
    """

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None
    dora_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of the factorisation."""
        return self.down.shape[0]

    @property
    def kind(self) -> str:
        """LoRA, or DoRA with a dora_scale."""
        return "LoRA" if self.dora_scale is None else "DoRA"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) or (out, in, k, k)."""
        kernel = (self.down if self.mid is None else self.mid).shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under kohya's names."""
        return _by_field(self, _LORA)

    @torch.no_grad()
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """See `Layer.delta`."""
        if self.mid is None:
            plain = _product(self.up, self.down)
        else:
            plain = _product(self.up.flatten(1).T, self.down.flatten(1), self.mid)
        return _decomposed(self.alpha / self.rank * plain, self.dora_scale, weight)


@dataclass(frozen=True)
class LohaLayer:
    """The Hadamard product of two products of two factors, each with a core for a Tucker-decomposed convolution.

    Attributes:
        w1_a: (out, rank); (rank, out) with a core.
        w1_b: (rank, in) or (rank, in·k·k); (rank, in) with a core.
        w2_a: As `w1_a`.
        w2_b: As `w1_b`.
        alpha: Numerator of the scale.
        t1: (rank, rank, k, k), the core between `w1_a` and `w1_b`; None without one.
        t2: As `t1`, of the other product.
        dora_scale: As in `LoraLayer`.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None
    dora_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of each of the two products."""
        return self.w1_b.shape[0]

    @property
    def kind(self) -> str:
        """LoHa, with DoRA or without."""
        return "LoHa" if self.dora_scale is None else "LoHa with DoRA"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in); of a convolution (out, in, k, k) with cores, flat (out, in·k·k) without."""
        return _product_shape(self.w1_a, self.w1_b, self.t1)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under LyCORIS's names."""
        return _by_field(self, _LOHA)

    @torch.no_grad()
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """See `Layer.delta`."""
        plain = _product(self.w1_a, self.w1_b, self.t1) * _product(self.w2_a, self.w2_b, self.t2)
        return _decomposed(self.alpha / self.rank * plain, self.dora_scale, weight)


@dataclass(frozen=True, kw_only=True)
class LokrLayer:
    """The Kronecker product of a small and a larger factor, each whole or a product of two factors.

    The shapes are (a, c) and (b, d[, k, k]) for a weight of (a·b, c·d[, k, k]).

    Attributes:
        w1: (a, c), or None and `w1_a` (a, rank), `w1_b` (rank, c).
        w2: (b, d[, k, k]), or None and `w2_a` (b, rank), `w2_b` (rank, d) or (rank, d·k·k).
        alpha: Numerator of the scale, which is 1 whatever alpha if both factors are whole.
        t2: (rank, rank, k, k), a core between `w2_a` (rank, b) and `w2_b` (rank, d); None without one.
        dora_scale: As in `LoraLayer`.
    """

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    alpha: float
    t2: Tensor | None = None
    dora_scale: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether both factors are whole, so that there is no rank to scale by."""
        return self.w1 is not None and self.w2 is not None

    @property
    def rank(self) -> int:
        """Rank of the factor that is a product: the larger one's if both are, as in ComfyUI; 1 if none is."""
        inner = self.w2_b if self.w2 is None else self.w1_b if self.w1 is None else None
        return 1 if inner is None else inner.shape[0]

    @property
    def kind(self) -> str:
        """LoKr, with DoRA or without."""
        return "LoKr" if self.dora_scale is None else "LoKr with DoRA"

    @property
    def shape(self) -> tuple[int, ...]:
        """(a·b, c·d[, k, k]), or flat (a·b, c·d·k·k) if `w2_b` is."""
        small, large = self._factors("meta")
        return (small.shape[0] * large.shape[0], small.shape[1] * large.shape[1], *large.shape[2:])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under LyCORIS's names."""
        return _by_field(self, _LOKR)

    @torch.no_grad()
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """See `Layer.delta`."""
        small, large = self._factors()
        scale = 1.0 if self.is_whole else self.alpha / self.rank
        plain = scale * torch.kron(small.reshape(*small.shape, *[1] * (large.ndim - 2)), large)
        return _decomposed(plain, self.dora_scale, weight)

    def _factors(self, device: str | None = None) -> tuple[Tensor, Tensor]:
        """The small and the larger factor, float32; on the meta device for their shapes alone."""
        factors = []
        for whole, *parts in ((self.w1, self.w1_a, self.w1_b), (self.w2, self.w2_a, self.w2_b, self.t2)):
            there = [part.to(device) for part in parts if part is not None]
            factors.append(_product(*there) if whole is None else whole.to(device, torch.float32))
        return factors[0].contiguous(), factors[1].contiguous()


def make_layer(name: str, parts: Mapping[str, Tensor], alpha: float | None) -> LoraLayer | LohaLayer | LokrLayer:
    """One module's layer from its tensors, the inverse of `Layer.tensors`.

    Args:
        name: The module's name, for messages.
        parts: Tensors under the names that follow the module's in a kohya or LyCORIS file, without alpha.
        alpha: Numerator of the scale; None for the rank.

    Raises:
        AdapterError: A tensor is missing, the shapes don't belong together, or a number is not finite.
    """
    kind, own = next((entry for entry in _OWN.items() if any(part in entry[1] for part in parts)), ("LoRA", _LORA))
    foreign = sorted(set(parts) - {*own, _DORA})
    if foreign:
        raise AdapterError(f"The adapter is damaged: the {kind} {name} also has the tensor {foreign[0]}.", _BROKEN)
    for tensor in (*parts.values(), torch.tensor(alpha or 0.0)):
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"The adapter is damaged: {name} has numbers that are not finite.", _BROKEN)
    found = _Parts(name, kind, parts)
    layer = _lora(found) if kind == "LoRA" else _loha(found) if kind == "LoHa" else _lokr(found)
    if layer.dora_scale is not None and not _is_scale(layer.dora_scale, layer.shape):
        raise found.misfit([_DORA], f"for a weight of {layer.shape}")
    return replace(layer, alpha=float(layer.rank if alpha is None else alpha))


@dataclass(frozen=True)
class _Parts:
    """The tensors of one module, asked for by name."""

    name: str
    kind: str
    tensors: Mapping[str, Tensor]

    def need(self, part: str) -> Tensor:
        """A tensor that must be there, with two dimensions or more and none of them empty."""
        if part not in self.tensors:
            raise AdapterError(f"The adapter is incomplete: the {self.kind} {self.name} lacks its {part}.", _BROKEN)
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
        return {_field(part): tensor for part, tensor in self.tensors.items()}

    def misfit(self, parts: Iterable[str], why: str) -> AdapterError:
        """The error about the shapes of some tensors."""
        shapes = ", ".join(f"{part} {tuple(self.tensors[part].shape)}" for part in parts)
        return AdapterError(f"The adapter is damaged: {self.name} has {shapes}, {why}.", _BROKEN)


def _lora(parts: _Parts) -> LoraLayer:
    parts.need_pair("lora_up.weight", "lora_down.weight", "lora_mid.weight")
    return LoraLayer(alpha=1.0, **parts.fields())


def _loha(parts: _Parts) -> LohaLayer:
    parts.need_pair("hada_w1_a", "hada_w1_b", "hada_t1")
    parts.need_pair("hada_w2_a", "hada_w2_b", "hada_t2")
    layer = LohaLayer(alpha=1.0, **parts.fields())
    other = _product_shape(layer.w2_a, layer.w2_b, layer.t2)
    if layer.shape != other or layer.w1_b.shape[0] != layer.w2_b.shape[0]:
        raise parts.misfit(parts.tensors, "which don't fit")
    return layer


def _lokr(parts: _Parts) -> LokrLayer:
    for whole, outer, inner, core in ((*_LOKR[:3], "lokr_t1"), _LOKR[3:]):
        if whole in parts.tensors or parts.tensors.keys().isdisjoint((outer, inner)):
            parts.need(whole)
        else:
            parts.need_pair(outer, inner, core)
    return LokrLayer(alpha=1.0, **parts.fields())


def _by_field(layer: LoraLayer | LohaLayer | LokrLayer, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a layer under their names in a file."""
    parts = {name: getattr(layer, _field(name)) for name in (*names, _DORA)}
    return {name: part for name, part in parts.items() if part is not None}


def _field(part: str) -> str:
    """The field of a tensor, from its name in a file: "down" of "lora_down.weight", "w1_a" of "hada_w1_a"."""
    return re.sub(r"^(lora|hada|lokr)_|\.weight$", "", part)


def _product(outer: Tensor, inner: Tensor, core: Tensor | None = None) -> Tensor:
    """A product of factors in float32.

    Args:
        outer: (out, rank[, 1, 1]); with a core (rank, out).
        inner: (rank, in, …), of which everything behind the rank is kept; with a core (rank, in).
        core: (rank, rank, …), the core of a Tucker decomposition.
    """
    outer, inner = outer.float(), inner.float()
    if core is not None:
        return torch.einsum("rs...,ro,si->oi...", core.float(), outer, inner)
    return (outer.flatten(1) @ inner.flatten(1)).reshape(_product_shape(outer, inner, None))


def _product_shape(outer: Tensor, inner: Tensor, core: Tensor | None) -> tuple[int, ...]:
    """The shape of what `_product` gives."""
    if core is not None:
        return (outer.shape[1], inner.shape[1], *core.shape[2:])
    return (outer.shape[0], *inner.shape[1:])


def _is_per_output(scale: Tensor, shape: Sequence[int]) -> bool:
    return scale.ndim > 0 and scale.shape[0] == shape[0] == scale.numel()


def _is_scale(scale: Tensor, shape: Sequence[int]) -> bool:
    """Whether a dora_scale has a number per output or per input of a weight, whose shape may be flat."""
    per_input = scale.ndim > 1 and scale.shape[0] == 1 and scale.numel() > 0 and shape[1] % scale.numel() == 0
    return _is_per_output(scale, shape) or per_input


def _decomposed(plain: Tensor, scale: Tensor | None, weight: Tensor | None) -> Tensor:
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
    if weight is None:
        raise AdapterError(
            "What a DoRA adds depends on the weight that it changes, and no weight was given.",
            "Give the base model along with the adapter.",
        )
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
