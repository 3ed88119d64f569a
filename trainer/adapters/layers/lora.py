"""LoRA and LoCon (Hu et al. 2021, arXiv 2106.09685; kohya-ss/sd-scripts): Δ = alpha / rank · up · down."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import DORA_SCALE, LayerTensors, dora_delta, product, tensors_by_suffix, two_factors

SUFFIXES = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", DORA_SCALE)


@dataclass(frozen=True)
class LoraLayer:
    """Two factors, or three for a Tucker-decomposed convolution.

    Attributes:
        down: (rank, in) or (rank, in, k, k).
        up: (out, rank) or (out, rank, 1, 1).
        alpha: Numerator of the scale.
        mid: (rank, rank, k, k), the core of a Tucker-decomposed convolution; None otherwise.
        dora_scale: (out, 1[, 1, 1]), DoRA's magnitude of each output's row; (1, in[, 1, 1]), of each input's column, in
            LyCORIS's older form.
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

    @property
    def needs_weight(self) -> bool:
        """See `Layer.needs_weight`."""
        return self.dora_scale is not None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under kohya's names."""
        return tensors_by_suffix(self, SUFFIXES)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """See `Layer.factors`."""
        if self.needs_weight:
            return None
        outer, inner = self._outer_and_inner()
        return two_factors(outer, inner, self.mid, self.alpha / self.rank)

    @torch.no_grad()
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """See `Layer.delta`."""
        outer, inner = self._outer_and_inner()
        plain = self.alpha / self.rank * product(outer, inner, self.mid)
        return dora_delta(plain, self.dora_scale, weight)

    def _outer_and_inner(self) -> tuple[Tensor, Tensor]:
        """Outer and inner factor as `product` takes them, beside `mid` as the core."""
        if self.mid is None:
            return self.up, self.down
        return self.up.flatten(1).T, self.down.flatten(1)


def make_lora(tensors: LayerTensors, alpha: float | None) -> LoraLayer:
    """A LoRA; see `make_layer`."""
    tensors.require_factors("lora_up.weight", "lora_down.weight", "lora_mid.weight")
    rank = tensors.require("lora_down.weight").shape[0]
    return LoraLayer(alpha=float(rank if alpha is None else alpha), **tensors.by_field())
