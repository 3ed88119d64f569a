"""Reading a base model's files: single checkpoints, safetensors, and the folders of diffusers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import WeightsError

_BROKEN = "The file is damaged or incomplete: download or copy it again and compare its size with the source's."


def read_single_file(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a checkpoint; only plain weights are loaded.

    Raises:
        WeightsError: It is damaged, or holds more than plain weights.
    """
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
            raise WeightsError(
                f"{path.name} is damaged, or holds more than plain weights, such as code, and was not loaded.",
                "Use the .safetensors version of the model.",
            ) from error
        if isinstance(content, dict):
            content = content.get("state_dict", content)
        if not isinstance(content, dict):
            content = {}
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    return read_safetensors(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a safetensors file.

    Raises:
        WeightsError: It is damaged, or not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path.name} is not a readable safetensors file: {error}.", _BROKEN) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a diffusers folder.

    Raises:
        WeightsError: It can't be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path} can't be read: {error}.",
            "Give a folder in diffusers' layout (model_index.json, unet, vae, text_encoder, tokenizer, scheduler) "
            "or a single checkpoint file.",
        ) from error
    return content if isinstance(content, dict) else {}


def network_config(path: Path) -> dict[str, Any]:
    """A network's configuration, without the entries that describe only the file."""
    config = read_json(path)
    of_the_file = (
        "_diffusers_version",
        "_name_or_path",
        "architectures",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "model_type",
    )
    return {name: value for name, value in config.items() if name not in of_the_file}


def read_component(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of one folder of a diffusers model, from one file or from shards.

    Args:
        folder: Such as "unet".
        stem: Name of the file without ending, "diffusion_pytorch_model" or "model".

    Raises:
        WeightsError: It holds no weights, or they are damaged.
    """
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return read_safetensors(folder / name)
    shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    if shards:
        return {name: tensor for shard in shards for name, tensor in read_safetensors(shard).items()}
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_single_file(folder / name)
    raise WeightsError(f"{folder} holds no weights ({stem}.safetensors).", _BROKEN)


def with_current_attention_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a VAE's attention the names of current diffusers (old folders: query, key, value, proj_attn)."""
    names = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor[:, :, 0, 0] if ".to_" in name and tensor.ndim == 4 else tensor
    return renamed
