"""The kohya adapter file: module names, tensors, hashes, reading and atomic writing.

A module `down_blocks.0.attentions.0.proj_in` of the UNet is named `lora_unet_down_blocks_0_attentions_0_proj_in`;
its tensors are `<name>.lora_down.weight` (rank, in[, k, k]), `<name>.lora_up.weight` (out, rank[, 1, 1]) and
`<name>.alpha` (0-D). `layers` knows the other kinds and what each adds to the module's weight.

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
from .layers import FullLayer, Layer, LokrLayer, LoraLayer, OftLayer, make_layer
from .prefixes import KOHYA_UNET_PREFIX, UNET, component_of, neutral_prefix, text_encoder_names

__all__ = [
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

_OTHER_KINDS = {
    re.compile(r"\.(oft_diag|oft_[Rr](\..*)?)$"): "OFT as PEFT writes it",
    re.compile(r"\.a1\.weight$"): "GLoRA",
    re.compile(r"\.set_weight$"): "weights to be set",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts of PEFT that take something off the base
_CHUNK = 2**24
_UNKNOWN = ("?" * 64, "!" * 8)  # hashes that are yet to be computed
_BROKEN = "Download or copy the adapter file again, or choose another."


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
        """The kind of its layers; if there are several, all of them, the commonest first."""
        return ", ".join(kind for kind, _ in Counter(layer.kind for layer in self.layers.values()).most_common())

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors under kohya's names, contiguous, on the CPU.

        Args:
            dtype: Type of the matrices, None for each one's own. Alphas are float32; with a type given, so are DoRA's
                scales, which are as large as the weights that they scale: half precision would blur what was learnt.
        """
        tensors: dict[str, Tensor] = {}
        for name in sorted(self.layers):
            for part, tensor in self.layers[name].tensors().items():
                wanted = torch.float32 if dtype and part == "dora_scale" else dtype or tensor.dtype
                tensors[f"{name}.{part}"] = tensor.detach().to("cpu", wanted).contiguous()
            if not isinstance(self.layers[name], FullLayer):
                tensors[f"{name}.alpha"] = torch.tensor(float(self.layers[name].alpha))
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
    """Read an adapter from named tensors in kohya's, LyCORIS's, diffusers', PEFT's or ComfyUI's naming.

    Args:
        tensors: Names and tensors, as they stand in a file or on a LORA_MODEL wire.
        metadata: The file's metadata.

    Raises:
        AdapterError: No LoRA in it, a kind that can't be read yet, or a layer is incomplete or damaged.
    """
    _require_lora(tensors)
    metadata = dict(metadata or {})
    alphas = _Alphas(metadata)
    parts: dict[str, dict[str, Tensor]] = {}
    paths: dict[str, str] = {}
    left_out, vectors = [], {}
    for key, tensor in tensors.items():
        split = _split_key(key)
        if split is None:
            left_out.append(key)
            continue
        if split.part in _VECTORS and tensor.ndim == 1:
            vectors[f"{split.module}.{_VECTORS[split.part]}"] = _finite(tensor, key)
            continue
        if split.part == _MAGNITUDE:
            parts.setdefault(split.module, {})["dora_scale"] = _per_output(tensor)
        else:
            parts.setdefault(split.module, {})[split.part] = tensor
        paths[split.module] = split.path
    if left_out:
        logger.warning(
            "%d tensors of the file are no part of an adapter and are left out: %s", len(left_out), left_out[0]
        )
    layers = {name: _layer(name, found, alphas, paths[name]) for name, found in parts.items()}
    return Adapter(layers, metadata, vectors)


def _finite(vector: Tensor, key: str) -> Tensor:
    if not torch.isfinite(vector.float()).all():
        raise AdapterError(f"The adapter is damaged: {key} has numbers that are not finite.", _BROKEN)
    return vector


def _layer(name: str, found: dict[str, Tensor], alphas: _Alphas, path: str) -> Layer:
    """One module's layer, with the alpha beside its tensors or else that of the metadata.

    Raises:
        AdapterError: As `make_layer`, or its alpha is no finite number.
    """
    given = found.pop("alpha", None)
    if given is not None and given.numel() != 1:
        raise AdapterError(f"The adapter is damaged: the alpha of {name} is no number.", _BROKEN)
    layer = make_layer(name, found, None if given is None else float(given))
    if given is not None or isinstance(layer, FullLayer | OftLayer):
        return layer
    alpha = alphas.of(path, name, layer.rank)
    if not math.isfinite(alpha):
        raise AdapterError(f"The adapter is damaged: the alpha of {name} is {alpha}.", _BROKEN)
    if isinstance(layer, LokrLayer) and layer.w1 is not None and layer.is_whole:
        scale = alphas.scale_of_whole(path, name)
        return layer if scale == 1 else replace(layer, w1=layer.w1.float() * scale)
    return make_layer(name, found, alpha)


