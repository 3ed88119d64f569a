"""The kohya adapter file: module names, tensors, hashes, reading and atomic writing.

A module `down_blocks.0.attentions.0.proj_in` of the UNet is named `lora_unet_down_blocks_0_attentions_0_proj_in`;
its tensors are `<name>.lora_down.weight` (rank, in[, k, k]), `<name>.lora_up.weight` (out, rank[, 1, 1]) and
`<name>.alpha` (0-D). The layer adds alpha / rank · up · down to the module's weight.

Source: networks/lora.py of kohya-ss/sd-scripts; files of diffusers and PEFT are read, too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterError
from .files import write_atomic

logger = logging.getLogger("dreambooth_lora")

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_DIFFERENCES = "full differences"  # beside a LoRA, as ComfyUI's own trainer writes them, left out with a warning
_OTHER_KINDS = {
    re.compile(r"\.hada_w1_a$"): "LoHa",
    re.compile(r"\.lokr_w1(_a)?$"): "LoKr",
    re.compile(r"\.(oft_blocks|oft_diag|oft_R.*|oft_r.*)$"): "OFT",
    re.compile(r"\.(dora_scale|lora_magnitude_vector.*)$"): "DoRA",
    re.compile(r"\.a1\.weight$"): "GLoRA",
    re.compile(r"\.diff(_b)?$"): _DIFFERENCES,
}
_BROKEN = "Download or copy the adapter file again, or choose another."


@dataclass(frozen=True)
class LoraLayer:
    """The adapter of one module.

    Attributes:
        down: (rank, in) or (rank, in, k, k).
        up: (out, rank) or (out, rank, 1, 1).
        alpha: Numerator of the scale.
        mid: (rank, rank, k, k), the core of a Tucker-decomposed convolution; None otherwise.
    """

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of the factorisation."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """What the layer adds to its module's weight at strength 1: float32, (out, in) or (out, in, k, k)."""
        down, up = self.down.float(), self.up.float()
        scale = self.alpha / self.rank
        if self.mid is not None:
            return scale * torch.einsum("or,rskl,si->oikl", up.flatten(1), self.mid.float(), down.flatten(1))
        return scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        layers: kohya module name → layer.
        metadata: The file's metadata; strings.
    """

    layers: Mapping[str, LoraLayer]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors under kohya's names, contiguous, on the CPU; matrices in `dtype` if given, alphas in float32."""
        tensors: dict[str, Tensor] = {}
        for name in sorted(self.layers):
            layer = self.layers[name]
            parts = {"lora_down.weight": layer.down, "lora_up.weight": layer.up, "lora_mid.weight": layer.mid}
            for part, tensor in parts.items():
                if tensor is not None:
                    tensors[f"{name}.{part}"] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(layer.alpha)
        return tensors


def module_name(component: str, path: str) -> str:
    """Kohya's name of a module.

    Args:
        component: "unet" or "text_encoder".
        path: The module's dotted path in diffusers or transformers (with or without "text_model.").
    """
    if component == "text_encoder" and not path.startswith("text_model."):
        path = f"text_model.{path}"  # transformers 5 dropped the level that every adapter file has
    return PREFIXES[component] + path.replace(".", "_")


def parse_adapter(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Adapter:
    """Read an adapter from named tensors in kohya's, diffusers' or PEFT's naming.

    Args:
        tensors: Names and tensors, as they stand in a file or on a LORA_MODEL wire.
        metadata: The file's metadata.

    Raises:
        AdapterError: No LoRA in it, a kind that can't be read yet, or half of a layer is missing.
    """
    _require_lora(tensors)
    metadata = dict(metadata or {})
    alphas = _Alphas(metadata)
    parts: dict[str, dict[str, Tensor]] = {}
    paths: dict[str, str] = {}
    left_out = []
    for key, tensor in tensors.items():
        split = _split_key(key)
        if split is None:
            left_out.append(key)
        else:
            parts.setdefault(split.module, {})[split.part] = tensor
            paths[split.module] = split.path
    if left_out:
        logger.warning(
            "%d tensors of the adapter are no part of a LoRA and are left out: %s", len(left_out), left_out[0]
        )
    layers = {name: _layer(name, found, alphas, paths[name]) for name, found in parts.items()}
    return Adapter(layers, metadata)


def _layer(name: str, found: Mapping[str, Tensor], alphas: _Alphas, path: str) -> LoraLayer:
    """One module's layer from its tensors.

    Raises:
        AdapterError: Half of it is missing, the halves don't belong together, or a number is not finite.
    """
    if "down" not in found or "up" not in found:
        lacking = "up" if "down" in found else "down"
        raise AdapterError(f"The adapter is incomplete: {name} lacks its {lacking} tensor.", _BROKEN)
    down, up, mid = found["down"], found["up"], found.get("mid")
    if min(down.ndim, up.ndim) < 2 or up.shape[1] != down.shape[0]:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise AdapterError(f"The adapter is damaged: the halves of {name} have the shapes {shapes}.", _BROKEN)
    alpha = float(found["alpha"]) if "alpha" in found else alphas.of(path, name, down.shape[0])
    for tensor in (down, up, mid, torch.tensor(alpha)):
        if tensor is not None and not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"The adapter is damaged: {name} has numbers that are not finite.", _BROKEN)
    return LoraLayer(down, up, alpha, mid)


