"""OFT (Qiu et al. 2023, arXiv 2306.07280) and BOFT (Liu et al. 2024, arXiv 2311.06243), as kohya and LyCORIS have them.

A weight's rows are rotated in blocks: Δ = rescale · R W − W, R from skew-symmetric Q by the Cayley transform.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import AdapterError
from .base import LayerTensors, require_weight, tensors_by_suffix

SUFFIXES = ("oft_blocks", "rescale")
_TINY = 1e-8  # LyCORIS's


@dataclass(frozen=True)
class OftLayer:
    """Rotations of blocks of a weight's rows.

    Attributes:
        blocks: (blocks, size, size); of BOFT (factors, blocks, size, size), butterfly factors one after the other.
        alpha: Limit for the norm of Q, in units of the number of outputs; 0: no limit.
        rescale: (out, 1[, 1, 1]), a factor of each output; None without.
    """

    blocks: Tensor
    alpha: float
    rescale: Tensor | None = None

    @property
    def rank(self) -> int:
        """Size of a block."""
        return self.blocks.shape[-1]

    @property
    def kind(self) -> str:
        """OFT or BOFT."""
        return "OFT" if self.blocks.ndim == 3 else "BOFT"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out,): the number of inputs is not known without the weight."""
        return (self.blocks.shape[-3] * self.blocks.shape[-1],)

    @property
    def needs_weight(self) -> bool:
        """Always."""
        return True

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under LyCORIS's names."""
        return tensors_by_suffix(self, SUFFIXES)

    def factors(self) -> None:
        """See `Layer.factors`; a rotation is not low-rank."""

    @torch.no_grad()
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """See `Layer.delta`."""
        weight = require_weight(weight, self.kind)
        if weight.shape[0] != self.shape[0]:
            raise AdapterError(
                f"An {self.kind} for {self.shape[0]} outputs doesn't fit a weight of {tuple(weight.shape)}.",
                "Use an adapter that was made for a model of this shape.",
            )
        original = weight.to(self.blocks.device, torch.float32)
        rotations = self._rotations_less_identity()
        if rotations.ndim == 3:
            delta = _rotated(rotations.transpose(1, 2), original)
        else:
            delta = torch.zeros_like(original)
            for level, rotation in enumerate(rotations):
                group = 2**level * (self.rank // 2)
                shuffled = _swapped(original + delta, 2, group)
                delta = delta + _swapped(_rotated(rotation, shuffled), group, 2)
        if self.rescale is None:
            return delta
        rescale = self.rescale.float().reshape(-1, *[1] * (weight.ndim - 1))
        return rescale * delta + (rescale - 1) * original

    def _rotations_less_identity(self) -> Tensor:
        """The Cayley transforms of all blocks less the identity, R − 1 = 2 Q (1 − Q)⁻¹, of the shape of `blocks`.

        So a small rotation, as limits of 1e-3 and less allow, is not lost in rounding.
        """
        blocks = self.blocks.float()
        skew = blocks - blocks.transpose(-1, -2)
        limit = self.alpha * self.shape[0]
        norm = torch.linalg.vector_norm(skew) + _TINY
        if 0 < limit < norm:
            skew = skew * limit / norm
        identity = torch.eye(self.rank, device=blocks.device)
        rotations: Tensor = torch.linalg.solve(identity - skew, 2 * skew, left=False)
        return rotations


def _rotated(rotation: Tensor, weight: Tensor) -> Tensor:
    """Blocks of rows (blocks · size, …), each multiplied by its own matrix (blocks, size, size) from the left."""
    rows = weight.reshape(*rotation.shape[:2], *weight.shape[1:])
    return torch.einsum("kmn,kn...->km...", rotation, rows).flatten(0, 1)


def _swapped(weight: Tensor, first: int, second: int) -> Tensor:
    """Rows numbered (…, first, second) renumbered (…, second, first)."""
    return weight.reshape(-1, first, second, *weight.shape[1:]).transpose(1, 2).flatten(0, 2)


def make_oft(tensors: LayerTensors, alpha: float | None) -> OftLayer:
    """An OFT; see `make_layer`."""
    blocks = tensors.require("oft_blocks")
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise tensors.shape_error(["oft_blocks"], "but should be square blocks")
    layer = OftLayer(alpha=alpha or 0.0, **tensors.by_field())
    if layer.kind == "BOFT" and (layer.rank % 2 or layer.shape[0] % (2 ** (len(blocks) - 1) * layer.rank)):
        raise tensors.shape_error(["oft_blocks"], "which are no butterfly factors")
    if layer.rescale is not None and layer.rescale.numel() != layer.shape[0]:
        raise tensors.shape_error(["oft_blocks", "rescale"], "which don't fit")
    return layer