def _per_output(magnitude: Tensor) -> Tensor:
    """PEFT's DoRA magnitude, (out,) or (1, out, 1, 1) for a convolution, as (out, 1[, 1, 1])."""
    return magnitude.reshape(-1, *[1] * max(magnitude.ndim - 1, 1))


_MAGNITUDE = "lora_magnitude_vector"
_LYCORIS = r"hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|dora_scale|oft_blocks|rescale|diff"
_VECTORS = {"diff": "diff", "diff_b": "diff_b", "w_norm": "diff", "b_norm": "diff_b"}
_PART = rf"(lora_(?:down|up|mid)\.weight|{_LYCORIS}|alpha|diff_b|w_norm|b_norm)"
_KOHYA_NAME = re.compile(rf"^(lora_(?:unet|te\d?)_|lycoris_|oft_unet_)([^.]+)\.{_PART}$")
_COMFYUI_NAME = re.compile(rf"^diffusion_model\.(.+)\.{_PART}$")
_DIFFUSERS_NAME = re.compile(
    r"^(.+?)(?:\.lora_(A|B)(?:\.default)?\.weight|(?:\.lora|\.lora_linear_layer|_lora)\.(down|up)\.weight"
    rf"|\.({_LYCORIS}|alpha|diff_b|w_norm|b_norm)(?:\.default)?|\.({_MAGNITUDE})(?:\.default)?(?:\.weight)?)$"
)


@dataclass(frozen=True)
class _Key:
    """What a tensor's name says: kohya's name of the module, the part's name in kohya's file, and the dotted path."""

    module: str
    part: str
    path: str


def _split_key(key: str) -> _Key | None:
    """Read a tensor's name; None if it is no part of a LoRA."""
    kohya = _KOHYA_NAME.match(key)
    if kohya:  # lycoris_ is what LyCORIS's own wrapper calls every network; ComfyUI, too, takes it for the UNet
        name = re.sub("^(lycoris|oft_unet)_", KOHYA_UNET_PREFIX, kohya[1]) + kohya[2]  # oft_unet_: kohya's OFT
        return _Key(name, kohya[3], name)
    host = _COMFYUI_NAME.match(key)
    if host:
        return _Key(KOHYA_UNET_PREFIX + host[1].replace(".", "_"), host[2], host[1])
    other = _DIFFUSERS_NAME.match(key)
    if not other:
        return None
    path, matrix, side = other[1], other[2], other[3]
    if matrix:
        side = {"A": "down", "B": "up"}[matrix]
    part = f"lora_{side}.weight" if side else other[4] or other[5]
    path = path.removeprefix("base_model.model.")
    component = _component_of_path(path)
    path = path.removeprefix(f"{component}.").replace(".processor.", ".")
    path = re.sub(r"\.to_out$", ".to_out.0", path)
    return _Key(module_name(component, path), part, path)


def _component_of_path(path: str) -> str:
    """The network that a dotted path leads into; a path that names none is the UNet's, or a single text encoder's."""
    component, dot, _ = path.partition(".")
    if dot and component in text_encoder_names():
        return component
    return "text_encoder" if path.startswith((TEXT_TOWER, "encoder.layers.")) else UNET


class _Alphas:
    """Alphas that stand in metadata rather than beside the tensors: diffusers' header and PEFT's configuration."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        header = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        components = [UNET, *text_encoder_names()]
        self._configs: dict[str, dict[str, Any]] = {part: _sub_config(header, part) for part in components}
        if "peft_config" in metadata:
            self._configs = dict.fromkeys(components, json.loads(metadata["peft_config"]))
        for config in self._configs.values():
            start = str(config.get("init_lora_weights")).lower()
            if start.startswith(_CHANGES_BASE):
                raise AdapterError(
                    f"The adapter belongs to weights that PEFT changed before training (init_lora_weights {start}).",
                    "Save it again with PEFT's path_initial_model_for_weight_conversion.",
                )

    def of(self, path: str, name: str, rank: int) -> float:
        """The alpha of a module, by its dotted path, as PEFT finds it."""
        config = self._config(name)
        default = config.get("lora_alpha") or config.get("alpha") or rank  # a LoHa's and a LoKr's is named "alpha"
        alpha = _of_module(config.get("alpha_pattern"), path, default)
        return alpha * rank**0.5 if config.get("use_rslora") else alpha

    def scale_of_whole(self, path: str, name: str) -> float:
        """The scale of a LoKr with whole factors: PEFT scales it, too, by its configuration's alpha / rank."""
        config = self._config(name)
        rank = _of_module(config.get("rank_pattern"), path, config.get("r") or 1)
        default = config.get("alpha") or rank
        return _of_module(config.get("alpha_pattern"), path, default) / rank

    def _config(self, name: str) -> dict[str, Any]:
        return self._configs.get(component_of(name), self._configs[UNET])


