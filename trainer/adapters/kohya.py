"""Adapter files: read with any program's names, written with kohya's, and with the hashes that other programs look up.

A module `down_blocks.0.attentions.0.proj_in` of the UNet is named `lora_unet_down_blocks_0_attentions_0_proj_in`;
its tensors are `<name>.lora_down.weight` (rank, in[, k, k]), `<name>.lora_up.weight` (out, rank[, 1, 1]) and
`<name>.alpha` (0-D). `layers` has the other types and the delta of each.

Source: networks/lora.py of kohya-ss/sd-scripts; files of LyCORIS, diffusers, PEFT and ComfyUI are read, too.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..core.errors import AdapterError
from ..core.files import write_file
from ..core.tensor_files import is_quantization_name, read_header, save_tensors
from ..settings.sharing import shareable_metadata
from .adapter_files import find_files
from .casting import cast_layer, cast_tensor
from .file_keys import in_file
from .keys import (
    PEFT_BIAS,
    PEFT_MAGNITUDE,
    TensorKey,
    is_embedding,
    parse_keys,
    warn_of_strange_modules,
    without_repeats,
)
from .layers import DORA_SCALE, FullLayer, Layer, LokrLayer, LoraLayer, OftLayer, make_layer
from .layers.base import DAMAGED_FILE_REMEDY
from .module_paths import own_name
from .peft_config import (
    CONFIG_KEYS,
    HEADER_KEY,
    PEFT_PREFIX,
    PeftConfig,
    PeftConfigs,
    configs_in_metadata,
)
from .prefixes import component_of, component_of_folder
from .projections import in_network_layout

__all__ = [
    "PEFT_MAGNITUDE",
    "Adapter",
    "LoraLayer",
    "file_hashes",
    "parse_adapter",
    "read_adapter",
    "read_header",
    "write_adapter",
]

logger = logging.getLogger("dreambooth_lora")

_VECTORS = {"diff": "diff", "diff_b": "diff_b", "w_norm": "diff", "b_norm": "diff_b"}
_CHUNK_BYTES = 2**24
_LEGACY_HASH_START = 0x100000
_LEGACY_HASH_END = 0x110000


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        layers: kohya module name → layer.
        metadata: The file's metadata; strings.
        vectors: Added to biases and to the weights of norms, (out,) each: "<module>.diff_b", "<module>.diff".
        embeddings: Of words that were trained together with it, as in the file: "bundle_emb.<name>.<part>" → tensor.
    """

    layers: Mapping[str, Layer]
    metadata: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The type of its layers; if there are several, all of them, the most common first."""
        return ", ".join(kind for kind, _ in Counter(layer.kind for layer in self.layers.values()).most_common())

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors by kohya's names, contiguous, on the CPU.

        Args:
            dtype: Of the matrices; None: unchanged. Alphas are float32; with a dtype, so are DoRA's scales and tensors
                that would lose precision, see `casting`.

        Raises:
            NotFiniteError: A value is NaN, infinite, or too large for the dtype.
        """
        tensors: dict[str, Tensor] = {}
        for name in sorted(self.layers):
            layer = self.layers[name] if dtype is None else cast_layer(name, self.layers[name], dtype)
            for suffix, tensor in layer.tensors().items():
                tensors[f"{name}.{suffix}"] = tensor.detach().cpu().contiguous()
            if not isinstance(layer, FullLayer):
                tensors[f"{name}.alpha"] = torch.tensor(float(layer.alpha))
        for name in sorted(self.vectors):
            vector = self.vectors[name] if dtype is None else cast_tensor(name, self.vectors[name], dtype)
            tensors[name] = vector.detach().cpu().contiguous()
        for name in sorted(self.embeddings):
            tensors[name] = self.embeddings[name].detach().cpu().contiguous()
        return tensors


