"""What the command inspect reports of a file: adapter or base model, modules, ranks, hashes and metadata."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.file_keys import in_file
from ..adapters.keys import embedding_names
from ..adapters.kohya import Adapter, file_hashes, read_adapter
from ..adapters.layers import DORA_SCALE, Layer
from ..adapters.metadata import metadata_summary
from ..adapters.prefixes import component_of
from ..core.errors import AdapterError, UnsupportedModelError, WeightsError
from ..core.figures import text_table
from ..merging.profile import profile_adapter
from ..models.families import identify, layout_of, refuse_foreign_keys
from ..models.families.base import Family
from ..models.families.ldm import UnetLayout
from ..models.open import denoiser_tensors, open_base
from ..models.state_dicts import read_single_file
from .console import printable

_MODULE_TYPE = re.compile(
    r"(attn[12]_to_(?:q|k|v|out_0)|ff_net_(?:0_proj|2)|proj_in|proj_out|conv\d?|conv_shortcut|time_emb_proj"
    r"|self_attn_(?:q|k|v|out)_proj|mlp_fc[12]|(?:img|txt)_(?:attn_qkv|attn_proj|mlp_[02])|linear[12]"
    r"|(?:self|cross)_attn_(?:q|k|v|o|output)_proj|mlp_layer[12]|adaln_modulation_(?:self_attn|cross_attn|mlp)_[12]"
    r"|attention_to_(?:q|k|v|out_0)|feed_forward_w[123]|adaLN_modulation_\d)$"
)


def inspect(path: Path, *, blocks: bool = False) -> dict[str, Any]:
    """Describe a file or folder; plain values, ready for JSON.

    Args:
        path: The file or folder.
        blocks: Also in which blocks an adapter works, for which the singular values of all its layers are computed.

    Raises:
        AdapterError: It is neither an adapter nor a base model that can be read; gives the reason.
    """
    if not os.path.exists(path):
        raise AdapterError(f"{path} does not exist.", "Check the path for a typing error.")
    try:
        adapter = read_adapter(path)
        facts = {"file": str(path), **describe_adapter(adapter)}
        return facts | {"blocks": profile_adapter(adapter)} if blocks else facts
    except AdapterError as error:
        try:
            return _describe_base(path)
        except UnsupportedModelError as unsupported:
            return {"file": str(path), "kind": "base model", "family": unsupported.problem}
        except WeightsError:
            raise error from None


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """Describe an adapter; plain values, ready for JSON."""
    modules: dict[str, Counter[str]] = {}
    for name in adapter.layers:
        match = _MODULE_TYPE.search(name)
        types = modules.setdefault(component_of(name), Counter())
        types[match[1] if match else "other"] += 1
    layers = adapter.layers.values()
    dtypes = {tensor.dtype for layer in layers for tensor in _matrices(layer)}
    model_hash, legacy_hash = file_hashes(in_file(adapter.state_dict()), adapter.metadata)
    return {
        "kind": _kind(adapter),
        "modules": {component: {"count": sum(types.values()), **types} for component, types in modules.items()},
        "rank": sorted({layer.rank for layer in layers}),
        "alpha": sorted({layer.alpha for layer in layers}),
        "dtype": sorted(str(dtype).removeprefix("torch.") for dtype in dtypes),
        "hashes": {"sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash},
        **({"embeddings": embedding_names(adapter.embeddings)} if adapter.embeddings else {}),
        "summary": metadata_summary(adapter.metadata),
        "metadata": dict(sorted(adapter.metadata.items())),
    }


def _kind(adapter: Adapter) -> str:
    """The adapter's kinds; a LoRA that also adapts convolutions larger than 1×1 is called LoCon."""
    convolutions = any(
        layer.kind == "LoRA" and max(layer.shape[2:], default=1) > 1 for layer in adapter.layers.values()
    )
    kinds = adapter.kind.split(", ")
    return ", ".join("LoCon" if kind == "LoRA" and convolutions else kind for kind in kinds)


def _matrices(layer: Layer) -> list[Tensor]:
    return [tensor for part, tensor in layer.tensors().items() if part != DORA_SCALE]


def _describe_base(path: Path) -> dict[str, Any]:
    if path.is_dir():
        base = open_base(path)
        return {"file": str(path), "kind": "base model", "family": base.family.title, "fingerprint": base.fingerprint}
    return {"file": str(path), "kind": "base model", "family": family_of(path).title}


def family_of(path: Path) -> Family:
    """The family of a base model: of a file by its tensors alone, without a tokenizer.

    Raises:
        WeightsError: It can't be read, or is of no supported family.
    """
    if path.is_dir():
        return open_base(path).family
    tensors = read_single_file(path)
    refuse_foreign_keys(tensors)
    denoiser = denoiser_tensors(tensors)
    layout = layout_of(denoiser) or UnetLayout()
    return identify(layout.denoiser_config(denoiser))


def facts_as_text(facts: dict[str, Any]) -> str:
    """The facts of `inspect` as plain text."""
    lines = [f"{facts.get('file', 'adapter')}: {facts['kind']}"]
    for key, value in facts.items():
        if key in ("file", "kind", "metadata", "blocks"):
            continue
        if key == "modules":
            for component, types in value.items():
                counts = ", ".join(f"{name} {count}" for name, count in types.items() if name != "count")
                lines.append(f"  {component}: {types['count']} modules ({counts})")
        elif isinstance(value, dict):
            lines += [f"  {name}: {entry}" for name, entry in value.items()]
        elif isinstance(value, list):
            lines.append(f"  {key}: {', '.join(map(str, value))}")
        else:
            lines.append(f"  {key}: {value}")
    if facts.get("blocks"):
        lines += [f"  {line}" for line in text_table(facts["blocks"]).splitlines()]
    if facts.get("metadata"):
        lines.append("  metadata:")
        lines += [f"    {name} = {str(value)[:200]}" for name, value in facts["metadata"].items()]
    return "\n".join(printable(line) for line in lines)