def _of_module(patterns: Mapping[str, Any] | None, path: str, default: Any) -> float:
    """The value of the first pattern that a module's path ends with, as PEFT compares them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(value)
    return float(default)


def _sub_config(header: Mapping[str, Any], component: str) -> dict[str, Any]:
    start = f"{component}."
    return {key.removeprefix(start): value for key, value in header.items() if key.startswith(start)}


def read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Tensor names and metadata of a safetensors file, without reading its tensors.

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
    return [name for name in header if name != "__metadata__"], header.get("__metadata__") or {}


def read_adapter(path: Path) -> Adapter:
    """Read an adapter file, or a PEFT folder (adapter_model.safetensors and adapter_config.json).

    Raises:
        AdapterError: Missing, damaged, or not a LoRA.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    extra: dict[str, str] = {}
    try:
        if path.is_dir():
            extra["peft_config"] = (path / "adapter_config.json").read_text(encoding="utf-8")
            path = path / "adapter_model.safetensors"
        names, metadata = read_header(path)
        _require_lora(names)  # before gigabytes are read that are none
        tensors = load(path.read_bytes())  # not memory-mapped: Windows could not replace the file while it is in use
        return parse_adapter(tensors, {**metadata, **extra})
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(
            f"The adapter {path} can't be read: {error}.", "Check the path; the file must be a whole .safetensors file."
        ) from error
    except AdapterError as error:
        raise AdapterError(f"{path.name}: {error.problem}", error.remedy) from None


def _require_lora(names: Collection[str]) -> None:
    """Refuse tensors that are no LoRA, by their names.

    Raises:
        AdapterError: A kind that can't be read yet, or nothing of a LoRA.
    """
    for mark, kind in _OTHER_KINDS.items():
        if any(mark.search(name) for name in names):
            raise AdapterError(
                f"The adapter is of the kind {kind}, which can't be read yet.",
                "Use a LoRA, LoCon, DoRA, LoHa, LoKr or OFT file, or one with full differences.",
            )
    if not any(_split_key(name) for name in names):
        raise AdapterError("The file holds no LoRA.", "Choose an adapter file (LoRA) in safetensors format.")


def write_adapter(path: Path, adapter: Adapter, dtype: torch.dtype) -> None:
    """Write a kohya file atomically, with the hashes that other programs look up.

    Args:
        path: The file.
        adapter: Its metadata is written along; `sshs_*` and `modelspec.hash_sha256` are computed here.
        dtype: Type of the tensors in the file.

    Raises:
        StorageError: The file can't be written.
    """
    tensors = adapter.state_dict(dtype)
    metadata = {name: str(value) for name, value in adapter.metadata.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    with file_written_atomically(path, size) as temporary:  # and not in memory: a merged file may have gigabytes
        save_tensors(temporary, tensors, metadata | _hash_entries(*_UNKNOWN))
        with open(temporary, "r+b") as file:
            _fill_in_hashes(file, metadata)


def file_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash`, computed as kohya and sd-webui-additional-networks do.

    The file is serialised with its `ss_*` metadata only; the first hash is the sha256 of what follows the
    header, the second the first 8 digits of the sha256 of bytes 0x100000 to 0x110000.
    """
    from safetensors.torch import save

    content = save(dict(tensors), _hashed_metadata(metadata))
    return _hashes(io.BytesIO(content), _hashed_metadata(metadata))


def _hashed_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in metadata.items() if name.startswith("ss_")}


def _hash_entries(model_hash: str, legacy_hash: str) -> dict[str, str]:
    return {
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": legacy_hash,
        "modelspec.hash_sha256": f"0x{model_hash}",
    }


def _fill_in_hashes(file: BinaryIO, metadata: Mapping[str, str]) -> None:
    """Put the hashes into the header of a file that was written with `_UNKNOWN` ones, which are as long."""
    found = _hashes(file, _hashed_metadata(metadata))
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    text = file.read(length)
    for unknown, known in zip(_UNKNOWN, found, strict=True):
        text = text.replace(unknown.encode(), known.encode())
    file.seek(8)
    file.write(text)


def _hashes(file: BinaryIO, hashed: Mapping[str, str]) -> tuple[str, str]:
    """The hashes of a file, whatever its metadata, as if it had the hashed metadata alone."""
    file.seek(0)
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    start = file.tell()
    whole = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        whole.update(chunk)
    text = json.dumps(header | {"__metadata__": dict(hashed)}, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    before = len(text).to_bytes(8, "little") + text
    first, last = 0x100000 - len(before), 0x110000 - len(before)
    file.seek(start + max(first, 0))
    region = before[0x100000:0x110000] + file.read(max(last - max(first, 0), 0))
    return whole.hexdigest(), hashlib.sha256(region).hexdigest()[:8]
