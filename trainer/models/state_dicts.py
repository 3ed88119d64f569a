"""Reading a base model's files: single checkpoints, safetensors, and diffusers folders."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from ..core.errors import WeightsError
from ..core.json_data import OBJECT, checked_shape, parse_json
from ..core.tensor_files import map_tensors

_INDEX = TypeAdapter(dict[str, str])
_BROKEN = "The file is damaged or incomplete: download or copy it again and compare its size with the source's."


def is_pickled(path: Path) -> bool:
    """Whether a file of that name is one of torch's, with pickled tensors."""
    return path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin")


def read_single_file(path: Path, *, mapped: bool = True) -> dict[str, Tensor]:
    """The tensors of a checkpoint; only plain weights are loaded.

    Args:
        path: A safetensors file, or one of torch's.
        mapped: Whether to memory-map the file, which Windows does not allow to be replaced while in use.

    Raises:
        WeightsError: It is damaged, or contains more than plain weights.
    """
    if not is_pickled(path):
        return read_safetensors(path)
    content = _unpickled(path, mapped=mapped)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        return {}
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor) and isinstance(name, str)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise WeightsError(
                f"{path.name} has the tensor {name} in an unsupported format.",
                "Use the .safetensors version of the model.",
            )
    return tensors


def _unpickled(path: Path, *, mapped: bool) -> Any:
    """What torch loads from a file without running code from it.

    Raises:
        WeightsError: It is damaged, or contains more than plain weights.
    """
    try:
        mapped = mapped and zipfile.is_zipfile(path)  # torch's older format can't be memory-mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle raises anything
        raise WeightsError(
            f"{path.name} was not loaded: it is damaged, or contains more than plain weights, such as code.",
            "Use the .safetensors version of the model.",
        ) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a safetensors file.

    Raises:
        WeightsError: It is damaged, or not a safetensors file.
    """
    try:
        return map_tensors(path)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path.name} is not a readable safetensors file: {error}.", _BROKEN) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a diffusers folder.

    Raises:
        WeightsError: It can't be read, or has other content.
    """
    try:
        return parse_json(path.read_bytes(), OBJECT)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path} can't be read: {error}.",
            "Use a folder in diffusers format (model_index.json, unet, vae, text_encoder, tokenizer, scheduler) or a "
            "single checkpoint file.",
        ) from error


def network_config(path: Path, shape: TypeAdapter[Any] = OBJECT) -> dict[str, Any]:
    """A network's configuration, without the entries that describe only the file.

    Args:
        path: Its file.
        shape: What it must contain.

    Raises:
        WeightsError: It can't be read, or has other content.
    """
    config = read_json(path)
    try:
        checked_shape(config, shape)
    except ValueError as error:
        raise WeightsError(f"{path} is damaged: {error}.", _BROKEN) from error
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
        WeightsError: It contains no weights, or they are damaged.
    """
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return read_safetensors(folder / name)
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return _read_shards(index)
    shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    if shards:
        _require_all_shards(shards)
        return _joined(shards)
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_single_file(folder / name)
    raise WeightsError(f"{folder} contains no weights ({stem}.safetensors).", _BROKEN)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index names, which are those that it says.

    Raises:
        WeightsError: The index can't be read, a file is missing, or a tensor is not where the index says.
    """
    try:
        places = _INDEX.validate_python(read_json(index).get("weight_map"))
    except ValueError as error:
        raise WeightsError(f"{index} has no valid weight_map.", _BROKEN) from error
    for file_name in set(places.values()):
        if Path(file_name).name != file_name or not (index.parent / file_name).is_file():
            raise WeightsError(f"{index.parent} lacks the file {file_name}, which {index.name} refers to.", _BROKEN)
    tensors = _joined(index.parent / file_name for file_name in sorted(set(places.values())))
    lacking = sorted(places.keys() - tensors.keys())
    if lacking:
        raise WeightsError(f"{places[lacking[0]]} lacks the tensor {lacking[0]}, which {index.name} lists.", _BROKEN)
    return tensors


def _require_all_shards(shards: list[Path]) -> None:
    """Check, by their numbers, that files named -00001-of-00003 and so on are complete.

    Raises:
        WeightsError: One is missing.
    """
    numbers = [re.search(r"-(\d+)-of-(\d+)\.safetensors$", shard.name) for shard in shards]
    found = {int(match[1]) for match in numbers if match}
    counts = {int(match[2]) for match in numbers if match}
    missing = sorted(set(range(1, max(counts, default=0) + 1)) - found)
    if missing or len(counts) > 1:
        raise WeightsError(f"{shards[0].parent} lacks some of the files that belong to {shards[0].name}.", _BROKEN)


def _joined(files: Iterable[Path]) -> dict[str, Tensor]:
    return {name: tensor for file in files for name, tensor in read_safetensors(file).items()}


def with_current_attention_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a VAE's attention tensors to those of current diffusers (old folders: query, key, value, proj_attn)."""
    names = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor[:, :, 0, 0] if ".to_" in name and tensor.ndim == 4 else tensor
    return renamed
