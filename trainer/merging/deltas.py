"""Weight deltas as matrices: a product of two factors where that is known, dense otherwise. Pure linear algebra.

A convolution's delta (out, in, k, k) is the matrix (out, in·k·k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapters.layers import FullLayer, Layer, LoraLayer
from ..adapters.layers.base import balanced
from ..core.errors import NotFiniteError
from ..core.tensor_files import is_finite

_FULL_SVD_SIZE = 768  # up to this size of a matrix's smaller side its full decomposition is computed
_EIGENVALUE_ROUNDING = 1e-14  # share of a Gram matrix's largest eigenvalue; what is below is float64's rounding
RELATIVE_ROUNDING = 32 * torch.finfo(torch.float32).eps  # share of the largest singular value; below it is rounding


@dataclass(frozen=True)
class Delta:
    """What is added to one weight.

    Attributes:
        shape: The weight's, (out, in) or (out, in, k, k).
        up: (out, rank), or the delta itself, (out, in·k·k), if there is no `down`; float32.
        down: (rank, in·k·k), float32; None for a dense delta.
    """

    shape: tuple[int, ...]
    up: Tensor
    down: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of the product; of a dense delta the highest possible."""
        return min(self.up.shape) if self.down is None else self.down.shape[0]

    @property
    def size(self) -> int:
        """The number of stored values."""
        return self.up.numel() + (0 if self.down is None else self.down.numel())

    def dense(self) -> Tensor:
        """The matrix (out, in·k·k)."""
        return self.up if self.down is None else self.up @ self.down

    def times(self, factor: float) -> Delta:
        """The delta, scaled."""
        return replace(self, up=self.up * factor)

    def require_finite(self, name: str) -> Delta:
        """The delta, checked for NaN and infinite values.

        Args:
            name: The module's, for the message.

        Raises:
            NotFiniteError: There are some.
        """
        if all(is_finite(part) for part in (self.up, self.down) if part is not None):
            return self
        raise NotFiniteError(f"The change to {name} has NaN or infinite values.", "Use lower strengths or other files.")

    def inner(self, other: Delta) -> float:
        """Frobenius inner product, without multiplying out the factors."""
        if other.down is None:
            if self.down is not None:
                return other.inner(self)
            return float((self.up * other.up).sum(dtype=torch.float64))
        if self.down is None:
            return float(((other.up.T @ self.up) * other.down).sum(dtype=torch.float64))
        return float(((other.up.T @ self.up) * (other.down @ self.down.T)).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Truncation:
    """How far the rank of a delta is reduced; all limits apply.

    Attributes:
        rank: Highest rank; None for no limit.
        energy: Minimum share of the squared norm to keep, in (0, 1].
        ratio: Highest ratio of the largest to the smallest kept singular value; None for no limit.
        floor: Singular values up to this one are dropped.
    """

    rank: int | None = None
    energy: float = 1.0
    ratio: float | None = None
    floor: float = 0.0


def to_delta(layer: Layer, shape: Sequence[int] | None = None, weight: Tensor | None = None) -> Delta:
    """What a layer adds to its module's weight.

    Args:
        layer: A layer of any kind.
        shape: The weight's, where the layer's own lacks the kernel; None for the layer's.
        weight: The weight, for layers that need it.

    Raises:
        AdapterError: The layer needs its weight and has none.
    """
    factors = None if layer.needs_weight else layer.factors()
    if factors is None:
        dense = layer.delta(weight)
        return Delta(tuple(shape or dense.shape), dense.flatten(1))
    up, down = factors
    full_shape = tuple(shape or (up.shape[0], *down.shape[1:]))
    factored = Delta(full_shape, up.flatten(1), down.flatten(1))
    if isinstance(layer, LoraLayer) or factored.size < up.shape[0] * down[0].numel():
        return factored
    return Delta(full_shape, factored.dense())


def sum_deltas(deltas: Sequence[Delta]) -> Delta:
    """The sum of deltas of one weight: by concatenation, which is exact, where all are products of factors."""
    shape = max((delta.shape for delta in deltas), key=len)  # a kernel of 1×1 may be left out
    downs = [delta.down for delta in deltas if delta.down is not None]
    if len(downs) < len(deltas):
        return Delta(shape, torch.stack([delta.dense() for delta in deltas]).sum(dim=0))
    return Delta(shape, torch.cat([delta.up for delta in deltas], dim=1), torch.cat(downs))


def truncate(delta: Delta, truncation: Truncation) -> Delta:
    """The nearest delta of lower rank (Eckart & Young 1936), factored, singular values shared evenly by the factors.

    A product of factors is decomposed by way of orthonormal bases of its factors, without being multiplied out. Of a
    large dense delta only the leading part is computed.
    """
    energy = delta.inner(delta)
    if not energy:
        columns = delta.up.shape[1] if delta.down is None else delta.down.shape[1]
        return Delta(delta.shape, delta.up.new_zeros(len(delta.up), 1), delta.up.new_zeros(1, columns))
    left, values, right = _svd(delta, truncation.rank)
    rank = _kept_rank(values, truncation, energy)
    root = values[:rank].sqrt()
    return Delta(delta.shape, left[:, :rank] * root, root[:, None] * right[:rank])


def _svd(delta: Delta, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors (out, n), singular values (m,), right vectors (n, in·k·k); n is at least `rank` or, if None, m."""
    if delta.down is not None and delta.rank < min(delta.up.shape[0], delta.down.shape[1]):
        left_basis, left_core = _orthonormal(delta.up)
        right_basis, right_core = _orthonormal(delta.down.T)
        left, values, right = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
        end = rank or len(values)
        return (left_basis @ left[:, :end]).float(), values.float(), (right[:end] @ right_basis.T).float()
    matrix = delta.dense()
    if min(matrix.shape) <= _FULL_SVD_SIZE or rank is None:
        return torch.linalg.svd(matrix, full_matrices=False)  # type: ignore[no-any-return]
    if matrix.shape[0] <= matrix.shape[1]:
        return _leading_svd(matrix, rank)
    right, values, left = _leading_svd(matrix.T, rank)
    return left.T, values, right.T


def _orthonormal(factor: Tensor) -> tuple[Tensor, Tensor]:
    """A factor (n, rank) as orthonormal columns (n, m) times a core (m, rank), float64.

    From the eigenvectors of its Gram matrix: many times faster than Householder's QR for tall factors, and what float64
    loses to the squared condition is far below float32's rounding.
    """
    tall = factor.double()
    eigenvalues, eigenvectors = torch.linalg.eigh(tall.T @ tall)
    significant = eigenvalues > _EIGENVALUE_ROUNDING * eigenvalues[-1]
    norms = eigenvalues[significant].sqrt()
    eigenvectors = eigenvectors[:, significant]
    return tall @ (eigenvectors / norms), norms[:, None] * eigenvectors.T


def _leading_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a wide matrix and their vectors, from its Gram matrix's eigenvectors, float64."""
    wide = matrix.double()
    _, eigenvectors = torch.linalg.eigh(wide @ wide.T)
    left = eigenvectors.flip(1)[:, :rank]
    right = left.T @ wide
    values = torch.linalg.vector_norm(right, dim=1)
    return left.float(), values.float(), (right / values.clamp(min=1e-300)[:, None]).float()


def _kept_rank(values: Tensor, truncation: Truncation, energy: float) -> int:
    """How many singular values are kept; one at least, none that is rounding.

    Args:
        values: (m,), the largest first.
        truncation: The limits.
        energy: Squared norm of the whole delta.
    """
    singular_values = values.double()
    largest = singular_values[0]
    floor = max(RELATIVE_ROUNDING * float(largest), truncation.floor)
    rank = int((singular_values > floor).sum())
    if truncation.energy < 1:
        insufficient = singular_values.square().cumsum(0) < truncation.energy * energy
        rank = min(rank, int(insufficient.sum()) + 1)
    if truncation.ratio is not None:
        rank = min(rank, int((singular_values * truncation.ratio >= largest).sum()))
    if truncation.rank:
        rank = min(rank, truncation.rank)
    return max(1, rank)


def to_layer(delta: Delta) -> LoraLayer | FullLayer:
    """The layer of a delta: a LoRA with alpha equal to its rank, or a full difference if it is dense."""
    outputs, inputs, *kernel = delta.shape
    if delta.down is None:
        return FullLayer(delta.up.reshape(delta.shape).contiguous())
    up, down = balanced(delta.up, delta.down)
    rank = len(down)
    return LoraLayer(
        down=down.reshape(rank, inputs, *kernel).contiguous(),
        up=up.reshape(outputs, rank, *[1] * len(kernel)).contiguous(),
        alpha=float(rank),
    )


def nearest_lora(delta: Tensor, rank: int) -> LoraLayer:
    """The LoRA of at most that rank that is nearest to a weight's delta.

    Args:
        delta: (out, in) or (out, in, k, k).
        rank: Highest rank.

    Returns:
        Both factors float32; alpha equal to the rank.
    """
    dense = Delta(tuple(delta.shape), delta.float().flatten(1))
    layer = to_layer(truncate(dense, Truncation(rank)))
    assert isinstance(layer, LoraLayer)
    return layer
