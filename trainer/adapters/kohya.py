"""Adapter files: read in the naming of any program, written in kohya's, with the hashes that others look up.

A module `down_blocks.0.attentions.0.proj_in` of the UNet is named `lora_unet_down_blocks_0_attentions_0_proj_in`;
its tensors are `<name>.lora_down.weight` (rank, in[, k, k]), `<name>.lora_up.weight` (out, rank[, 1, 1]) and
`<name>.alpha` (0-D). `layers` holds the other kinds and what each adds to the module's weight.

Source: networks/lora.py of kohya-ss/sd-scripts; files of LyCORIS, diffusers, PEFT and ComfyUI are read, too.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..core.errors import AdapterError
from ..core.files import file_written_atomically, save_tensors
from ..models.clip_names import TEXT_TOWER, with_text_tower
from ..settings.sharing import shareable_metadata
from .layers import DORA_SCALE, FullLayer, Layer, LokrLayer, LoraLayer, OftLayer, make_layer
from .layers.base import DAMAGED_FILE_REMEDY
from .prefixes import KOHYA_UNET_PREFIX, UNET, component_of, neutral_prefix, text_encoder_names

__all__ = [
    "PEFT_MAGNITUDE",
    "Adapter",
    "LoraLayer",
    "file_hashes",
    "module_name",
    "parse_adapter",
    "read_adapter",
    "read_header",
    "write_adapter",
]

logger = logging.getLogger("dreambooth_lora")

_UNREADABLE_KINDS = {
    re.compile(r"\.(oft_diag|oft_[Rr](\..*)?)$"): "OFT as PEFT writes it",
    re.compile(r"\.a1\.weight$"): "GLoRA",
    re.compile(r"\.set_weight$"): "weights to be set",
}
_INITS_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of PEFT: they subtract from the base
PEFT_MAGNITUDE = "lora_magnitude_vector"
_LYCORIS = rf"hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|{DORA_SCALE}|oft_blocks|rescale|diff"
_VECTORS = {"diff": "diff", "diff_b": "diff_b", "w_norm": "diff", "b_norm": "diff_b"}
_SUFFIX = rf"(lora_(?:down|up|mid)\.weight|{_LYCORIS}|alpha|diff_b|w_norm|b_norm)"
_KOHYA_KEY = re.compile(rf"^(lora_(?:unet|te\d?)_|lycoris_|oft_unet_)([^.]+)\.{_SUFFIX}$")
_COMFYUI_KEY = re.compile(rf"^diffusion_model\.(.+)\.{_SUFFIX}$")
_DIFFUSERS_KEY = re.compile(
    r"^(.+?)(?:\.lora_(A|B)(?:\.default)?\.weight|(?:\.lora|\.lora_linear_layer|_lora)\.(down|up)\.weight"
    rf"|\.({_LYCORIS}|alpha|diff_b|w_norm|b_norm)(?:\.default)?|\.({PEFT_MAGNITUDE})(?:\.default)?(?:\.weight)?)$"
)
_CHUNK_BYTES = 2**24
_LEGACY_HASH_START = 0x100000
_LEGACY_HASH_END = 0x110000


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        layers: kohya module name → layer.
        metadata: The file's metadata; strings.
        vectors: What is added to biases and to the weights of norms, (out,) each: "<module>.diff_b", "<module>.diff".
    """

    layers: Mapping[str, Layer]
    metadata: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of its layers; if there are several, all of them, the most common first."""
        return ", ".join(kind for kind, _ in Counter(layer.kind for layer in self.layers.values()).most_common())

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors under kohya's names, contiguous, on the CPU.

        Args:
            dtype: Of the matrices, None for each one's own. Alphas are float32; with a dtype given, so are DoRA's
                scales, which are as large as the weights that they scale: half precision would blur what was learned.
        """
        tensors: dict[str, Tensor] = {}
        for name in sorted(self.layers):
            layer = self.layers[name]
            for suffix, tensor in layer.tensors().items():
                file_dtype = torch.float32 if dtype and suffix == DORA_SCALE else dtype or tensor.dtype
                tensors[f"{name}.{suffix}"] = tensor.detach().to("cpu", file_dtype).contiguous()
            if not isinstance(layer, FullLayer):
                tensors[f"{name}.alpha"] = torch.tensor(float(layer.alpha))
        vectors = {name: self.vectors[name].detach().to("cpu", dtype).contiguous() for name in sorted(self.vectors)}
        return tensors | vectors


