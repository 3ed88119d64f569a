"""Adapters under the names of diffusers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .errors import AdapterError
from .files import write_atomic
from .kohya import Adapter
from .layers import LoraLayer
from .merge import weight_shape
from .metadata import without_run
from .naming import place_of, with_kohya_names


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
    for name, layer in with_own_names(adapter).layers.items():
        if not isinstance(layer, LoraLayer) or layer.mid is not None:
            raise AdapterError(
                f"{name} is of the kind {layer.kind}{', with a core' if isinstance(layer, LoraLayer) else ''}, which "
                "diffusers' format does not have.",
                "Make a plain LoRA of it first: python -m trainer resize.",
            )
        place = str(place_of(name))
        tensors[f"{place}.lora_A.weight"] = layer.down.to(dtype).contiguous()
        tensors[f"{place}.lora_B.weight"] = (layer.up.float() * (layer.alpha / layer.rank)).to(dtype).contiguous()
        if layer.dora_scale is not None:
            tensors[f"{place}.lora_magnitude_vector"] = layer.dora_scale.float().flatten().contiguous()
    return tensors


def write_diffusers(path: Path, adapter: Adapter, dtype: torch.dtype) -> None:
    """Write an adapter file in diffusers' format, whole or not at all.

    Raises:
        AdapterError: See `diffusers_state_dict`.
        StorageError: It can't be written.
    """
    from safetensors.torch import save

    tensors = diffusers_state_dict(adapter, dtype)
    metadata = {**adapter.metadata, "format": "pt", "lora_adapter_metadata": json.dumps(_configs(tensors))}
    write_atomic(path, save(tensors, metadata))


def _configs(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """PEFT's configuration of each component, as diffusers writes it into the header: alpha is the rank everywhere."""
    ranks: dict[str, dict[str, int]] = {}
    dora = any(name.endswith("lora_magnitude_vector") for name in tensors)
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            component, _, path = name.removesuffix(".lora_A.weight").partition(".")
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
            "use_dora": dora,
        }
        found |= {f"{component}.{name}": value for name, value in config.items()}
    return found