_KOHYA_PART = re.compile(r"^(lora_(?:unet|te\d?)_[^.]+)\.(?:lora_(down|up|mid)\.weight|(alpha))$")
_COMFYUI_PART = re.compile(r"^diffusion_model\.(.+)\.(?:lora_(down|up|mid)\.weight|(alpha))$")
_DIFFUSERS_PART = re.compile(
    r"^(.+?)(?:\.lora_(A|B)(?:\.default)?\.weight|\.lora(?:_linear_layer)?\.(down|up)\.weight"
    r"|_lora\.(down|up)\.weight|\.(alpha))$"
)


@dataclass(frozen=True)
class _Key:
    """What a tensor's name says: kohya's name of the module, "down", "up", "mid" or "alpha", and the dotted path."""

    module: str
    part: str
    path: str


def _split_key(key: str) -> _Key | None:
    """Read a tensor's name; None if it is no part of a LoRA."""
    kohya = _KOHYA_PART.match(key)
    if kohya:
        return _Key(kohya[1], kohya[2] or kohya[3], kohya[1])
    host = _COMFYUI_PART.match(key)
    if host:
        return _Key(PREFIXES["unet"] + host[1].replace(".", "_"), host[2] or host[3], host[1])
    other = _DIFFUSERS_PART.match(key)
    if not other:
        return None
    path, matrix = other[1], other[2]
    part = {"A": "down", "B": "up"}[matrix] if matrix else other[3] or other[4] or other[5]
    path = path.removeprefix("base_model.model.")
    text = path.startswith(("text_encoder.", "text_model.", "encoder.layers."))
    component = "text_encoder" if text else "unet"
    path = path.removeprefix(f"{component}.").replace(".processor.", ".")
    path = re.sub(r"\.to_out$", ".to_out.0", path)
    return _Key(module_name(component, path), part, path)


class _Alphas:
    """Alphas that stand in metadata rather than beside the tensors: diffusers' header and PEFT's configuration."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        header = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        self._unet: dict[str, Any] = _sub_config(header, "unet")
        self._text: dict[str, Any] = _sub_config(header, "text_encoder")
        if "peft_config" in metadata:
            self._unet = self._text = json.loads(metadata["peft_config"])

    def of(self, path: str, name: str, rank: int) -> float:
        """The alpha of a module, by its dotted path, as PEFT finds it."""
        config = self._text if name.startswith(PREFIXES["text_encoder"]) else self._unet
        alpha = float(config.get("lora_alpha") or rank)
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = float(value)
                break
        return alpha * rank**0.5 if config.get("use_rslora") else alpha


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
    lora = any(_split_key(name) for name in names)
    for mark, kind in _OTHER_KINDS.items():
        if any(mark.search(name) for name in names) and not (lora and kind == _DIFFERENCES):
            raise AdapterError(f"The adapter is of the kind {kind}, which can't be read yet.", "Use a plain LoRA file.")
    if not lora:
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
    from safetensors.torch import save

    tensors = adapter.state_dict(dtype)
    metadata = {name: str(value) for name, value in adapter.metadata.items()}
    model_hash, legacy_hash = file_hashes(tensors, metadata)
    metadata |= {
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": legacy_hash,
        "modelspec.hash_sha256": f"0x{model_hash}",
    }
    write_atomic(path, save(tensors, metadata))


def file_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash`, computed as kohya and sd-webui-additional-networks do.

    The file is serialised with its `ss_*` metadata only; the first hash is the sha256 of what follows the
    header, the second the first 8 digits of the sha256 of bytes 0x100000 to 0x110000.
    """
    from safetensors.torch import save

    content = save(dict(tensors), {name: value for name, value in metadata.items() if name.startswith("ss_")})
    start = 8 + int.from_bytes(content[:8], "little")
    legacy = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    return hashlib.sha256(content[start:]).hexdigest(), legacy
