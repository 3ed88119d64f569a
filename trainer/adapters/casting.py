"""Layers in the precision of a file, without losing what they add to a weight.

Half precision represents numbers from 6e-8 to 65504, with few digits below 6e-5. A layer's factors may be outside
that range, as with a learning rate of 1e-6, while their product is not. Then powers of two are moved between the
factors, which does not change the product, or into alpha. What still does not fit stays in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..core.errors import NotFiniteError
from ..core.tensor_files import cast_finite, is_finite
from .layers import FullLayer, Layer, LohaLayer, LokrLayer, LoraLayer, OftLayer
from .layers.base import balanced

LayerT = TypeVar("LayerT", bound=Layer)

_FACTORS: Mapping[type, tuple[str, ...]] = {  # fields whose product, of one kind or another, is the delta
    LoraLayer: ("up", "down", "mid"),
    LohaLayer: ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"),
    LokrLayer: ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"),
}
_WHOLE: Mapping[type, tuple[str, ...]] = {FullLayer: ("diff",), OftLayer: ("blocks", "rescale")}
_REMEDY = "Use a lower strength or other files; nothing was written."
_COMFORTABLE = 6  # powers of two, up or down, that typical numbers of a factor may be away from 1


def cast_layer(name: str, layer: LayerT, dtype: torch.dtype, *, fixed_alpha: bool = False) -> LayerT:
    """The layer with its tensors in another type and the same delta, up to that type's precision.

    Args:
        name: The module's, for messages.
        layer: Of any kind. An alpha of 0, or too small for float32, becomes a factor of zeros,
            since kohya's scripts and LyCORIS read an alpha of 0 as "the rank".
        dtype: The type. DoRA's scales are always float32: they are of the weights' magnitude.
        fixed_alpha: Whether alpha must not change, since the file can't store it.

    Returns:
        The layer, on its device. A tensor stays float32 where the type would lose more than a rounding error.

    Raises:
        NotFiniteError: A value is NaN, infinite, or too large for the type; names the module.
    """
    if type(layer) in _WHOLE:
        fields = _present(layer, _WHOLE[type(layer)])
        return _replaced(layer, {field: cast_tensor(name, tensor, dtype) for field, tensor in fields.items()})
    fields = _present(layer, _FACTORS[type(layer)])
    has_alpha = not (isinstance(layer, LokrLayer) and layer.is_whole)
    alpha = layer.alpha
    if not all(map(is_finite, fields.values())):
        raise NotFiniteError(f"{name} has NaN or infinite values.", _REMEDY)
    if not math.isfinite(alpha):
        raise NotFiniteError(f"{name} has an alpha of {alpha:g}.", _REMEDY)
    if has_alpha and abs(alpha) < torch.finfo(torch.float32).tiny:
        first = next(iter(fields))
        fields[first] = torch.zeros_like(fields[first])
        alpha = float(layer.rank)
    if not _are_kept(fields, dtype):
        fields = _balanced(fields)
        if has_alpha and not fixed_alpha and not _are_kept(fields, dtype):
            fields, alpha = _with_scale_in_alpha(fields, alpha)
    if abs(alpha) > torch.finfo(torch.float32).max:
        raise NotFiniteError(f"{name} has an alpha of {alpha:g}, which is too large to be saved.", _REMEDY)
    tensors = {field: cast_tensor(name, tensor, dtype) for field, tensor in fields.items()}
    scale: Tensor | None = getattr(layer, "dora_scale", None)
    if scale is not None:
        tensors["dora_scale"] = cast_finite(name, scale, torch.float32)
    return _replaced(layer, tensors, alpha)


def cast_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another type; in float32 where that would lose more than a rounding error.

    Raises:
        NotFiniteError: A value is NaN, infinite, or too large for the type.
    """
    converted = cast_finite(name, tensor, dtype)
    return converted if _is_kept(tensor, dtype) else cast_finite(name, tensor, torch.float32)


def _present(layer: Layer, fields: tuple[str, ...]) -> dict[str, Tensor]:
    return {field: getattr(layer, field) for field in fields if getattr(layer, field) is not None}


def _replaced(layer: LayerT, tensors: Mapping[str, Tensor], alpha: float | None = None) -> LayerT:
    dataclass_layer: Any = layer  # the protocol does not say that layers are dataclasses
    changes: dict[str, Any] = dict(tensors)
    if alpha is not None:
        changes["alpha"] = alpha
    return cast(LayerT, replace(dataclass_layer, **changes))


def _is_kept(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a type holds the numbers of a tensor but for rounding errors."""
    if torch.finfo(dtype).tiny <= torch.finfo(tensor.dtype).tiny:
        return True  # it has at least the range of the tensor's own type
    exact = tensor.double()
    error = torch.linalg.vector_norm(tensor.to(dtype).double() - exact)
    return bool(error <= torch.finfo(dtype).eps * torch.linalg.vector_norm(exact))


def _are_kept(factors: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    """Whether a type holds factors; of a product of two, every part of it that counts."""
    if all(torch.finfo(dtype).tiny <= torch.finfo(tensor.dtype).tiny for tensor in factors.values()):
        return True
    if factors.keys() != {"up", "down"}:
        return all(_is_kept(tensor, dtype) for tensor in factors.values())
    up, down = factors["up"].double().flatten(1), factors["down"].double().flatten(1)
    up_norms, down_norms = torch.linalg.vector_norm(up, dim=0), torch.linalg.vector_norm(down, dim=1)
    up_errors = torch.linalg.vector_norm(up.to(dtype).double() - up, dim=0)
    down_errors = torch.linalg.vector_norm(down.to(dtype).double() - down, dim=1)
    error = (up_errors * down_norms + up_norms * down_errors).sum()
    return bool(error <= 2 * torch.finfo(dtype).eps * (up_norms * down_norms).sum())


def _typical_exponent(tensor: Tensor) -> float:
    """The binary logarithm of the root of a tensor's mean square; 0 of zeros."""
    norm = float(torch.linalg.vector_norm(tensor.double()))
    return math.log2(norm / math.sqrt(tensor.numel())) if norm else 0.0


def _balanced(factors: Mapping[str, Tensor], power: int = 0) -> dict[str, Tensor]:
    """Factors of similar size whose product is 2 to the given power times that of the others; float64."""
    exact = {field: tensor.double() for field, tensor in factors.items()}
    if exact.keys() == {"up", "down"}:
        up, down = balanced(exact["up"].flatten(1) * 2.0**power, exact["down"].flatten(1))
        return {"up": up.reshape(exact["up"].shape), "down": down.reshape(exact["down"].shape)}
    exponents = {field: _typical_exponent(tensor) for field, tensor in exact.items()}
    mean = (sum(exponents.values()) + power) / len(exponents)
    shifts = {field: round(mean - exponent) for field, exponent in exponents.items()}
    last = next(reversed(shifts))
    shifts[last] += power - sum(shifts.values())
    return {field: tensor * 2.0 ** shifts[field] for field, tensor in exact.items()}


def _with_scale_in_alpha(factors: Mapping[str, Tensor], alpha: float) -> tuple[dict[str, Tensor], float]:
    """Factors of comfortable size, and the alpha that makes up for it."""
    mean = sum(map(_typical_exponent, factors.values())) / len(factors)
    comfortable = min(max(mean, -_COMFORTABLE), _COMFORTABLE)
    power = round((comfortable - mean) * len(factors))
    return _balanced(factors, power), alpha * 2.0**-power
