"""The adapter of one module, one class per type: its tensors, its shape, and its delta.

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
from .base import DAMAGED_FILE_REMEDY, DORA_SCALE, Layer, LayerTensors, dora_scale_fits
from .full import FullLayer
from .loha import LohaLayer
from .lokr import LokrLayer
from .lora import LoraLayer
from .oft import OftLayer

__all__ = [
    "DORA_SCALE",
    "FullLayer",
    "Layer",
    "LohaLayer",
    "LokrLayer",
    "LoraLayer",
    "OftLayer",
    "fits",
    "make_layer",
]


@dataclass(frozen=True)
class _LayerType:
    """One kind of layer: the suffixes of its tensors in a file, and the function that makes one of them."""

    suffixes: tuple[str, ...]
    make: Callable[[LayerTensors, float | None], Layer]


_LAYER_TYPES = {
    "LoRA": _LayerType(lora.SUFFIXES, lora.make_lora),
    "LoHa": _LayerType(loha.SUFFIXES, loha.make_loha),
    "LoKr": _LayerType(lokr.SUFFIXES, lokr.make_lokr),
    "OFT": _LayerType(oft.SUFFIXES, oft.make_oft),
    "full difference": _LayerType(full.SUFFIXES, full.make_full),
}


def make_layer(name: str, tensors: Mapping[str, Tensor], alpha: float | None) -> Layer:
    """One module's layer from its tensors, the inverse of `Layer.tensors`.

    Args:
        name: The module's name, for messages.
        tensors: Suffix, the part of a kohya or LyCORIS file's key after the module's name → tensor; without alpha.
        alpha: Numerator of the scale; None for the rank, of an OFT for no limit.

    Raises:
        AdapterError: A tensor is missing, the shapes don't match, or a value is NaN or infinite.
    """
    telling = set(tensors) - {DORA_SCALE}  # which several kinds have
    title = next((title for title, kind in _LAYER_TYPES.items() if telling & set(kind.suffixes)), "LoRA")
    layer_type = _LAYER_TYPES[title]
    foreign = sorted(set(tensors) - set(layer_type.suffixes))
    if foreign:
        raise AdapterError(
            f"The adapter is damaged: the {title} also has the tensor {name}.{foreign[0]}.", DAMAGED_FILE_REMEDY
        )
    for tensor in (*tensors.values(), torch.tensor(alpha or 0.0)):
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"The adapter is damaged: {name} has NaN or infinite values.", DAMAGED_FILE_REMEDY)
    layer_tensors = LayerTensors(name, title, tensors)
    layer = layer_type.make(layer_tensors, alpha)
    scale = getattr(layer, DORA_SCALE, None)
    if scale is not None and not dora_scale_fits(scale, layer.shape):
        raise layer_tensors.shape_error([DORA_SCALE], f"for a weight of {layer.shape}")
    return layer


def fits(layer: Layer, weight: Sequence[int]) -> bool:
    """Whether a layer can change a weight of that shape, (out, in) or (out, in, k, k).

    A kernel of 1×1 may be left out in either shape, and a layer with an unknown kernel is flat.
    """
    if isinstance(layer, OftLayer):
        return layer.shape[0] == weight[0]
    shapes = [tuple(shape[:2]) + tuple(side for side in shape[2:] if side != 1) for shape in (layer.shape, weight)]
    return shapes[0] in (shapes[1], (weight[0], math.prod(weight[1:])))
