"""What diffusers lays out otherwise than the original code: split projections, and the order of the last norm's rows.

FLUX.2's network has the original code's layout here (see `models/flux2_names`), and so do its files: layers of three
projections become one, and back. Z-Image's has diffusers': a layer of joined projections becomes three.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core.errors import AdapterError
from ..models import anima_names, krea2_names, zimage_names
from ..models.flux2_names import LAST_NORM, SWAPPED, joined_path, split_paths
from .layers import FullLayer, Layer, LoraLayer, OftLayer
from .module_paths import module_name, module_path
from .prefixes import UNET

_NAMES = ("query", "key", "value")


def is_split_here(name: str) -> bool:
    """Whether a module, by its kohya name, is a joined projection for which the network has three modules."""
    path = module_path(name)
    return path.component == UNET and zimage_names.split_paths(path.path) is not None


def in_network_layout(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Layers for the modules of the network; all that diffusers does not lay out otherwise are as they were.

    Args:
        layers: kohya module name → layer.

    Raises:
        AdapterError: A projection can't be joined or split; named.
    """
    joined: dict[str, Layer] = {}
    thirds: dict[str, dict[int, tuple[str, Layer]]] = {}
    for name, layer in layers.items():
        path = module_path(name)
        place = joined_path(path.path) if path.component == UNET else None
        parts = zimage_names.split_paths(path.path) if path.component == UNET else None
        if path.component == UNET and path.path == SWAPPED:
            joined[module_name(UNET, LAST_NORM)] = _with_swapped_halves(layer, name)
        elif parts:
            joined |= _split(layer, name, [module_name(UNET, part) for part in parts], layers)
        elif place is None:
            joined[name] = layer
        else:
            thirds.setdefault(module_name(UNET, place[0]), {})[place[1]] = (name, layer)
    for name, third in thirds.items():
        if name in joined:
            raise _named_twice(next(iter(third.values()))[0], name)
        joined[name] = _joined({number: layer for number, (_, layer) in third.items()}, name)
    return joined


def in_diffusers_layout(layer: LoraLayer, path: str) -> dict[str, LoraLayer]:
    """The layers of diffusers' modules, by their paths: three for joined projections, else one.

    Args:
        layer: Of the module.
        path: The module's path in the network.
    """
    if path == LAST_NORM:
        return {SWAPPED: _lora_with_swapped_halves(layer)}
    paths = split_paths(path)
    if paths is None:
        named = next((names for names in (krea2_names, anima_names) if names.is_module(path)), None)
        return {named.name_in_diffusers(path) if named else path: layer}
    return dict(zip(paths, _thirds(layer), strict=True))


def _thirds(layer: LoraLayer) -> list[LoraLayer]:
    """The layers of query, key and value, each with a copy of the inner factor: no file holds one tensor twice."""
    scale = layer.dora_scale
    is_per_output = scale is not None and len(scale) == len(layer.up)
    scales: Sequence[Tensor | None] = scale.chunk(3) if scale is not None and is_per_output else [scale] * 3
    return [
        replace(layer, down=layer.down.clone(), up=up, dora_scale=None if part is None else part.clone())
        for up, part in zip(layer.up.chunk(3), scales, strict=True)
    ]


def _split(layer: Layer, name: str, parts: Sequence[str], others: Collection[str]) -> dict[str, Layer]:
    """The layers of the three modules of a joined projection.

    Args:
        layer: Of the joined projection.
        name: Of the joined projection.
        parts: Names of the three.
        others: Names of all layers of the adapter.

    Raises:
        AdapterError: It is of a kind that can't be split, or one of the three has a layer of its own.
    """
    repeated = next((part for part in parts if part in others), None)
    if repeated:
        raise _named_twice(repeated, name)
    if isinstance(layer, LoraLayer) and layer.mid is None:
        return dict(zip(parts, _thirds(layer), strict=True))
    if layer.needs_weight:
        raise AdapterError(
            f"The adapter's {name} is of type {layer.kind} for query, key and value together, which can't be split "
            "into the network's three separate layers.",
            "Use a LoRA, or a file with three separate layers.",
        )
    return {part: FullLayer(delta) for part, delta in zip(parts, layer.delta().chunk(3), strict=True)}


