"""Adapter files converted: to kohya's naming for the family, and to the format of diffusers and PEFT."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import AdapterError, suggest
from ..core.files import write_file
from ..core.tensor_files import save_tensors
from ..models.anima_names import CONDITIONER, CONDITIONER_IN_DIFFUSERS
from ..models.clip_names import without_text_tower
from ..models.transformers import is_transformer_module
from ..settings.sharing import shareable_metadata
from .casting import cast_layer
from .keys import PEFT_MAGNITUDE, embedding_names
from .kohya import Adapter
from .layers import Layer, LoraLayer
from .layers.base import balanced
from .metadata import without_run_keys
from .module_paths import ModulePath, layers_per_block, module_path
from .names import weight_shape, with_kohya_names
from .prefixes import UNET
from .projections import in_diffusers_layout

logger = logging.getLogger("dreambooth_lora")

_KEYS_OF_SOURCE_FILE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_RESIZE_REMEDY = (
    f"Convert it to a plain LoRA first by resizing it, or keep it in kohya's format ({suggest('format', 'kohya')})."
)


def to_kohya_format(adapter: Adapter) -> Adapter:
    """The adapter with kohya's names for its family, every convolution's factors in the shape of its kernel."""
    [named] = with_kohya_names([adapter])
    layers = {}
    for name, layer in named.layers.items():
        if isinstance(layer, LoraLayer) and layer.mid is None:
            shape = weight_shape(name, [layer], None)
            down = layer.down.reshape(layer.rank, *shape[1:])
            up = layer.up.reshape(shape[0], layer.rank, *[1] * (len(shape) - 2))
            layer = replace(layer, down=down, up=up)
        layers[name] = layer
    return replace(named, layers=layers, metadata=without_run_keys(named.metadata))


def diffusers_state_dict(adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a LoRA as diffusers' `load_lora_weights` reads them; the scale is in `lora_B`.

    Args:
        adapter: Of LoRA and DoRA layers.
        dtype: Of the tensors.

    Raises:
        AdapterError: It has a layer of a type that diffusers can't read.
        NotFiniteError: A value is NaN, infinite, or too large for the dtype.
    """
    if adapter.vectors:
        raise AdapterError(
            f"The adapter also changes biases or norms ({next(iter(adapter.vectors))}), which diffusers can't load.",
            f"Keep it in kohya's format ({suggest('format', 'kohya')}).",
        )
    if adapter.embeddings:
        logger.warning(
            "diffusers' format can't store embeddings; these are left out: %s",
            ", ".join(embedding_names(adapter.embeddings)),
        )
    tensors: dict[str, Tensor] = {}
    layers = to_kohya_format(adapter).layers
    per_block = layers_per_block(layers)
    for name, layer in layers.items():
        if not isinstance(layer, LoraLayer) or layer.mid is not None:
            kind = f"{layer.kind} with a core tensor" if isinstance(layer, LoraLayer) else layer.kind
            raise AdapterError(f"{name} is of type {kind}, which diffusers' format does not support.", _RESIZE_REMEDY)
        path = module_path(name, per_block)
        for part, part_layer in in_diffusers_layout(layer, path.path).items():
            tensors |= _lora_tensors(name, part_layer, _name_in_diffusers(path, part), dtype)
    _require_uniform_dora(layers)
    return tensors


def _name_in_diffusers(path: ModulePath, part: str) -> str:
    """A module's name in diffusers' files, which begins with that of its network.

    Args:
        path: The module's.
        part: The path in diffusers' network, or in the network here where that is several of diffusers'.
    """
    if path.component != UNET or not is_transformer_module(path.path):
        return f"{path.component}.{part}"
    network, dot, rest = part.partition(".")
    return f"{CONDITIONER_IN_DIFFUSERS}{dot}{rest}" if network == CONDITIONER else f"transformer.{part}"


