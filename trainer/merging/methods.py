"""Methods of merging: pure functions from the weighted deltas of one weight to one delta.

TIES, DARE and pruning use PEFT's functions. They work on the elements of a delta and return a dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.seeding import seeded
from .deltas import RELATIVE_ROUNDING, Delta, Truncation, sum_deltas, truncate

_ENERGY_ROUNDING = 1e-10  # share of a delta's energy that rounding leaves of it where a projection leaves nothing

WeightedDeltas = Sequence[tuple[Delta, float]]


@dataclass(frozen=True)
class MergeOptions:
    """The options of the methods; each uses some of them.

    Attributes:
        density: Share of the elements to keep, in (0, 1].
        protected: Share of a delta's energy whose inputs are protected from the others, in (0, 1].
        seed: Of random numbers.
        name: Of the module, for random numbers.
    """

    density: float
    protected: float
    seed: int
    name: str


def weighted_sum(deltas: WeightedDeltas, options: MergeOptions) -> Delta:
    """Σ wᵢ Δᵢ, exact: factors are concatenated."""
    return sum_deltas([delta.times(weight) for delta, weight in deltas])


def ties(deltas: WeightedDeltas, options: MergeOptions) -> Delta:
    """TIES (Yadav et al. 2023): keep each delta's largest elements, elect their signs, average those that agree."""
    return _elected(_pruned(deltas, options, "magnitude"))


def magnitude_prune(deltas: WeightedDeltas, options: MergeOptions) -> Delta:
    """Keep the largest elements of each delta, and add up."""
    return weighted_sum(_pruned(deltas, options, "magnitude"), options)


def dare(deltas: WeightedDeltas, options: MergeOptions) -> Delta:
    """DARE (Yu et al. 2024): drop elements at random, scale up the rest to compensate, and add up."""
    return weighted_sum(_pruned(deltas, options, "random"), options)


def dare_ties(deltas: WeightedDeltas, options: MergeOptions) -> Delta:
    """DARE's dropping, then TIES' election of signs and average."""
    return _elected(_pruned(deltas, options, "random"))


def orthogonal(deltas: WeightedDeltas, options: MergeOptions) -> Delta:
    """Project every delta but the first away from the inputs of those before it: Δ' = Δ (I − V Vᵀ), and the sum of all.

    V spans the inputs (row space) of the deltas before, so that the first one acts on its own inputs as it does
    alone. The projection of continual learning: Zeng et al. 2019 (OWM), Saha et al. 2021 (GPM).
    """
    projected: list[Delta] = []
    basis: Tensor | None = None
    for delta, weight in deltas:
        free = delta if basis is None else _projected(delta, basis)
        projected.append(free.times(weight))
        if free.inner(free) <= _ENERGY_ROUNDING * delta.inner(delta):
            continue
        inputs = _inputs(free, options.protected, RELATIVE_ROUNDING * delta.inner(delta) ** 0.5)
        basis = inputs if basis is None else torch.linalg.qr(torch.cat([basis, inputs], dim=1))[0]
    return sum_deltas(projected)


def column_scaled(deltas: WeightedDeltas, columns: Sequence[Tensor]) -> Delta:
    """ZipLoRA (Shah et al. 2023): Σ wᵢ Δᵢ diag(mᵢ), a coefficient for each input of each delta.

    Args:
        deltas: The deltas with their weights, (out, in·k·k) as matrices.
        columns: Of each delta its coefficients mᵢ, (in,).
    """
    scaled = []
    for (delta, weight), coefficients in zip(deltas, columns, strict=True):
        rows = delta.up if delta.down is None else delta.down
        by_input = rows.reshape(len(rows), len(coefficients), -1)
        scaled_rows = (by_input * coefficients.to(rows.device, torch.float32)[:, None]).reshape(rows.shape)
        scaled.append(_with_rows(delta, scaled_rows).times(weight))
    return sum_deltas(scaled)


Method = Callable[[WeightedDeltas, MergeOptions], Delta]
METHODS: dict[str, Method] = {
    "sum": weighted_sum,
    "svd": weighted_sum,  # then truncated, as with all methods but "sum" and "orthogonal"
    "ties": ties,
    "dare": dare,
    "dare-ties": dare_ties,
    "prune": magnitude_prune,
    "orthogonal": orthogonal,
}


def _pruned(deltas: WeightedDeltas, options: MergeOptions, method: Literal["magnitude", "random"]) -> WeightedDeltas:
    """Dense deltas of which a share is kept: the largest numbers, or random ones, then scaled up.

    Which numbers are random depends on seed, module and delta, not on the order of the deltas.
    """
    from peft.utils.merge_utils import prune

    if options.density >= 1:
        return [(Delta(delta.shape, delta.dense()), weight) for delta, weight in deltas]
    pruned = []
    for delta, weight in deltas:
        dense = delta.dense()
        with seeded(dense.device, options.seed, "dare", options.name, f"{delta.inner(delta):.5e}"):
            kept = prune(dense, options.density, method)
        if method == "random":
            kept = kept / options.density  # PEFT can do so, too, but 0.13 forgets it
        pruned.append((Delta(delta.shape, kept), weight))
    return pruned


def _elected(deltas: WeightedDeltas) -> Delta:
    """For each entry the mean of the weighted numbers that have the sign of the majority."""
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    dense = torch.stack([delta.dense() for delta, _ in deltas])
    weights = torch.tensor([weight for _, weight in deltas], device=dense.device)
    signs = calculate_majority_sign_mask(dense)
    shape = max((delta.shape for delta, _ in deltas), key=len)
    merged: Tensor = disjoint_merge(dense * weights.view(-1, 1, 1), signs)
    return Delta(shape, merged)


def _with_rows(delta: Delta, rows: Tensor) -> Delta:
    """The delta with other rows (rank, in·k·k) in `down`, or (out, in·k·k) if it is dense."""
    return Delta(delta.shape, rows) if delta.down is None else Delta(delta.shape, delta.up, rows)


def _projected(delta: Delta, basis: Tensor) -> Delta:
    """The delta without what it does to inputs in the span of `basis` (in·k·k, n), orthonormal columns."""
    rows = (delta.up if delta.down is None else delta.down).double()
    basis = basis.double()
    free = (rows - (rows @ basis) @ basis.T).float()
    return _with_rows(delta, free)


def _inputs(delta: Delta, energy: float, floor: float) -> Tensor:
    """Orthonormal inputs (in·k·k, n) that a delta responds to, the strongest that make up a share of its energy."""
    down = truncate(delta, Truncation(energy=energy, floor=floor)).down
    assert down is not None
    norms: Tensor = torch.linalg.vector_norm(down, dim=1, keepdim=True)
    return (down / norms).T