def _named_twice(part: str, whole: str) -> AdapterError:
    return AdapterError(
        f"The adapter changes {part} and also {whole}, of which it is a part.",
        "Use an adapter that names each layer once.",
    )


def _joined(parts: Mapping[int, Layer], name: str) -> Layer:
    """One layer of those of query (0), key (1) and value (2), of which some may be missing.

    Raises:
        AdapterError: They are of kinds or shapes that can't be joined.
    """
    shapes = {layer.shape for layer in parts.values()}
    if len(shapes) > 1 or any(isinstance(layer, OftLayer) for layer in parts.values()):
        raise _not_joinable(name, "types or shapes that can't be in one layer")
    loras = {number: layer for number, layer in parts.items() if isinstance(layer, LoraLayer) and layer.mid is None}
    if len(loras) < len(parts):
        if any(layer.needs_weight for layer in parts.values()):
            raise _not_joinable(name, "a DoRA of a type that can't be joined")
        return FullLayer(torch.cat([_delta(parts.get(number), *shapes) for number in range(3)]))
    magnitudes = {number: layer.dora_scale for number, layer in loras.items() if layer.dora_scale is not None}
    per_output = all(len(scale) == len(loras[number].up) for number, scale in magnitudes.items())
    if magnitudes and (len(magnitudes) < 3 or not per_output):
        lacking = [_NAMES[number] for number in range(3) if number not in magnitudes]
        raise _not_joinable(name, f"a DoRA without {lacking[0]}" if lacking else "a DoRA with magnitudes of its inputs")
    scale = torch.cat([magnitudes[number].flatten(1) for number in range(3)]) if magnitudes else None
    first = next(iter(loras.values()))
    if len(loras) == 3 and all(_share_inner_factor(first, other) for other in loras.values()):
        return replace(first, up=torch.cat([loras[number].up for number in range(3)]), dora_scale=scale)
    ranks = {number: layer.rank for number, layer in loras.items()}
    up = torch.zeros(3 * first.shape[0], sum(ranks.values()), dtype=torch.float32)
    column = 0
    for number, layer in loras.items():
        rows = slice(number * first.shape[0], (number + 1) * first.shape[0])
        up[rows, column : column + layer.rank] = layer.up.float() * (layer.alpha / layer.rank)
        column += layer.rank
    down = torch.cat([layer.down.float() for layer in loras.values()])
    return LoraLayer(down=down, up=up, alpha=float(column), dora_scale=scale)


def _with_swapped_halves(layer: Layer, name: str) -> Layer:
    """A layer whose two halves of rows change places.

    Raises:
        AdapterError: It is of a kind that can't be halved.
    """
    if isinstance(layer, LoraLayer) and layer.mid is None:
        return _lora_with_swapped_halves(layer)
    if layer.needs_weight:
        raise AdapterError(
            f"The adapter's {name} is of type {layer.kind}, whose rows can't be reordered for the network.",
            "Use an adapter without this layer.",
        )
    return FullLayer(torch.cat(layer.delta().chunk(2)[::-1]))


def _lora_with_swapped_halves(layer: LoraLayer) -> LoraLayer:
    scale = layer.dora_scale
    is_per_output = scale is not None and len(scale) == len(layer.up)
    swapped_scale = torch.cat(scale.chunk(2)[::-1]) if scale is not None and is_per_output else scale
    return replace(layer, up=torch.cat(layer.up.chunk(2)[::-1]), dora_scale=swapped_scale)


def _share_inner_factor(first: LoraLayer, other: LoraLayer) -> bool:
    """Whether two layers were split from one: the same inner factor and scale."""
    return first.alpha == other.alpha and torch.equal(first.down, other.down)


def _delta(layer: Layer | None, shape: Sequence[int]) -> Tensor:
    return torch.zeros(tuple(shape)) if layer is None else layer.delta().reshape(tuple(shape))


def _not_joinable(name: str, why: str) -> AdapterError:
    return AdapterError(
        f"The adapter splits query, key and value of {name} into {why}.",
        "Use a LoRA, or a file in which they are one layer, as in the model's original code.",
    )
