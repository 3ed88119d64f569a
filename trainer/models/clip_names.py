"""Names of CLIP's tensors and modules: transformers 4's and 5's, and OpenCLIP's.

Everywhere in this pack a CLIP has the names of transformers 4, in which the text tower is the level "text_model.".
transformers 5 dropped that level from `CLIPTextModel`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import Tensor

TEXT_TOWER = "text_model."
VISION_TOWER = "vision_model."
_TEXT_PROJECTION = "text_projection"  # stands beside the tower in every version
_OUTSIDE_LAYERS = {
    "token_embedding": "embeddings.token_embedding",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "ln_final": "final_layer_norm",
}
_INSIDE_LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_PARAMETERS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_LAYER = re.compile(r"^transformer\.resblocks\.(\d+)\.(.+)$")
_TEXT_MODULE = re.compile(
    r"text_projection|text_model\.(?:final_layer_norm"
    r"|encoder\.layers\.\d{1,2}\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12]|layer_norm[12]))"
)
_TEXT_WORDS = re.compile(
    r"text_model\.encoder\.layers(\.(?:\d{1,2}|self_attn|[qkv]_proj|out_proj|mlp|fc[12]|layer_norm[12]))+"
)
_INSIDE_TOWER = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "final_layer_norm.")
ValueT = TypeVar("ValueT")


def with_text_tower(name: str) -> str:
    """A module's or tensor's name in a text encoder, with the level that transformers 5 dropped."""
    first = name.partition(".")[0]
    return name if first in ("text_model", _TEXT_PROJECTION) else TEXT_TOWER + name


def is_text_module(path: str) -> bool:
    """Whether a dotted path with the text tower is that of a module of a CLIP's text encoder, norms included."""
    return _TEXT_MODULE.fullmatch(path) is not None


def has_words_of_text_encoder(path: str) -> bool:
    """Whether a dotted path with the text tower has only words of a CLIP's text encoder."""
    return is_text_module(path) or _TEXT_WORDS.fullmatch(path) is not None


def without_text_tower(name: str) -> str:
    """A module's or tensor's name in a text encoder, as in transformers 5."""
    return name.removeprefix(TEXT_TOWER)


def names_as_in(network: Collection[str], tensors: Mapping[str, ValueT]) -> dict[str, ValueT]:
    """A text encoder's tensors with the names of another one, whichever version of transformers wrote either.

    Args:
        network: Names of the other one's tensors.
        tensors: Name → tensor; a name that the other one has in neither form is converted like the others.
    """
    has_tower = any(name.startswith(TEXT_TOWER) for name in network)
    rename = with_text_tower if has_tower else without_text_tower
    return {rename(name): tensor for name, tensor in tensors.items()}


def in_transformers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a CLIP, or of one of its towers, to those of transformers' full CLIP.

    Args:
        tensors: With the names of OpenCLIP and of OpenAI's own code, or transformers' with or without the tower's
            prefix. None is copied.

    Returns:
        All tensors except `position_ids`; unknown names are kept.
    """
    if "visual.class_embedding" in tensors or "token_embedding.weight" in tensors:
        return _from_open_clip(tensors)
    tower = ""
    if "embeddings.class_embedding" in tensors:
        tower = VISION_TOWER
    elif "embeddings.token_embedding.weight" in tensors:
        tower = TEXT_TOWER
    return {
        f"{tower}{name}" if name.startswith(_INSIDE_TOWER) else name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("position_ids")
    }


def _from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for name, tensor in tensors.items():
        tower = VISION_TOWER if name.startswith("visual.") else TEXT_TOWER
        inner = name.removeprefix("visual.")
        layer = _LAYER.match(inner)
        if name in _PROJECTIONS:
            named[_PROJECTIONS[name]] = tensor.t()
        elif inner in _PARAMETERS:
            named[tower + _PARAMETERS[inner]] = tensor
        elif layer and layer[2].startswith("attn.in_proj_"):
            kind = layer[2].removeprefix("attn.in_proj_")
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                named[f"{tower}encoder.layers.{layer[1]}.self_attn.{letter}_proj.{kind}"] = rows
        else:
            start = f"encoder.layers.{layer[1]}." if layer else ""
            module, _, kind = (layer[2] if layer else inner).rpartition(".")
            known = (_INSIDE_LAYERS if layer else _OUTSIDE_LAYERS).get(module)
            named[f"{tower}{start}{known}.{kind}" if known else name] = tensor
    return named
