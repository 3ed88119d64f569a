"""Names of the modules of Krea 2's transformer: in the network, in the original code, and in diffusers.

The network is diffusers', with the original code's names for modules outside blocks (see
`families/krea2_network`), so that no other family has modules with the same paths.
"""

from __future__ import annotations

import re

MOST_BLOCKS = 28
HEAD = 128  # numbers of an attention head, of which a width is a multiple

OUTSIDE = {
    "first": "img_in",
    "tmlp": "time_embed",
    "tproj": "time_mod_proj",
    "txtfusion": "text_fusion",
    "txtmlp": "txt_in",
    "blocks": "transformer_blocks",
    "last": "final_layer",
}
"""Part of the network → its name in diffusers."""

BLOCKS = {"blocks": "block"}
"""What paths of modules in blocks begin with → a word for people."""

_FIXED = {
    "first": "first",
    "tmlp.linear_1": "tmlp.0",
    "tmlp.linear_2": "tmlp.2",
    "tproj": "tproj.1",
    "txtfusion.projector": "txtfusion.projector",
    "txtmlp.linear_1": "txtmlp.1",
    "txtmlp.linear_2": "txtmlp.3",
    "last.linear": "last.linear",
}
_IN_BLOCK = {
    "attn.to_q": "attn.wq",
    "attn.to_k": "attn.wk",
    "attn.to_v": "attn.wv",
    "attn.to_gate": "attn.gate",
    "attn.to_out.0": "attn.wo",
    "ff.gate": "mlp.gate",
    "ff.up": "mlp.up",
    "ff.down": "mlp.down",
}
# of tensors that no linear layer has: those of norms and of the modulation
_FIXED_TENSORS = {
    "txtmlp.norm.weight": "txtmlp.0.scale",
    "last.norm.weight": "last.norm.scale",
    "last.scale_shift_table": "last.modulation.lin",
}
_TENSORS_IN_BLOCK = {
    "norm1.weight": "prenorm.scale",
    "norm2.weight": "postnorm.scale",
    "attn.norm_q.weight": "attn.qknorm.qnorm.scale",
    "attn.norm_k.weight": "attn.qknorm.knorm.scale",
    "scale_shift_table": "mod.lin",
}
MODULATION = "scale_shift_table"
"""The last part of the name of a block's modulation, which is flat in the original code."""

_BLOCK = re.compile(r"^(blocks|txtfusion\.(?:layerwise|refiner)_blocks)\.(\d{1,2})\.(.+)$")
_FIXED_PATHS = {name: path for path, name in _FIXED.items()}
_IN_BLOCK_PATHS = {name: path for path, name in _IN_BLOCK.items()}
_FIXED_TENSOR_PATHS = {name: path for path, name in _FIXED_TENSORS.items()}
_TENSOR_PATHS_IN_BLOCK = {name: path for path, name in _TENSORS_IN_BLOCK.items()}
_OWN_IN_DIFFUSERS = re.compile(
    r"^(?:text_fusion\.|time_mod_proj$|txt_in\.linear_|transformer_blocks\.\d+\.(?:attn\.to_gate|ff\.(?:gate|up|down))$)"
)
_INSIDE = {name: path for path, name in OUTSIDE.items()}
UNDERSCORED_WORDS = frozenset(
    word
    for path in (*_FIXED, *_IN_BLOCK, *OUTSIDE.values(), "layerwise_blocks", "refiner_blocks")
    for word in path.split(".")
    if "_" in word
)
"""The parts of paths that hold underscores themselves."""


def _in_block(path: str) -> tuple[str, str] | None:
    """The block that a path is in, and the rest; None outside of blocks of published numbers."""
    match = _BLOCK.match(path)
    if match is None:
        return None
    most = MOST_BLOCKS if match[1] == "blocks" else 2
    return (f"{match[1]}.{match[2]}", match[3]) if int(match[2]) < most else None


def original_name(path: str) -> str | None:
    """The original code's name of a module: "blocks.0.attn.to_q" → "blocks.0.attn.wq"; None without one."""
    place = _in_block(path)
    if place is None:
        return _FIXED.get(path)
    return f"{place[0]}.{_IN_BLOCK[place[1]]}" if place[1] in _IN_BLOCK else None


def network_path(original: str) -> str | None:
    """A module's dotted path in the network from its name in the original code; the inverse of `original_name`."""
    place = _in_block(original)
    if place is None:
        return _FIXED_PATHS.get(original)
    return f"{place[0]}.{_IN_BLOCK_PATHS[place[1]]}" if place[1] in _IN_BLOCK_PATHS else None


def path_of_tensor(original: str) -> str | None:
    """The network's name of a tensor from its name in the original code, "blocks.0.attn.wq.weight"; None if unknown."""
    module, _, kind = original.rpartition(".")
    path = network_path(module)
    if path:
        return f"{path}.{kind}"
    place = _in_block(original)
    if place is None:
        return _FIXED_TENSOR_PATHS.get(original)
    return f"{place[0]}.{_TENSOR_PATHS_IN_BLOCK[place[1]]}" if place[1] in _TENSOR_PATHS_IN_BLOCK else None


def path_from_diffusers(name: str) -> str:
    """The network's name of a module or tensor from that in diffusers; inside blocks they are the same."""
    first, dot, rest = name.partition(".")
    return f"{_INSIDE.get(first, first)}{dot}{rest}"


def name_in_diffusers(path: str) -> str:
    """Diffusers' name of a module or tensor from that in the network; the inverse of `path_from_diffusers`."""
    first, dot, rest = path.partition(".")
    return f"{OUTSIDE.get(first, first)}{dot}{rest}"


def is_diffusers_name(path: str) -> bool:
    """Whether this is diffusers' name for a module of Krea 2 only; it shares some names with other families."""
    return _OWN_IN_DIFFUSERS.match(path) is not None


def is_module(path: str) -> bool:
    """Whether a dotted path, in the network or in the original code, is that of a module of such a model."""
    return bool(original_name(path) or network_path(path))


def fits(path: str, outputs: int, inputs: int) -> bool:
    """Whether a module of that path may have such a weight.

    Args:
        path: In the network or in the original code.
        outputs: Rows of the weight.
        inputs: Columns of the weight.
    """
    place = _in_block(path)
    if place is None:
        return True
    inside = _IN_BLOCK_PATHS.get(place[1], place[1])
    if inside in ("attn.to_q", "attn.to_gate", "attn.to_out.0"):
        return outputs == inputs
    if inside in ("attn.to_k", "attn.to_v"):
        return outputs > 0 and inputs % outputs == 0
    return True
