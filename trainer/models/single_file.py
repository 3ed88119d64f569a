"""A whole model as one checkpoint file in the original layout, as ComfyUI and Automatic1111 load it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.files import write_file
from ..core.tensor_files import cast_finite, save_tensors
from ..settings.sharing import shareable_metadata
from .clip_names import with_text_tower
from .families.base import BaseWeights
from .families.ldm import UNET_PREFIX, VAE_PREFIX
from .ldm_names import original_names

_VAE_PARTS = (  # diffusers' names → the original ones, applied in this order
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.mid_block\.resnets\.(\d)\.", lambda match: f".mid.block_{int(match[1]) + 1}."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.down_blocks\.(\d)\.resnets\.(\d)\.", r".down.\1.block.\2."),
    (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
)
_VAE_UP = re.compile(r"\.up_blocks\.(\d)\.(resnets\.(\d)|upsamplers\.0)\.")


def original_state_dict(base: BaseWeights, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model by the names of a single-file checkpoint.

    Args:
        base: The base model.
        changed: "<component>.<parameter>" → tensor that replaces the base's.
    """
    state_dict: dict[str, Tensor] = {}
    unet = {**base.denoiser.tensors, **_of_component(changed, "unet")}
    modules = {name.rpartition(".")[0] for name in unet}
    names = original_names(modules, int(base.denoiser.config["layers_per_block"]))
    for name, tensor in unet.items():
        module, _, kind = name.rpartition(".")
        state_dict[f"{UNET_PREFIX}{names[module]}.{kind}"] = tensor
    levels = len(base.vae.config["block_out_channels"])
    for name, tensor in base.vae.tensors.items():
        attention = ".mid_block.attentions." in name and tensor.ndim == 2
        state_dict[VAE_PREFIX + _vae_name(name, levels)] = tensor[:, :, None, None] if attention else tensor
    for encoder, component in zip(base.family.text_encoders, base.text_encoders, strict=True):
        replaced = {with_text_tower(name): tensor for name, tensor in _of_component(changed, encoder.name).items()}
        prefix = encoder.file_prefixes[0]
        state_dict |= {prefix + name: tensor for name, tensor in {**component.tensors, **replaced}.items()}
    return state_dict


def write_single_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype, *, replace: bool = True
) -> Path:
    """Write a single-file checkpoint atomically.

    Args:
        path: The file.
        tensors: By the original names.
        metadata: Of the file; strings.
        dtype: Type of the floating-point tensors in the file.
        replace: Whether a file of that name is replaced, or another name taken; see `core.files.write_file`.

    Returns:
        The path of the file.

    Raises:
        NotFiniteError: A value is NaN, infinite, or too large for the type; nothing is written.
        StorageError: It can't be written.
    """
    converted = {
        name: cast_finite(name, tensor, dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    return write_tensors(path, converted, {"format": "pt", **metadata}, replace=replace)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    copied: Collection[str] = (),
    replace: bool = True,
) -> Path:
    """Write a safetensors file atomically; every tensor keeps its type.

    Args:
        path: The file.
        tensors: On any device; they may share memory.
        metadata: Of the file; strings.
        copied: Names of tensors that are copied unchanged from another file, whose values are not checked.
        replace: Whether a file of that name is replaced, or another name taken; see `core.files.write_file`.

    Returns:
        The path of the file.

    Raises:
        NotFiniteError: A value is NaN or infinite; nothing is written.
        StorageError: It can't be written.
    """
    unshared: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        on_cpu = tensor.detach().cpu().contiguous()
        storage = on_cpu.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() > on_cpu.nbytes:  # safetensors refuses shared memory
            on_cpu = on_cpu.clone()
        storages.add(storage.data_ptr())
        unshared[name] = on_cpu
    size = sum(tensor.nbytes for tensor in unshared.values())
    shared = shareable_metadata(metadata)

    def write(temporary: Path) -> None:
        save_tensors(temporary, unshared, shared, copied=copied)

    return write_file(path, write, size, replace=replace)


def _of_component(tensors: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    """The tensors of one component, "<component>.<parameter>", by their parameters' names."""
    start = f"{component}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _vae_name(name: str, levels: int) -> str:
    dotted = f".{name}"
    for pattern, replacement in _VAE_PARTS:
        dotted = re.sub(pattern, replacement, dotted)
    return _VAE_UP.sub(
        lambda match: f".up.{levels - 1 - int(match[1])}." + (f"block.{match[3]}." if match[3] else "upsample."), dotted
    )[1:]
