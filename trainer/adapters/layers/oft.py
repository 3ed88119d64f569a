"""OFT (Qiu et al. 2023, arXiv 2306.07280) and BOFT (Liu et al. 2024, arXiv 2311.06243), as in kohya and LyCORIS.

A weight's rows are rotated in blocks: Δ = rescale · R W − W, R from skew-symmetric Q by the Cayley transform.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        blocks: (blocks, size, size); of BOFT (factors, blocks, size, size), the butterfly factors in order.
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

    def without_limit(self) -> OftLayer:
        """The same rotation with blocks already within the limit, and no limit."""
        blocks = self.blocks.float()
        norm = float(torch.linalg.vector_norm(blocks - blocks.transpose(-1, -2)))
        limit = self.alpha * self.shape[0]
        return replace(self, blocks=blocks * limit / norm if 0 < limit < norm else blocks, alpha=0.0)

    @torch.no_grad()
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """See `Layer.delta`."""
        weight = require_weight(weight, self.kind)
        if weight.shape[0] != self.shape[0]:
            raise AdapterError(
                f"The {self.kind} for {self.shape[0]} outputs does not fit a weight of shape {tuple(weight.shape)}.",
                "Use an adapter made for a model of this size.",
            )
        original = weight.to(self.blocks.device, torch.float32)
        delta = rotation_delta(rotations_less_identity(self.blocks.float(), self.alpha * self.shape[0]), original)
        if self.rescale is None:
            return delta
        rescale = self.rescale.float().reshape(-1, *[1] * (weight.ndim - 1))
        return rescale * delta + (rescale - 1) * original


def rotations_less_identity(blocks: Tensor, limit: float = 0.0) -> Tensor:
    """The Cayley transforms of all blocks less the identity, R − 1 = 2 Q (1 − Q)⁻¹ with Q = blocks − blocksᵀ.

    So a small rotation, as with limits of 1e-3 and less, is not lost to rounding.

    Args:
        blocks: (…, size, size), float32.
        limit: The largest norm of Q, over all blocks; 0: none.

    Returns:
        Of the shape of `blocks`.
    """
    skew = blocks - blocks.transpose(-1, -2)
    if limit > 0:
        norm = torch.linalg.vector_norm(skew) + _TINY
        if norm > limit:
            skew = skew * limit / norm
    identity = torch.eye(skew.shape[-1], device=skew.device)
    # 1 − Q can always be inverted, so CUDA need not be waited for to hear it
    rotations: Tensor = torch.linalg.solve_ex(identity - skew, 2 * skew, left=False)[0]
    return rotations


def rotation_delta(rotations: Tensor, rows: Tensor) -> Tensor:
    """The change by rotations to the rows of a weight, or to the outputs of its module: R y − y.

    Args:
        rotations: From `rotations_less_identity`: (blocks, size, size), or of BOFT (factors, blocks, size, size).
        rows: (blocks · size, …), of the type of `rotations`.
    """
    if rotations.ndim == 3:
        return _rotated(rotations.transpose(1, 2), rows)
    delta = torch.zeros_like(rows)
    for level, rotation in enumerate(rotations):
        group = 2**level * (rotations.shape[-1] // 2)
        shuffled = _swapped(rows + delta, 2, group)
        delta = delta + _swapped(_rotated(rotation, shuffled), group, 2)
    return delta


def block_size(outputs: int, largest: int, *, butterfly: bool) -> int:
    """The largest block size that divides the number of outputs, as LyCORIS derives it from `lora_dim`.

    Args:
        outputs: Of the module.
        largest: The block has at most this size.
        butterfly: Whether it is for BOFT, which has even block sizes and a power of two of blocks.

    Returns:
        2 or more; 0 if there is no such block size.
    """
    sizes = (size for size in range(min(largest, outputs), 1, -1) if outputs % size == 0)
    return next((size for size in sizes if not butterfly or _is_butterfly(outputs, size)), 0)


def butterfly_factors(outputs: int, size: int) -> int:
    """Number of factors of a BOFT in which all outputs interact: log₂(blocks) + 1, as in LyCORIS."""
    return (outputs // size).bit_length()


def _is_butterfly(outputs: int, size: int) -> bool:
    return size % 2 == 0 and (outputs // size).bit_count() == 1


def _rotated(rotation: Tensor, rows: Tensor) -> Tensor:
    """Blocks of rows (blocks · size, …), each multiplied by its own matrix (blocks, size, size) from the left."""
    blocks = rows.reshape(*rotation.shape[:2], *rows.shape[1:])
    return torch.einsum("kmn,kn...->km...", rotation, blocks).flatten(0, 1)


def _swapped(rows: Tensor, first: int, second: int) -> Tensor:
    """Rows numbered (…, first, second) renumbered (…, second, first)."""
    return rows.reshape(-1, first, second, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)


def make_oft(tensors: LayerTensors, alpha: float | None) -> OftLayer:
    """An OFT; see `make_layer`."""
    blocks = tensors.require("oft_blocks")
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise tensors.shape_error(["oft_blocks"], "but they should be square blocks")
    layer = OftLayer(alpha=alpha or 0.0, **tensors.by_field())
    if layer.kind == "BOFT" and (layer.rank % 2 or layer.shape[0] % (2 ** (len(blocks) - 1) * layer.rank)):
        raise tensors.shape_error(["oft_blocks"], "which are not butterfly factors")
    if layer.rescale is not None and layer.rescale.numel() != layer.shape[0]:
        raise tensors.shape_error(["oft_blocks", "rescale"], "which don't fit")
    return layer
