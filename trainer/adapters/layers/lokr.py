"""LoKr (Yeh et al. 2023, arXiv 2309.14859; LyCORIS): Δ = alpha / rank · w1 ⊗ w2."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import DORA_SCALE, LayerTensors, dora_delta, product, tensors_by_suffix, two_factors

SUFFIXES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", DORA_SCALE)


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
    def scale(self) -> float:
        """What the Kronecker product is multiplied by."""
        return 1.0 if self.is_whole else self.alpha / self.rank

    @property
    def rank(self) -> int:
        """Rank of the factor that is a product: the larger one's if both are, as in ComfyUI; 1 if none is."""
        if self.w2 is None and self.w2_b is not None:
            return self.w2_b.shape[0]
        if self.w2 is not None and self.w1 is None and self.w1_b is not None:
            return self.w1_b.shape[0]
        return 1

    @property
    def kind(self) -> str:
        """LoKr, with DoRA or without."""
        return "LoKr" if self.dora_scale is None else "LoKr with DoRA"

    @property
    def shape(self) -> tuple[int, ...]:
        """(a·b, c·d[, k, k]), or flat (a·b, c·d·k·k) if `w2_b` is."""
        small, large = self._small_and_large("meta")
        return (small.shape[0] * large.shape[0], small.shape[1] * large.shape[1], *large.shape[2:])

    @property
    def needs_weight(self) -> bool:
        """See `Layer.needs_weight`."""
        return self.dora_scale is not None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under LyCORIS's names."""
        return tensors_by_suffix(self, SUFFIXES)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """See `Layer.factors`: the Kronecker products of the two factors' own factors."""
        if self.needs_weight:
            return None
        up1, down1 = _split(self.w1, self.w1_a, self.w1_b, None)
        up2, down2 = _split(self.w2, self.w2_a, self.w2_b, self.t2)
        down1 = down1.reshape(*down1.shape, *[1] * (down2.ndim - 2))
        up = torch.kron(up1 * self.scale, up2.contiguous())
        down = torch.kron(down1, down2.contiguous())
        return up, down

    @torch.no_grad()
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """See `Layer.delta`."""
        small, large = self._small_and_large()
        kronecker = torch.kron(small.reshape(*small.shape, *[1] * (large.ndim - 2)), large)
        return dora_delta(self.scale * kronecker, self.dora_scale, weight)

    def _small_and_large(self, device: str | None = None) -> tuple[Tensor, Tensor]:
        """The small and the larger factor, float32, contiguous; on the meta device for their shapes alone."""
        small = _whole_factor(self.w1, self.w1_a, self.w1_b, None, device)
        large = _whole_factor(self.w2, self.w2_a, self.w2_b, self.t2, device)
        return small, large


def _whole_factor(
    whole: Tensor | None, outer: Tensor | None, inner: Tensor | None, core: Tensor | None, device: str | None
) -> Tensor:
    """A factor that is whole, or the product of two and perhaps a core; float32, contiguous."""
    if whole is not None:
        return whole.to(device, torch.float32).contiguous()
    assert outer is not None
    assert inner is not None
    core = None if core is None else core.to(device)
    return product(outer.to(device), inner.to(device), core).contiguous()


def _split(
    whole: Tensor | None, outer: Tensor | None, inner: Tensor | None, core: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A factor as a product of two: its own two, or if it is whole, itself and the smaller identity."""
    if whole is None:
        assert outer is not None
        assert inner is not None
        return two_factors(outer, inner, core, 1.0)
    matrix = whole.float()
    if matrix.shape[0] <= matrix[0].numel():
        return torch.eye(matrix.shape[0], device=matrix.device), matrix
    identity = torch.eye(matrix[0].numel(), device=matrix.device)
    return matrix.flatten(1), identity.reshape(-1, *matrix.shape[1:])


def make_lokr(tensors: LayerTensors, alpha: float | None) -> LokrLayer:
    """A LoKr; see `make_layer`."""
    for side in ("1", "2"):
        whole = f"lokr_w{side}"
        outer = f"lokr_w{side}_a"
        inner = f"lokr_w{side}_b"
        if whole in tensors.tensors or tensors.tensors.keys().isdisjoint((outer, inner)):
            tensors.require(whole)
        else:
            tensors.require_factors(outer, inner, f"lokr_t{side}")
    small = [suffix for suffix in ("lokr_w1", "lokr_w1_a", "lokr_w1_b") if suffix in tensors.tensors]
    if any(tensors.tensors[suffix].ndim != 2 for suffix in small):
        raise tensors.shape_error(small, "but they should be matrices")
    layer = LokrLayer(alpha=0.0, **tensors.by_field())
    return replace(layer, alpha=float(layer.rank if alpha is None else alpha))