def module_name(component: str, path: str) -> str:
    """Kohya's name of a module where the family is not known.

    Args:
        component: "unet", "text_encoder" or "text_encoder_2".
        path: The module's dotted path in diffusers or transformers (with or without "text_model.").
    """
    whole = path if component == UNET else with_text_tower(path)
    return neutral_prefix(component) + whole.replace(".", "_")


def parse_adapter(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Adapter:
    """Read an adapter from tensors in kohya's, LyCORIS's, diffusers', PEFT's or ComfyUI's naming.

    Args:
        tensors: Key → tensor, as a file or a LORA_MODEL wire has them.
        metadata: The file's metadata.

    Raises:
        AdapterError: No LoRA in it, a kind that can't be read yet, or a layer is incomplete or damaged.
    """
    _require_lora(tensors)
    metadata = dict(metadata or {})
    alphas = _MetadataAlphas(metadata)
    tensors_by_module: dict[str, dict[str, Tensor]] = {}
    paths: dict[str, str] = {}
    vectors: dict[str, Tensor] = {}
    unknown_keys = []
    for key, tensor in tensors.items():
        parsed = _parse_key(key)
        if parsed is None:
            unknown_keys.append(key)
            continue
        if parsed.suffix in _VECTORS and tensor.ndim == 1:
            vectors[f"{parsed.module}.{_VECTORS[parsed.suffix]}"] = _require_finite(tensor, key)
            continue
        module_tensors = tensors_by_module.setdefault(parsed.module, {})
        if parsed.suffix == PEFT_MAGNITUDE:
            module_tensors[DORA_SCALE] = _as_dora_scale(tensor)
        else:
            module_tensors[parsed.suffix] = tensor
        paths[parsed.module] = parsed.path
    if unknown_keys:
        logger.warning(
            "%d tensors of the file are no part of an adapter and are left out: %s", len(unknown_keys), unknown_keys[0]
        )
    layers = {
        name: _parse_layer(name, module_tensors, alphas, paths[name])
        for name, module_tensors in tensors_by_module.items()
    }
    return Adapter(layers, metadata, vectors)


def _require_finite(vector: Tensor, key: str) -> Tensor:
    if not torch.isfinite(vector.float()).all():
        raise AdapterError(f"The adapter is damaged: {key} has numbers that are not finite.", DAMAGED_FILE_REMEDY)
    return vector


def _parse_layer(name: str, tensors: dict[str, Tensor], alphas: _MetadataAlphas, path: str) -> Layer:
    """One module's layer, with the alpha beside its tensors or else that of the metadata.

    Raises:
        AdapterError: As `make_layer`, or its alpha is no finite number.
    """
    alpha_tensor = tensors.pop("alpha", None)
    if alpha_tensor is not None and alpha_tensor.numel() != 1:
        raise AdapterError(f"The adapter is damaged: the alpha of {name} is no number.", DAMAGED_FILE_REMEDY)
    layer = make_layer(name, tensors, None if alpha_tensor is None else float(alpha_tensor))
    if alpha_tensor is not None or isinstance(layer, FullLayer | OftLayer):
        return layer
    alpha = alphas.alpha(path, name, layer.rank)
    if not math.isfinite(alpha):
        raise AdapterError(f"The adapter is damaged: the alpha of {name} is {alpha}.", DAMAGED_FILE_REMEDY)
    if isinstance(layer, LokrLayer) and layer.w1 is not None and layer.is_whole:
        scale = alphas.scale_of_whole_lokr(path, name)
        return layer if scale == 1 else replace(layer, w1=layer.w1.float() * scale)
    return make_layer(name, tensors, alpha)


def _as_dora_scale(magnitude: Tensor) -> Tensor:
    """PEFT's DoRA magnitude, (out,) or (1, out, 1, 1) for a convolution, as (out, 1[, 1, 1])."""
    return magnitude.reshape(-1, *[1] * max(magnitude.ndim - 1, 1))


@dataclass(frozen=True)
class _Key:
    """A tensor's key in a file, parsed.

    Attributes:
        module: Kohya's name of the module.
        suffix: What follows it in a kohya file, such as "lora_down.weight"; or `PEFT_MAGNITUDE`.
        path: The module's dotted path in a file of diffusers or PEFT, else its name.
    """

    module: str
    suffix: str
    path: str


def _parse_key(key: str) -> _Key | None:
    """Parse a tensor's key; None if it is no part of an adapter."""
    kohya = _KOHYA_KEY.match(key)
    if kohya:  # lycoris_ is what LyCORIS's own wrapper calls every network; ComfyUI, too, takes it for the UNet
        name = re.sub("^(lycoris|oft_unet)_", KOHYA_UNET_PREFIX, kohya[1]) + kohya[2]  # oft_unet_: kohya's OFT
        return _Key(name, kohya[3], name)
    comfyui = _COMFYUI_KEY.match(key)
    if comfyui:
        return _Key(KOHYA_UNET_PREFIX + comfyui[1].replace(".", "_"), comfyui[2], comfyui[1])
    diffusers = _DIFFUSERS_KEY.match(key)
    if not diffusers:
        return None
    path, letter, side, lycoris, magnitude = diffusers.groups()
    if letter:
        side = {"A": "down", "B": "up"}[letter]
    suffix = f"lora_{side}.weight" if side else lycoris or magnitude
    path = path.removeprefix("base_model.model.")
    component = _component_of_path(path)
    path = path.removeprefix(f"{component}.").replace(".processor.", ".")
    path = re.sub(r"\.to_out$", ".to_out.0", path)
    return _Key(module_name(component, path), suffix, path)


def _component_of_path(path: str) -> str:
    """The network that a dotted path leads into; a path that names none is the UNet's, or a single text encoder's."""
    component, dot, _ = path.partition(".")
    if dot and component in text_encoder_names():
        return component
    return "text_encoder" if path.startswith((TEXT_TOWER, "encoder.layers.")) else UNET


class _MetadataAlphas:
    """Alphas that stand in metadata rather than beside the tensors: diffusers' header and PEFT's configuration."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        header = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        components = [UNET, *text_encoder_names()]
        self._configs: dict[str, dict[str, Any]] = {name: _sub_config(header, name) for name in components}
        if "peft_config" in metadata:
            self._configs = dict.fromkeys(components, json.loads(metadata["peft_config"]))
        for config in self._configs.values():
            init = str(config.get("init_lora_weights")).lower()
            if init.startswith(_INITS_CHANGING_BASE):
                raise AdapterError(
                    f"The adapter belongs to weights that PEFT changed before training (init_lora_weights {init}).",
                    "Save it again with PEFT's path_initial_model_for_weight_conversion.",
                )

    def alpha(self, path: str, name: str, rank: int) -> float:
        """The alpha of a module, by its dotted path as PEFT finds it, and its kohya name."""
        config = self._config(name)
        default = config.get("lora_alpha") or config.get("alpha") or rank  # "alpha" for LoHa and LoKr
        alpha = _value_for_path(config.get("alpha_pattern"), path, default)
        return alpha * rank**0.5 if config.get("use_rslora") else alpha

    def scale_of_whole_lokr(self, path: str, name: str) -> float:
        """The scale of a LoKr with whole factors: PEFT scales it, too, by its configuration's alpha / rank."""
        config = self._config(name)
        rank = _value_for_path(config.get("rank_pattern"), path, config.get("r") or 1)
        default = config.get("alpha") or rank
        return _value_for_path(config.get("alpha_pattern"), path, default) / rank

    def _config(self, name: str) -> dict[str, Any]:
        return self._configs.get(component_of(name), self._configs[UNET])


def _value_for_path(patterns: Mapping[str, Any] | None, path: str, default: Any) -> float:
    """The value of the first pattern that a module's path ends with, as PEFT compares them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(value)
    return float(default)


def _sub_config(header: Mapping[str, Any], component: str) -> dict[str, Any]:
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in header.items() if key.startswith(prefix)}


def read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Keys of the tensors and metadata of a safetensors file, without reading its tensors.

    Raises:
        ValueError: It is no whole safetensors file.
        OSError: It can't be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError("no safetensors header")
        header = json.loads(file.read(length))
    keys = [key for key in header if key != "__metadata__"]
    return keys, header.get("__metadata__") or {}


def read_adapter(path: Path) -> Adapter:
    """Read an adapter file, or a PEFT folder (adapter_model.safetensors and adapter_config.json).

    Raises:
        AdapterError: Missing, damaged, or not a LoRA.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    peft_config: dict[str, str] = {}
    try:
        if path.is_dir():
            peft_config["peft_config"] = (path / "adapter_config.json").read_text(encoding="utf-8")
            path = path / "adapter_model.safetensors"
        keys, metadata = read_header(path)
        _require_lora(keys)  # before gigabytes are read in vain
        tensors = load(path.read_bytes())  # not memory-mapped: Windows could not replace the file while it is in use
        return parse_adapter(tensors, metadata | peft_config)
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(
            f"The adapter {path} can't be read: {error}.", "Check the path; the file must be a whole .safetensors file."
        ) from error
    except AdapterError as error:
        raise error.about(path.name) from None


def _require_lora(keys: Collection[str]) -> None:
    """Refuse tensors that are no adapter, by their keys.

    Raises:
        AdapterError: A kind that can't be read yet, or nothing of a LoRA.
    """
    for pattern, kind in _UNREADABLE_KINDS.items():
        if any(pattern.search(key) for key in keys):
            raise AdapterError(
                f"The adapter is of the kind {kind}, which can't be read yet.",
                "Use a LoRA, LoCon, DoRA, LoHa, LoKr or OFT file, or one with full differences.",
            )
    if not any(_parse_key(key) for key in keys):
        raise AdapterError("The file holds no LoRA.", "Choose an adapter file (LoRA) in safetensors format.")


def write_adapter(path: Path, adapter: Adapter, dtype: torch.dtype) -> None:
    """Write a kohya file atomically, with the hashes that other programs look up.

    Args:
        path: The file.
        adapter: Its metadata is written along; `sshs_*` and `modelspec.hash_sha256` are computed here.
        dtype: Of the tensors in the file.

    Raises:
        StorageError: The file can't be written.
    """
    tensors = adapter.state_dict(dtype)
    metadata = shareable_metadata({key: str(value) for key, value in adapter.metadata.items()})
    placeholders = _hash_entries("0" * 64, "0" * 8)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with file_written_atomically(path, size) as temporary:  # and not in memory: a merged file may have gigabytes
        save_tensors(temporary, tensors, metadata | placeholders)
        with open(temporary, "r+b") as file:
            model_hash, legacy_hash = _hashes(file, _hashed_metadata(metadata))
            _overwrite_metadata(file, _hash_entries(model_hash, legacy_hash))


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
    header = file.read(length)
    for key, value in entries.items():
        # A quote inside a JSON string has a backslash before it, so only a whole key can match.
        match = re.search(rb'[{,]\s*"' + re.escape(key).encode() + rb'"\s*:\s*"([^"\\]*)"', header)
        if match is None or len(match[1]) != len(value):
            raise ValueError(f"the header has no {key} of {len(value)} characters")
        file.seek(8 + match.start(1))
        file.write(value.encode())


def _hashes(file: BinaryIO, hashed_metadata: Mapping[str, str]) -> tuple[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of a file, as if the given metadata were all that it has."""
    file.seek(0)
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    data_start = file.tell()
    model_hash = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        model_hash.update(chunk)

    bare_header = header | {"__metadata__": dict(hashed_metadata)}
    text = json.dumps(bare_header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    beginning = len(text).to_bytes(8, "little") + text  # of the file with that header; the data follow
    data_from = max(_LEGACY_HASH_START - len(beginning), 0)
    data_to = max(_LEGACY_HASH_END - len(beginning), 0)
    file.seek(data_start + data_from)
    region = beginning[_LEGACY_HASH_START:_LEGACY_HASH_END] + file.read(max(data_to - data_from, 0))
    return model_hash.hexdigest(), hashlib.sha256(region).hexdigest()[:8]
