"""Tensor keys in the files of families for which kohya's names are not enough.

ComfyUI does not know musubi-tuner's names of Z-Image's modules, and diffusers does not know the fused ones that ComfyUI
would accept with kohya's prefix. All read "diffusion_model.layers.0.attention.to_q.lora_A.weight", as ai-toolkit writes
it, with an alpha.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..models.zimage_names import is_network_path
from .keys import is_embedding
from .module_paths import module_name, module_path
from .prefixes import UNET

_PREFIX = "diffusion_model."
_PARTS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def in_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter by their keys in its file.

    Args:
        tensors: By kohya's names, "<module>.<part>".
    """
    return {_key_in_file(key): tensor for key, tensor in tensors.items()}


def _key_in_file(key: str) -> str:
    if is_embedding(key):
        return key
    name, _, part = key.partition(".")
    path = module_path(name)
    if path.component != UNET or not is_network_path(path.path):
        return key
    return f"{_PREFIX}{path.path}.{_PARTS.get(part, part)}"


def kohya_key(stem: str) -> str:
    """Kohya's name of a module from its name in such a file; any other name unchanged."""
    path = stem.removeprefix(_PREFIX)
    return module_name(UNET, path) if stem.startswith(_PREFIX) and is_network_path(path) else stem
