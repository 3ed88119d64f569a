"""Where in a model an adapter works, and how much of its rank it uses: numbers by block."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ..adapters.kohya import Adapter
from ..adapters.names import block_order, module_path, weight_shape
from .deltas import Delta, Truncation, to_delta, truncate
from .merge import WeightedAdapter, aligned, needed_weight

_MOST = 0.95  # of the energy


def profile(
    adapter: Adapter, other: Adapter | None = None, weights: Mapping[str, Tensor] | None = None
) -> dict[str, dict[str, float]]:
    """A table by block.

    Args:
        adapter: The adapter.
        other: One to compare it with.
        weights: The base model's weights by the modules' kohya names, for DoRA and OFT; without them such layers are
            left out.

    Returns:
        Block → column → number: "energy", the block's share of the squared norm of all changes; "rank used", the
        share of its factors' rank that holds 95 % of its energy; "overlap", the cosine of the two adapters' changes.

    Raises:
        AdapterError: The two are of different families or shapes.
    """
    parts = [WeightedAdapter(adapter, "the adapter"), *([WeightedAdapter(other, "the other")] if other else [])]
    named = [part.adapter for part in aligned(parts)[0]]
    known = weights or {}
    rows: dict[str, list[dict[str, float]]] = {}
    for name, layer in named[0].layers.items():
        if layer.needs_weight and name not in known:
            continue
        weight = needed_weight(name, [layer], known)
        change = to_delta(layer, weight_shape(name, [layer], weight), weight)
        row = {
            "energy": change.inner(change),
            "rank used": truncate(change, Truncation(energy=_MOST)).rank / change.rank,
        }
        if other is not None:
            row |= _products(change, named[1], name, weight)
        rows.setdefault(module_path(name).block, []).append(row)
    everything = sum(row["energy"] for block in rows.values() for row in block) or 1.0
    return {block: _column(rows[block], everything) for block in sorted(rows, key=block_order)}


def _products(change: Delta, other: Adapter, name: str, weight: Tensor | None) -> dict[str, float]:
    """What the cosine of two changes is made of; nothing where the other has no such layer."""
    layer = other.layers.get(name)
    if layer is None or (layer.needs_weight and weight is None):
        return {}
    second = to_delta(layer, change.shape, weight)
    return {"inner": change.inner(second), "first": change.inner(change), "second": second.inner(second)}


def _column(rows: list[dict[str, float]], everything: float) -> dict[str, float]:
    energy = sum(row["energy"] for row in rows)
    found = {"energy": energy / everything, "rank used": sum(row["rank used"] for row in rows) / len(rows)}
    inner, first, second = (sum(row.get(name, 0.0) for row in rows) for name in ("inner", "first", "second"))
    if first * second > 0:
        found["overlap"] = inner / math.sqrt(first * second)
    return found
