"""Changes of weights as matrices: a product of two factors where that is known, dense otherwise. Pure linear algebra.

A convolution's change (out, in, k, k) is the matrix (out, in·k·k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layers import DifferenceLayer, Layer, LoraLayer
from .randomness import seeded

_EXACT = 768  # up to this size of a matrix's smaller side its whole decomposition is computed
_EXTRA, _ITERATIONS = 16, 6


@dataclass(frozen=True)
class Change:
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

    def times(self, factor: float) -> Change:
        """The change, scaled."""
        return replace(self, up=self.up * factor)

    def inner(self, other: Change) -> float:
        """Frobenius' inner product, without the products of factors."""
        if other.down is None:
            self, other = other, self
        if other.down is None:
            return float((self.up * other.up).sum(dtype=torch.float64))
        if self.down is None:
            return float(((other.up.T @ self.up) * other.down).sum(dtype=torch.float64))
        return float(((other.up.T @ self.up) * (other.down @ self.down.T)).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Cut:
    """How far a change is reduced; every limit holds.

    Attributes:
        rank: Highest rank; None for no limit.
        energy: Share of the squared norm that is kept at least, above 0 to 1.
        ratio: Highest ratio of the largest singular value to the smallest one that is kept; None for no limit.
    """

    rank: int | None = None
    energy: float = 1.0
    ratio: float | None = None


def change_of(layer: Layer, shape: Sequence[int] | None = None, weight: Tensor | None = None) -> Change:
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
        return Change(tuple(shape or dense.shape), dense.flatten(1))
    up, down = given
    known = tuple(shape or (up.shape[0], *down.shape[1:]))
    factored = Change(known, up.flatten(1), down.flatten(1))
    if isinstance(layer, LoraLayer) or factored.size < up.shape[0] * down[0].numel():
        return factored
    return Change(known, factored.dense())


def total(changes: Sequence[Change]) -> Change:
    """The sum of changes of one weight: by concatenation, which is exact, where all are products of factors."""
    shape = max((one.shape for one in changes), key=len)  # a kernel of 1×1 may be left out
    downs = [one.down for one in changes if one.down is not None]
    if len(downs) < len(changes):
        return Change(shape, torch.stack([one.dense() for one in changes]).sum(dim=0))
    return Change(shape, torch.cat([one.up for one in changes], dim=1), torch.cat(downs))


def reduced(change: Change, cut: Cut) -> Change:
    """The nearest change of lower rank (Eckart & Young 1936), factored, singular values shared evenly by the factors.

    A product of factors is decomposed by way of its factors' QR decompositions, exactly. Of a large dense change only
    the leading part is computed, by a randomised algorithm (Halko et al. 2011), always with the same random numbers.
    """
    left, values, right = _singular(change, cut)
    rank = _kept(values, cut, change.inner(change))
    root = values[:rank].sqrt()
    return Change(change.shape, left[:, :rank] * root, root[:, None] * right[:rank])


def _singular(change: Change, cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors (out, n), singular values (n,), right vectors (n, in·k·k), as far as the cut needs them."""
    if change.down is not None and change.rank < min(change.up.shape[0], change.down.shape[1]):
        left, left_core = torch.linalg.qr(change.up)
        right, right_core = torch.linalg.qr(change.down.T)
        inner_left, values, inner_right = torch.linalg.svd(left_core @ right_core.T)
        return left @ inner_left, values, inner_right @ right.T
    matrix = change.dense()
    smaller = min(matrix.shape)
    if smaller <= _EXACT or cut.rank is None or cut.rank + _EXTRA >= smaller:
        return torch.linalg.svd(matrix, full_matrices=False)  # type: ignore[no-any-return]
    with seeded(matrix.device, "nearest lora"):
        left, values, turned = torch.svd_lowrank(matrix, q=cut.rank + _EXTRA, niter=_ITERATIONS)
    return left, values, turned.T


def _kept(values: Tensor, cut: Cut, energy: float) -> int:
    """How many singular values are kept; one at least, none that is rounding noise."""
    found = values.double()
    noise = torch.finfo(torch.float32).eps * found[0]
    count = int((found > noise).sum())
    if cut.energy < 1:
        count = min(count, int((found.square().cumsum(0) < cut.energy * energy).sum()) + 1)
    if cut.ratio is not None:
        count = min(count, int((found * cut.ratio >= found[0]).sum()))
    return max(1, min(count, cut.rank or count))


def layer_of(change: Change) -> LoraLayer | DifferenceLayer:
    """The layer of a change: a LoRA whose alpha equals its rank, or a full difference if it is dense."""
    out, inside, *kernel = change.shape
    if change.down is None:
        return DifferenceLayer(change.up.reshape(change.shape).contiguous())
    down = change.down.reshape(-1, inside, *kernel).contiguous()
    return LoraLayer(down, change.up.reshape(out, -1, *[1] * len(kernel)).contiguous(), float(len(down)))


def nearest_lora(change: Tensor, rank: int) -> LoraLayer:
    """The LoRA of at most that rank whose product is nearest to a change of a weight.

    Args:
        change: (out, in) or (out, in, k, k).
        rank: Highest rank.

    Returns:
        Both factors float32; alpha equal to the rank.
    """
    layer = layer_of(reduced(Change(tuple(change.shape), change.float().flatten(1)), Cut(rank)))
    assert isinstance(layer, LoraLayer)
    return layer