def _lora_tensors(name: str, layer: LoraLayer, path: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one module.

    Args:
        name: Of the module, for messages.
        layer: Its layer.
        path: The module's in diffusers' files.
        dtype: Of the tensors.

    Raises:
        AdapterError: diffusers' format does not have such a DoRA.
        NotFiniteError: A value is NaN, infinite, or too large for the dtype.
    """
    scaled_up = layer.up.double().flatten(1) * (layer.alpha / layer.rank)
    up, down = balanced(scaled_up, layer.down.double().flatten(1))
    scaled = replace(layer, up=up.reshape(layer.up.shape), down=down.reshape(layer.down.shape), alpha=layer.rank)
    cast = cast_layer(name, scaled, dtype, fixed_alpha=True)
    tensors = {f"{path}.lora_A.weight": cast.down.contiguous(), f"{path}.lora_B.weight": cast.up.contiguous()}
    if layer.dora_scale is not None:
        ending = ".weight" if path.startswith("text_encoder") else ""  # transformers 5 completes no short names
        tensors[f"{path}.{PEFT_MAGNITUDE}{ending}"] = _peft_magnitude(layer.dora_scale, name)
    return tensors


def _require_uniform_dora(layers: Mapping[str, Layer]) -> None:
    """Refuse a network with DoRA for some modules only: PEFT's configuration has it for all or for none."""
    examples: dict[str, dict[str, str]] = {}  # component → kind → name of such a module
    for name, layer in layers.items():
        examples.setdefault(module_path(name).component, {})[layer.kind] = name
    for component, names in examples.items():
        if len(names) > 1:
            raise AdapterError(
                f"{names['DoRA']} is a DoRA but {names['LoRA']} of the same {component} is a plain LoRA; diffusers' "
                "format does not support such a mix.",
                _RESIZE_REMEDY,
            )


def _peft_magnitude(scale: Tensor, name: str) -> Tensor:
    """DoRA's magnitudes as PEFT holds them: (out,) of a matrix, (1, out, 1, 1) of a convolution."""
    if scale.shape[0] == 1 and scale.numel() > 1:
        raise AdapterError(
            f"{name} is a DoRA with a magnitude for each input, which diffusers' format does not support.",
            _RESIZE_REMEDY,
        )
    flat = scale.float().flatten().contiguous()
    return flat if scale.ndim < 4 else flat[None, :, None, None]


def write_diffusers(path: Path, adapter: Adapter, dtype: torch.dtype, *, replace: bool = True) -> Path:
    """Write an adapter file in diffusers' format, atomically; see `kohya.write_adapter`.

    Returns:
        The path of the file.

    Raises:
        AdapterError: See `diffusers_state_dict`.
        StorageError: It can't be written.
    """
    tensors = diffusers_state_dict(adapter, dtype)
    metadata = {key: value for key, value in adapter.metadata.items() if key not in _KEYS_OF_SOURCE_FILE}
    metadata |= {"format": "pt", "lora_adapter_metadata": json.dumps(_peft_configs(tensors))}
    size = sum(tensor.nbytes for tensor in tensors.values())
    shared = shareable_metadata(metadata)
    return write_file(path, lambda temporary: save_tensors(temporary, tensors, shared), size, replace=replace)


def _peft_configs(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """PEFT's configuration of each component, as diffusers writes it into the header: alpha is the rank everywhere."""
    ranks: dict[str, dict[str, int]] = {}  # component → path → rank
    for key, tensor in tensors.items():
        if key.endswith(".lora_A.weight"):
            component, _, path = key.removesuffix(".lora_A.weight").partition(".")
            path = without_text_tower(path)  # PEFT compares the ends of paths, so this fits either transformers
            ranks.setdefault(component, {})[path] = tensor.shape[0]
    dora_components = {key.partition(".")[0] for key in tensors if PEFT_MAGNITUDE in key}
    configs: dict[str, object] = {}
    for component, rank_by_path in ranks.items():
        usual_rank = max(set(rank_by_path.values()), key=list(rank_by_path.values()).count)
        other_ranks = {path: rank for path, rank in rank_by_path.items() if rank != usual_rank}
        config = {
            "r": usual_rank,
            "lora_alpha": usual_rank,
            "rank_pattern": other_ranks,
            "alpha_pattern": other_ranks,
            "target_modules": sorted(rank_by_path),
            "use_dora": component in dora_components,
        }
        configs |= {f"{component}.{name}": value for name, value in config.items()}
    return configs
