"""Where in a model an adapter acts, and how much of its rank it uses, by block."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ..adapters.kohya import Adapter
from ..adapters.layers import Layer
from ..adapters.module_paths import block_order, module_path
from ..adapters.names import weight_shape
from .deltas import Delta, Truncation, to_delta, truncate
from .merge import WeightedAdapter, weight_if_needed, with_common_names

_USED_ENERGY = 0.95  # share of a layer's energy that its used rank holds


def profile_adapter(
    adapter: Adapter, other: Adapter | None = None, weights: Mapping[str, Tensor] | None = None
) -> dict[str, dict[str, float]]:
    """A table by block.

    Args:
        adapter: The adapter.
        other: One to compare it with.
        weights: The base model's weights by the modules' kohya names, for DoRA and OFT; without them such layers are
            skipped.

    Returns:
        Block → column → number: "energy", the block's share of the squared norm of all deltas; "rank used", the
        share of its factors' rank that holds 95 % of its energy; "overlap", the cosine of the two adapters' deltas.

    Raises:
        AdapterError: The two are of different families or shapes.
    """
    weights = weights or {}
    compared = [WeightedAdapter(adapter, "the adapter")]
    if other is not None:
        compared.append(WeightedAdapter(other, "the other"))
    first, *others = (weighted.adapter for weighted in with_common_names(compared)[0])
    rows: dict[str, list[dict[str, float]]] = {}
    for name, layer in first.layers.items():
        if layer.needs_weight and name not in weights:
            continue
        weight = weight_if_needed(name, [layer], weights)
        delta = to_delta(layer, weight_shape(name, [layer], weight), weight)
        used_rank = truncate(delta, Truncation(energy=_USED_ENERGY)).rank
        row = {"energy": delta.inner(delta), "rank used": used_rank / delta.rank}
        for second in others:
            row |= _inner_products(delta, second.layers.get(name), weight)
        rows.setdefault(module_path(name).block, []).append(row)
    total_energy = sum(row["energy"] for block in rows.values() for row in block) or 1.0
    return {block: _summary(rows[block], total_energy) for block in sorted(rows, key=block_order)}


def _inner_products(delta: Delta, other: Layer | None, weight: Tensor | None) -> dict[str, float]:
    """What the cosine of two layers' deltas is made of; nothing where the other adapter has no such layer."""
    if other is None or (other.needs_weight and weight is None):
        return {}
    second = to_delta(other, delta.shape, weight)
    return {"inner": delta.inner(second), "first": delta.inner(delta), "second": second.inner(second)}


def _summary(rows: list[dict[str, float]], total_energy: float) -> dict[str, float]:
    """A block's columns, from the numbers of its modules."""
    energy = sum(row["energy"] for row in rows)
    columns = {
        "energy": energy / total_energy,
        "rank used": sum(row["rank used"] for row in rows) / len(rows),
    }
    inner, first, second = (sum(row.get(key, 0.0) for row in rows) for key in ("inner", "first", "second"))
    if first * second > 0:
        columns["overlap"] = inner / math.sqrt(first * second)
    return columns