def parse_adapter(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, configs: PeftConfigs | None = None
) -> Adapter:
    """Read an adapter from tensors named by any program that `keys` knows.

    Args:
        tensors: Key → tensor, from a file or a LORA_MODEL wire.
        metadata: The file's metadata.
        configs: PEFT's configurations of its networks; None: those in the metadata, if there are any.

    Raises:
        AdapterError: It is for another family, of an unsupported type, has an unknown tensor or one module under two
            names with different values; or a layer is incomplete or damaged.
    """
    keys, repeated = without_repeats(_readable_keys(tensors), tensors)
    if repeated:
        logger.warning("The file contains a module twice, with the same values; it is read once: %s", repeated[0])
    warn_of_strange_modules(keys.values())
    metadata = dict(metadata or {})
    configs = configs or configs_in_metadata(metadata)
    modules = {parsed.module for parsed in keys.values()}
    keys = {key: replace(parsed, module=own_name(parsed.module, modules)) for key, parsed in keys.items()}
    tensors_by_module: dict[str, dict[str, Tensor]] = {}
    paths: dict[str, str] = {}
    vectors: dict[str, Tensor] = {}
    scaled_biases: dict[str, Tensor] = {}
    for key, parsed in keys.items():
        tensor = tensors[key]
        _require_numbers(tensor, key, is_alpha=parsed.part == "alpha")
        if parsed.part in _VECTORS and tensor.ndim == 1:
            vectors[f"{parsed.module}.{_VECTORS[parsed.part]}"] = _require_finite(tensor, key)
            continue
        module_tensors = tensors_by_module.setdefault(parsed.module, {})
        if parsed.part == PEFT_BIAS:
            scaled_biases[parsed.module] = _require_finite(tensor, key)
        elif parsed.part == PEFT_MAGNITUDE:
            module_tensors[DORA_SCALE] = _as_dora_scale(tensor)
        else:
            module_tensors[parsed.part] = tensor
        paths[parsed.module] = parsed.path
    layers = {
        name: _parse_layer(name, module_tensors, configs.of(component_of(name)), paths[name])
        for name, module_tensors in tensors_by_module.items()
    }
    for name, bias in scaled_biases.items():
        vectors[f"{name}.diff_b"] = bias.float() * (layers[name].alpha / layers[name].rank)
    layers = in_network_layout(layers)
    metadata = {key: value for key, value in metadata.items() if key not in CONFIG_KEYS}  # the layers have it now
    embeddings = {key: _require_finite(tensors[key], key) for key in sorted(tensors) if is_embedding(key)}
    return Adapter(layers, metadata, vectors, embeddings)


def _require_numbers(tensor: Tensor, key: str, *, is_alpha: bool) -> None:
    """Refuse tensors of types that no adapter's numbers have; an alpha may be an integer.

    Raises:
        AdapterError: It is of such a type.
    """
    is_integer = not tensor.is_complex() and tensor.dtype != torch.bool
    if not (tensor.is_floating_point() or (is_alpha and is_integer)):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise AdapterError(
            f"{key} has the type {dtype}, which is not supported for adapter weights.",
            "Use a version of the adapter in fp32, fp16 or bf16.",
        )


def _require_finite(vector: Tensor, key: str) -> Tensor:
    if not torch.isfinite(vector.float()).all():
        raise AdapterError(f"The adapter is damaged: {key} has NaN or infinite values.", DAMAGED_FILE_REMEDY)
    return vector


def _parse_layer(name: str, tensors: dict[str, Tensor], config: PeftConfig | None, path: str) -> Layer:
    """One module's layer, with the alpha beside its tensors, or else that of PEFT's configuration, or else its rank.

    Raises:
        AdapterError: As `make_layer`, or its alpha is no finite number.
    """
    alpha_tensor = tensors.pop("alpha", None)
    if alpha_tensor is not None and alpha_tensor.numel() != 1:
        raise AdapterError(f"The adapter is damaged: the alpha of {name} is not a number.", DAMAGED_FILE_REMEDY)
    layer = make_layer(name, tensors, None if alpha_tensor is None else float(alpha_tensor))
    if alpha_tensor is not None or config is None or isinstance(layer, FullLayer | OftLayer):
        return layer
    if config.use_dora and isinstance(layer, LoraLayer) and layer.dora_scale is None:
        raise AdapterError(
            f"The adapter is incomplete: the DoRA {name} lacks its {PEFT_MAGNITUDE}.", DAMAGED_FILE_REMEDY
        )
    if isinstance(layer, LokrLayer) and layer.w1 is not None and layer.is_whole:
        scale = config.scale_of_whole_lokr(path)
        return layer if scale == 1 else replace(layer, w1=layer.w1.float() * scale)
    return make_layer(name, tensors, config.alpha_of(path, layer.rank))


def _as_dora_scale(magnitude: Tensor) -> Tensor:
    """PEFT's DoRA magnitude, (out,) or (1, out, 1, 1) for a convolution, as (out, 1[, 1, 1])."""
    return magnitude.reshape(-1, *[1] * max(magnitude.ndim - 1, 1))


