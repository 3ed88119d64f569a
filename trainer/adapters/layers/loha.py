"""LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS): Δ = alpha / rank · (w1_a · w1_b) ⊙ (w2_a · w2_b)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import DORA_SCALE, LayerTensors, dora_delta, product, product_shape, tensors_by_suffix, two_factors

SUFFIXES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", DORA_SCALE)


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
        return product_shape(self.w1_a, self.w1_b, self.t1)

    @property
    def needs_weight(self) -> bool:
        """See `Layer.needs_weight`."""
        return self.dora_scale is not None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under LyCORIS's names."""
        return tensors_by_suffix(self, SUFFIXES)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """See `Layer.factors`; of rank · rank, since a Hadamard product's rank is at most the product of the ranks."""
        if self.needs_weight:
            return None
        up1, down1 = two_factors(self.w1_a, self.w1_b, self.t1, self.alpha / self.rank)
        up2, down2 = two_factors(self.w2_a, self.w2_b, self.t2, 1.0)
        up = torch.einsum("or,os->ors", up1, up2).flatten(1)
        down = (down1[:, None] * down2[None]).flatten(0, 1)
        return up, down

    @torch.no_grad()
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """See `Layer.delta`."""
        hadamard = product(self.w1_a, self.w1_b, self.t1) * product(self.w2_a, self.w2_b, self.t2)
        return dora_delta(self.alpha / self.rank * hadamard, self.dora_scale, weight)


def make_loha(tensors: LayerTensors, alpha: float | None) -> LohaLayer:
    """A LoHa; see `make_layer`."""
    tensors.require_factors("hada_w1_a", "hada_w1_b", "hada_t1")
    tensors.require_factors("hada_w2_a", "hada_w2_b", "hada_t2")
    rank = tensors.require("hada_w1_b").shape[0]
    layer = LohaLayer(alpha=float(rank if alpha is None else alpha), **tensors.by_field())
    second_shape = product_shape(layer.w2_a, layer.w2_b, layer.t2)
    if layer.shape != second_shape or layer.w1_b.shape[0] != layer.w2_b.shape[0]:
        raise tensors.shape_error(tensors.tensors, "which don't fit")
    return layer
