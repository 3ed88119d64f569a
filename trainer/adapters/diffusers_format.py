"""Adapters under the names of diffusers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import AdapterError
from ..core.files import write_atomic
from ..models.clip_names import without_text_tower
from .kohya import Adapter
from .layers import Layer, LoraLayer
from .layers.base import balanced
from .metadata import without_run
from .names import layers_per_block, module_path, weight_shape, with_kohya_names

_OF_ANOTHER_FILE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "peft_config")
_MAGNITUDE = "lora_magnitude_vector"


def with_own_names(adapter: Adapter) -> Adapter:
    """The adapter under kohya's names of its family, with the kernel of every convolution told."""
    [named] = with_kohya_names([adapter])
    layers = {}
    for name, layer in named.layers.items():
        if isinstance(layer, LoraLayer) and layer.mid is None:
            shape = weight_shape(name, [layer], None)
            down = layer.down.reshape(layer.rank, *shape[1:])
            layer = replace(layer, down=down, up=layer.up.reshape(shape[0], layer.rank, *[1] * (len(shape) - 2)))
        layers[name] = layer
    return replace(named, layers=layers, metadata=without_run(named.metadata))


def diffusers_state_dict(adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a LoRA as diffusers' `load_lora_weights` reads them; the scale is in `lora_B`.

    Args:
        adapter: Of LoRA and DoRA layers.
        dtype: Of the tensors.

    Raises:
        AdapterError: It has a layer of another kind, which diffusers can't read.
    """
    if adapter.vectors:
        raise AdapterError(
            f"The adapter also changes biases or norms ({next(iter(adapter.vectors))}), which diffusers can't load.",
            "Keep it in kohya's format.",
        )
    tensors: dict[str, Tensor] = {}
    layers = with_own_names(adapter).layers
    per_block = layers_per_block(layers)
    for name, layer in layers.items():
        if not isinstance(layer, LoraLayer) or layer.mid is not None:
            raise AdapterError(
                f"{name} is of the kind {layer.kind}{', with a core' if isinstance(layer, LoraLayer) else ''}, which "
                "diffusers' format does not have.",
                "Make a plain LoRA of it first: python -m trainer resize.",
            )
        place = str(module_path(name, per_block))
        scaled = layer.up.float().flatten(1) * (layer.alpha / layer.rank)
        up, down = balanced(scaled, layer.down.float().flatten(1))
        tensors[f"{place}.lora_A.weight"] = down.reshape(layer.down.shape).to(dtype).contiguous()
        tensors[f"{place}.lora_B.weight"] = up.reshape(layer.up.shape).to(dtype).contiguous()
        if layer.dora_scale is not None:
            ending = "" if place.startswith("unet.") else ".weight"  # transformers 5 completes no short names
            tensors[f"{place}.{_MAGNITUDE}{ending}"] = _magnitude(layer.dora_scale, name)
    _require_dora_of_all(layers)
    return tensors


def _require_dora_of_all(layers: Mapping[str, Layer]) -> None:
    """PEFT has DoRA for all modules of a network or for none."""
    kinds: dict[str, dict[str, str]] = {}
    for name, layer in layers.items():
        kinds.setdefault(module_path(name).component, {})[layer.kind] = name
    for component, names in kinds.items():
        if len(names) > 1:
            raise AdapterError(
                f"{names['DoRA']} is a DoRA and {names['LoRA']} of the same {component} is none, which diffusers' "
                "format can't tell.",
                "Make a plain LoRA of it first: python -m trainer resize.",
            )


def _magnitude(scale: Tensor, name: str) -> Tensor:
    """DoRA's lengths as PEFT holds them: (out,) of a matrix, (1, out, 1, 1) of a convolution."""
    if scale.shape[0] == 1 and scale.numel() > 1:
        raise AdapterError(
            f"{name} is a DoRA with a length for each input, which diffusers' format does not have.",
            "Make a plain LoRA of it first: python -m trainer resize.",
        )
    flat = scale.float().flatten().contiguous()
    return flat if scale.ndim < 4 else flat[None, :, None, None]


def write_diffusers(path: Path, adapter: Adapter, dtype: torch.dtype) -> None:
    """Write an adapter file in diffusers' format, whole or not at all.

    Raises:
        AdapterError: See `diffusers_state_dict`.
        StorageError: It can't be written.
    """
    from safetensors.torch import save

    tensors = diffusers_state_dict(adapter, dtype)
    metadata = {name: value for name, value in adapter.metadata.items() if name not in _OF_ANOTHER_FILE}
    metadata |= {"format": "pt", "lora_adapter_metadata": json.dumps(_configs(tensors))}
    write_atomic(path, save(tensors, metadata))


def _configs(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """PEFT's configuration of each component, as diffusers writes it into the header: alpha is the rank everywhere."""
    ranks: dict[str, dict[str, int]] = {}
    dora = {name.partition(".")[0] for name in tensors if _MAGNITUDE in name}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            component, _, path = name.removesuffix(".lora_A.weight").partition(".")
            path = without_text_tower(path)  # a level that transformers 5 lacks; ends of paths count, too
            ranks.setdefault(component, {})[path] = tensor.shape[0]
    found: dict[str, object] = {}
    for component, by_path in ranks.items():
        usual = max(set(by_path.values()), key=list(by_path.values()).count)
        others = {path: rank for path, rank in by_path.items() if rank != usual}
        config = {
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(by_path),
            "use_dora": component in dora,
        }
        found |= {f"{component}.{name}": value for name, value in config.items()}
    return found
