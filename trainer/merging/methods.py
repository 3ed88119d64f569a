"""Ways to merge changes of one weight: pure functions, of weighted changes one change.

TIES, DARE and pruning are made of PEFT's functions. They look at the single numbers of a change and give a dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.seeding import seeded
from .deltas import NOISE, Delta, Truncation, total, truncate

_ROUNDING = 1e-10  # share of a change's energy that is left of it by rounding where nothing is

Weighted = Sequence[tuple[Delta, float]]


@dataclass(frozen=True)
class MergeOptions:
    """What a method may be told.

    Attributes:
        density: Share of the numbers that is kept, above 0 to 1.
        protected: Share of a change's energy whose inputs are protected from the others, above 0 to 1.
        seed: Of random numbers.
        name: Of the module, for random numbers.
    """

    density: float = 0.5
    protected: float = 1.0
    seed: int = 0
    name: str = ""


def weighted_sum(parts: Weighted, choice: MergeOptions) -> Delta:
    """Σ wᵢ Δᵢ, exact: factors are concatenated."""
    return total([change.times(weight) for change, weight in parts])


def ties(parts: Weighted, choice: MergeOptions) -> Delta:
    """TIES (Yadav et al. 2023): keep the largest numbers of each, elect a sign for each place, average those of it."""
    return _elected(_pruned(parts, choice, "magnitude"))


def magnitude_prune(parts: Weighted, choice: MergeOptions) -> Delta:
    """Keep the largest numbers of each change, and add up."""
    return weighted_sum(_pruned(parts, choice, "magnitude"), choice)


def dare(parts: Weighted, choice: MergeOptions) -> Delta:
    """DARE (Yu et al. 2024): drop numbers at random, scale the rest up to make up for them, and add up."""
    return weighted_sum(_pruned(parts, choice, "random"), choice)


def dare_ties(parts: Weighted, choice: MergeOptions) -> Delta:
    """DARE's dropping, then TIES' election of signs and average."""
    return _elected(_pruned(parts, choice, "random"))


def orthogonal(parts: Weighted, choice: MergeOptions) -> Delta:
    """Every change but the first leaves the inputs of those before it alone: Δ' = Δ (I − V Vᵀ), and the sum of all.

    V spans the inputs (row space) of the changes before, so that the first one works on its own inputs as it did
    alone. The projection of continual learning: Zeng et al. 2019 (OWM), Saha et al. 2021 (GPM).
    """
    kept: list[Delta] = []
    basis: Tensor | None = None
    for change, weight in parts:
        part = change if basis is None else _projected(change, basis)
        kept.append(part.times(weight))
        if part.inner(part) <= _ROUNDING * change.inner(change):
            continue
        inputs = _inputs(part, choice.protected, NOISE * change.inner(change) ** 0.5)
        basis = inputs if basis is None else torch.linalg.qr(torch.cat([basis, inputs], dim=1))[0]
    return total(kept)


def column_scaled(parts: Weighted, columns: Sequence[Tensor]) -> Delta:
    """ZipLoRA (Shah et al. 2023): Σ wᵢ Δᵢ diag(mᵢ), a coefficient for each input of each change.

    Args:
        parts: The weighted changes, (out, in·k·k) as matrices.
        columns: Of each change its coefficients mᵢ, (in,).
    """
    scaled = []
    for (change, weight), column in zip(parts, columns, strict=True):
        rows = change.up if change.down is None else change.down
        inside = rows.reshape(len(rows), len(column), -1) * column.to(rows.device, torch.float32)[:, None]
        turned = inside.reshape(rows.shape)
        part = Delta(change.shape, turned) if change.down is None else Delta(change.shape, change.up, turned)
        scaled.append(part.times(weight))
    return total(scaled)


Method = Callable[[Weighted, MergeOptions], Delta]
METHODS: dict[str, Method] = {
    "sum": weighted_sum,
    "svd": weighted_sum,  # and then reduced, as all but "sum" and "orthogonal" are
    "ties": ties,
    "dare": dare,
    "dare-ties": dare_ties,
    "prune": magnitude_prune,
    "orthogonal": orthogonal,
}


def _pruned(parts: Weighted, choice: MergeOptions, method: Literal["magnitude", "random"]) -> Weighted:
    """Dense changes of which a share is kept: the largest numbers, or random ones, then scaled up.

    Which numbers are random depends on seed, module and change, not on the order of the changes.
    """
    from peft.utils.merge_utils import prune

    if choice.density >= 1:
        return [(Delta(change.shape, change.dense()), weight) for change, weight in parts]
    found = []
    for change, weight in parts:
        dense = change.dense()
        with seeded(dense.device, choice.seed, "dare", choice.name, f"{change.inner(change):.5e}"):
            kept = prune(dense, choice.density, method)
        if method == "random":
            kept = kept / choice.density  # PEFT can do so, too, but 0.13 forgets it
        found.append((Delta(change.shape, kept), weight))
    return found


def _elected(parts: Weighted) -> Delta:
    """For each place the mean of the weighted numbers that have the sign of the majority."""
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    dense = torch.stack([change.dense() for change, _ in parts])
    weights = torch.tensor([weight for _, weight in parts], device=dense.device)
    signs = calculate_majority_sign_mask(dense)
    shape = max((change.shape for change, _ in parts), key=len)
    merged: Tensor = disjoint_merge(dense * weights.view(-1, 1, 1), signs)
    return Delta(shape, merged)


def _projected(change: Delta, basis: Tensor) -> Delta:
    """The change without what it does to inputs in the span of `basis` (in·k·k, n), orthonormal columns."""
    rows, basis = (change.up if change.down is None else change.down).double(), basis.double()
    free = (rows - (rows @ basis) @ basis.T).float()
    return Delta(change.shape, free) if change.down is None else Delta(change.shape, change.up, free)


def _inputs(change: Delta, energy: float, floor: float) -> Tensor:
    """Orthonormal inputs (in·k·k, n) that a change responds to, the strongest that make up a share of its energy."""
    down = truncate(change, Truncation(energy=energy, floor=floor)).down
    assert down is not None
    lengths: Tensor = torch.linalg.vector_norm(down, dim=1, keepdim=True)
    return (down / lengths).T
