"""Changes of weights as matrices: a product of two factors where that is known, dense otherwise. Pure linear algebra.

A convolution's change (out, in, k, k) is the matrix (out, in·k·k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapters.layers import DifferenceLayer, Layer, LoraLayer
from ..adapters.layers.base import balanced

_WHOLE = 768  # up to this size of a matrix's smaller side its whole decomposition is computed
_SINGULAR = 1e-14  # of a Gram matrix's largest eigenvalue; what is below is float64's rounding
NOISE = 32 * torch.finfo(torch.float32).eps  # of the largest singular value; what is below is rounding


@dataclass(frozen=True)
class Delta:
    """What is added to one weight.

    Attributes:
        shape: The weight's, (out, in) or (out, in, k, k).
        up: (out, rank), or the change itself, (out, in·k·k), if there is no `down`; float32.
        down: (rank, in·k·k), float32; None for a dense change.
    """

    shape: tuple[int, ...]
    up: Tensor
    down: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of the product; of a dense change the highest possible."""
        return min(self.up.shape) if self.down is None else self.down.shape[0]

    @property
    def size(self) -> int:
        """How many numbers are held."""
        return self.up.numel() + (0 if self.down is None else self.down.numel())

    def dense(self) -> Tensor:
        """The matrix (out, in·k·k)."""
        return self.up if self.down is None else self.up @ self.down

    def times(self, factor: float) -> Delta:
        """The change, scaled."""
        return replace(self, up=self.up * factor)

    def inner(self, other: Delta) -> float:
        """Frobenius' inner product, without the products of factors."""
        if other.down is None:
            self, other = other, self
        if other.down is None:
            return float((self.up * other.up).sum(dtype=torch.float64))
        if self.down is None:
            return float(((other.up.T @ self.up) * other.down).sum(dtype=torch.float64))
        return float(((other.up.T @ self.up) * (other.down @ self.down.T)).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Truncation:
    """How far a change is reduced; every limit holds.

    Attributes:
        rank: Highest rank; None for no limit.
        energy: Share of the squared norm that is kept at least, above 0 to 1.
        ratio: Highest ratio of the largest singular value to the smallest one that is kept; None for no limit.
        floor: Singular values up to this one are left out.
    """

    rank: int | None = None
    energy: float = 1.0
    ratio: float | None = None
    floor: float = 0.0


def to_delta(layer: Layer, shape: Sequence[int] | None = None, weight: Tensor | None = None) -> Delta:
    """What a layer adds.

    Args:
        layer: A layer of any kind.
        shape: The weight's, where the layer's own does not tell the kernel; None for the layer's.
        weight: For layers that need it.

    Raises:
        AdapterError: The layer needs its weight and has none.
    """
    given = None if layer.needs_weight else layer.factors()
    if given is None:
        dense = layer.delta(weight)
        return Delta(tuple(shape or dense.shape), dense.flatten(1))
    up, down = given
    known = tuple(shape or (up.shape[0], *down.shape[1:]))
    factored = Delta(known, up.flatten(1), down.flatten(1))
    if isinstance(layer, LoraLayer) or factored.size < up.shape[0] * down[0].numel():
        return factored
    return Delta(known, factored.dense())


def total(changes: Sequence[Delta]) -> Delta:
    """The sum of changes of one weight: by concatenation, which is exact, where all are products of factors."""
    shape = max((one.shape for one in changes), key=len)  # a kernel of 1×1 may be left out
    downs = [one.down for one in changes if one.down is not None]
    if len(downs) < len(changes):
        return Delta(shape, torch.stack([one.dense() for one in changes]).sum(dim=0))
    return Delta(shape, torch.cat([one.up for one in changes], dim=1), torch.cat(downs))


def truncate(change: Delta, cut: Truncation) -> Delta:
    """The nearest change of lower rank (Eckart & Young 1936), factored, singular values shared evenly by the factors.

    A product of factors is decomposed by way of orthonormal bases of its factors, without being multiplied out. Of a
    large dense change only the leading part is computed.
    """
    energy = change.inner(change)
    if not energy:
        inside = change.up.shape[1] if change.down is None else change.down.shape[1]
        return Delta(change.shape, change.up.new_zeros(len(change.up), 1), change.up.new_zeros(1, inside))
    left, values, right = _singular(change, cut)
    rank = _kept(values, cut, energy)
    root = values[:rank].sqrt()
    return Delta(change.shape, left[:, :rank] * root, root[:, None] * right[:rank])


def _singular(change: Delta, cut: Truncation) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors (out, n), singular values (n,), right vectors (n, in·k·k), as far as the cut needs them."""
    if change.down is not None and change.rank < min(change.up.shape[0], change.down.shape[1]):
        left, left_core = _orthonormal(change.up)
        right, right_core = _orthonormal(change.down.T)
        inner_left, values, inner_right = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
        end = cut.rank or len(values)
        return (left @ inner_left[:, :end]).float(), values.float(), (inner_right[:end] @ right.T).float()
    matrix = change.dense()
    if min(matrix.shape) <= _WHOLE or cut.rank is None:
        return torch.linalg.svd(matrix, full_matrices=False)  # type: ignore[no-any-return]
    if matrix.shape[0] <= matrix.shape[1]:
        return _leading(matrix, cut.rank)
    right, values, left = _leading(matrix.T, cut.rank)
    return left.T, values, right.T


def _orthonormal(factor: Tensor) -> tuple[Tensor, Tensor]:
    """A factor (n, rank) as orthonormal columns (n, m) times a core (m, rank), float64.

    From the eigenvectors of its Gram matrix: many times faster than Householder's QR for tall factors, and what float64
    loses to the squared condition is far below float32's rounding.
    """
    tall = factor.double()
    squares, vectors = torch.linalg.eigh(tall.T @ tall)
    there = squares > _SINGULAR * squares[-1]
    lengths, vectors = squares[there].sqrt(), vectors[:, there]
    return tall @ (vectors / lengths), lengths[:, None] * vectors.T


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors and values of a wide matrix, from the eigenvectors of its Gram matrix in float64."""
    wide = matrix.double()
    _, vectors = torch.linalg.eigh(wide @ wide.T)
    left = vectors.flip(1)[:, :rank]
    right = left.T @ wide
    values = torch.linalg.vector_norm(right, dim=1)
    return left.float(), values.float(), (right / values.clamp(min=1e-300)[:, None]).float()


def _kept(values: Tensor, cut: Truncation, energy: float) -> int:
    """How many singular values are kept; one at least, none that is rounding noise."""
    found = values.double()
    noise = max(NOISE * float(found[0]), cut.floor)
    count = int((found > noise).sum())
    if cut.energy < 1:
        count = min(count, int((found.square().cumsum(0) < cut.energy * energy).sum()) + 1)
    if cut.ratio is not None:
        count = min(count, int((found * cut.ratio >= found[0]).sum()))
    return max(1, min(count, cut.rank or count))


def to_layer(change: Delta) -> LoraLayer | DifferenceLayer:
    """The layer of a change: a LoRA whose alpha equals its rank, or a full difference if it is dense."""
    out, inside, *kernel = change.shape
    if change.down is None:
        return DifferenceLayer(change.up.reshape(change.shape).contiguous())
    up, down = balanced(change.up, change.down)
    down = down.reshape(-1, inside, *kernel).contiguous()
    return LoraLayer(down, up.reshape(out, -1, *[1] * len(kernel)).contiguous(), float(len(down)))


def nearest_lora(change: Tensor, rank: int) -> LoraLayer:
    """The LoRA of at most that rank whose product is nearest to a change of a weight.

    Args:
        change: (out, in) or (out, in, k, k).
        rank: Highest rank.

    Returns:
        Both factors float32; alpha equal to the rank.
    """
    layer = to_layer(truncate(Delta(tuple(change.shape), change.float().flatten(1)), Truncation(rank)))
    assert isinstance(layer, LoraLayer)
    return layer