def read_adapter(path: Path) -> Adapter:
    """Read an adapter file, or a folder of PEFT or diffusers with one; see `adapter_files.find_files`.

    Raises:
        AdapterError: Missing, damaged, or not a LoRA.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    configs: dict[str, PeftConfig] = {}
    try:
        for file in find_files(path):
            names = file.names()
            if names is not None:
                _readable_keys(names)  # before gigabytes are read in vain
            file_tensors, file_metadata = file.read()
            tensors |= file_tensors
            metadata |= file_metadata
            if file.config is not None:
                configs[component_of_folder(file.component)] = file.config
        if not configs and HEADER_KEY not in metadata and any(name.startswith(PEFT_PREFIX) for name in tensors):
            logger.warning(
                "%s: PEFT's adapter_config.json, which stores the scale, is not in the same folder; using a scale of 1",
                path,
            )
        return parse_adapter(tensors, metadata, PeftConfigs(configs, configs.get("")) if configs else None)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"The adapter {path} can't be read: {error}.",
            "Check the path; the file must be a complete .safetensors file.",
        ) from error
    except AdapterError as error:
        raise error.about(path.name) from None


def _readable_keys(keys: Collection[str] | Mapping[str, Tensor]) -> dict[str, TensorKey]:
    """Parse the keys of an adapter's tensors, which may be given along.

    Raises:
        AdapterError: It is quantised; or see `parse_keys`.
    """
    scale = next((key for key in sorted(keys) if is_quantization_name(key)), None)
    if scale is not None:
        raise AdapterError(
            f"The adapter is quantised ({scale}), which is not supported.",
            "Use a version of the adapter in fp32, fp16 or bf16.",
        )
    tensors = keys if isinstance(keys, Mapping) else {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):  # as a wire of another pack may have it
            raise AdapterError(
                f"{key} is not a tensor but a {type(tensor).__name__}.", "Use a file in safetensors format."
            )
    return parse_keys(keys, {key: tensor.shape for key, tensor in tensors.items()})


def write_adapter(path: Path, adapter: Adapter, dtype: torch.dtype, *, replace: bool = True) -> Path:
    """Write a kohya file atomically, with the hashes that other programs look up.

    Z-Image's modules have different names there, see `file_keys`.

    Args:
        path: The file.
        adapter: Its metadata is written too; `sshs_*` and `modelspec.hash_sha256` are computed here.
        dtype: Of the tensors in the file.
        replace: Whether a file of that name is replaced, or another name taken; see `core.files.write_file`.

    Returns:
        The path of the file.

    Raises:
        NotFiniteError: A value is NaN, infinite, or too large for the dtype; nothing is written.
        StorageError: The file can't be written.
    """
    tensors = in_file(adapter.state_dict(dtype))
    _tell_of_float32(tensors, dtype)
    metadata = shareable_metadata({key: str(value) for key, value in adapter.metadata.items()})
    placeholders = _hash_entries("0" * 64, "0" * 8)
    size = sum(tensor.nbytes for tensor in tensors.values())

    def write(temporary: Path) -> None:  # and not in memory: a merged file may have gigabytes
        save_tensors(temporary, tensors, metadata | placeholders)
        with open(temporary, "r+b") as file:
            model_hash, legacy_hash = _hashes(file, _hashed_metadata(metadata))
            _overwrite_metadata(file, _hash_entries(model_hash, legacy_hash))

    return write_file(path, write, size, replace=replace)


def _tell_of_float32(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Say which tensors are of float32 since the type that was asked for would lose their numbers."""
    kept = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype != dtype and not name.endswith((".alpha", DORA_SCALE)) and not is_embedding(name)
    ]
    if kept:
        logger.warning(
            "%d tensors were kept in float32, since their values are too small for %s, e.g. %s",
            len(kept),
            str(dtype).removeprefix("torch."),
            kept[0],
        )


def file_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash`, computed as kohya and sd-webui-additional-networks do.

    The file is serialised with its `ss_*` metadata only; the first hash is the sha256 of what follows the
    header, the second the first 8 digits of the sha256 of bytes 0x100000 to 0x110000.
    """
    from safetensors.torch import save

    hashed_metadata = _hashed_metadata(metadata)
    content = save(dict(tensors), hashed_metadata)
    return _hashes(io.BytesIO(content), hashed_metadata)


def _hashed_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key.startswith("ss_")}


def _hash_entries(model_hash: str, legacy_hash: str) -> dict[str, str]:
    return {
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": legacy_hash,
        "modelspec.hash_sha256": f"0x{model_hash}",
    }


def _overwrite_metadata(file: BinaryIO, entries: Mapping[str, str]) -> None:
    """Replace values in the header of a safetensors file by others of the same length; all other bytes stay.

    Args:
        file: Open for reading and writing.
        entries: Key in the metadata → its new value; plain ASCII that needs no escapes in JSON.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header["__metadata__"] |= entries
    text = _header_text(header)
    if len(text) > length:
        raise ValueError(f"the header would have {len(text)} bytes instead of {length}")
    file.seek(8)
    file.write(text.ljust(length))


def _header_text(header: Mapping[str, Any]) -> bytes:
    """A header as safetensors writes it, without the spaces at its end."""
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()


def _hashes(file: BinaryIO, hashed_metadata: Mapping[str, str]) -> tuple[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of a file, as if the given metadata were all that it has."""
    file.seek(0)
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    data_start = file.tell()
    model_hash = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        model_hash.update(chunk)

    bare_header = header | {"__metadata__": dict(hashed_metadata)}
    text = _header_text(bare_header)
    text += b" " * (-len(text) % 8)
    beginning = len(text).to_bytes(8, "little") + text  # of the file with that header; the data follow
    data_from = max(_LEGACY_HASH_START - len(beginning), 0)
    data_to = max(_LEGACY_HASH_END - len(beginning), 0)
    file.seek(data_start + data_from)
    region = beginning[_LEGACY_HASH_START:_LEGACY_HASH_END] + file.read(max(data_to - data_from, 0))
    return model_hash.hexdigest(), hashlib.sha256(region).hexdigest()[:8]
