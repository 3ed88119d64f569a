"""The adapter of one module, one class per kind: its tensors, its shape, and what it adds to the module's weight.

| kind | what is added to a weight W |
|---|---|
| LoRA, LoCon | Δ = alpha / rank · up · down |
| LoHa | Δ = alpha / rank · (w1_a · w1_b) ⊙ (w2_a · w2_b) |
| LoKr | Δ = alpha / rank · w1 ⊗ w2 |
| DoRA, of each | dora_scale / ‖W + Δ‖ · (W + Δ) − W |
| OFT, BOFT | rescale · R W − W, R a rotation |
| full difference | Δ itself |

The sources are named in each kind's file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import AdapterError
from . import full, loha, lokr, lora, oft
from .base import BROKEN, DORA_SCALE, Layer, Parts, is_scale
from .full import DifferenceLayer
from .loha import LohaLayer
from .lokr import LokrLayer
from .lora import LoraLayer
from .oft import OftLayer

__all__ = [
    "DifferenceLayer",
    "Layer",
    "LohaLayer",
    "LokrLayer",
    "LoraLayer",
    "OftLayer",
    "fits",
    "make_layer",
]


@dataclass(frozen=True)
class _Kind:
    names: tuple[str, ...]
    make: Callable[[Parts, float | None], Layer]


_KINDS = {
    "LoRA": _Kind(lora.NAMES, lora.make_lora),
    "LoHa": _Kind(loha.NAMES, loha.make_loha),
    "LoKr": _Kind(lokr.NAMES, lokr.make_lokr),
    "OFT": _Kind(oft.NAMES, oft.make_oft),
    "full difference": _Kind(full.NAMES, full.make_difference),
}


def make_layer(name: str, parts: Mapping[str, Tensor], alpha: float | None) -> Layer:
    """One module's layer from its tensors, the inverse of `Layer.tensors`.

    Args:
        name: The module's name, for messages.
        parts: Tensors under the names that follow the module's in a kohya or LyCORIS file, without alpha.
        alpha: Numerator of the scale; None for the rank, of an OFT for no limit.

    Raises:
        AdapterError: A tensor is missing, the shapes don't belong together, or a number is not finite.
    """
    own = {title for title, kind in _KINDS.items() if (set(parts) - {DORA_SCALE}) & set(kind.names)}
    title = next((title for title in _KINDS if title in own), "LoRA")
    foreign = sorted(set(parts) - set(_KINDS[title].names))
    if foreign:
        raise AdapterError(f"The adapter is damaged: the {title} also has the tensor {name}.{foreign[0]}.", BROKEN)
    for tensor in (*parts.values(), torch.tensor(alpha or 0.0)):
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"The adapter is damaged: {name} has numbers that are not finite.", BROKEN)
    found = Parts(name, title, parts)
    layer = _KINDS[title].make(found, alpha)
    scale = getattr(layer, "dora_scale", None)
    if scale is not None and not is_scale(scale, layer.shape):
        raise found.misfit([DORA_SCALE], f"for a weight of {layer.shape}")
    return layer


def fits(layer: Layer, weight: Sequence[int]) -> bool:
    """Whether a layer can change a weight of that shape, (out, in) or (out, in, k, k).

    A kernel of 1×1 may be left out in either shape, and a layer that does not know its kernel is flat.
    """
    if isinstance(layer, OftLayer):
        return layer.shape[0] == weight[0]
    shapes = [tuple(shape[:2]) + tuple(side for side in shape[2:] if side != 1) for shape in (layer.shape, weight)]
    return shapes[0] in (shapes[1], (weight[0], math.prod(weight[1:])))
