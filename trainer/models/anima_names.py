"""Names of the modules of Anima's transformer: in the network, in the original code, and in diffusers.

The network is diffusers' for Cosmos Predict 2, with different names for modules outside blocks (see
`families/anima_network`), so that no other family has modules with the same paths. The conditioner, which computes the
transformer's text input, is part of it, as in the original code: `llm_adapter`, whose names are the same everywhere.
"""

from __future__ import annotations

import re

MOST_BLOCKS = 28
MOST_TEXT_BLOCKS = 6
HEAD = 128  # numbers of an attention head, of which a width is a multiple

OUTSIDE = {
    "x_embedder": "patch_embed",
    "t_embedder": "time_embed",
    "blocks": "transformer_blocks",
    "head_norm": "norm_out",
    "head_linear": "proj_out",
}
"""Part of the network → its name in diffusers."""

CONDITIONER = "llm_adapter"
"""The part of the network that diffusers has as a network of its own, `CONDITIONER_IN_DIFFUSERS`."""

CONDITIONER_IN_DIFFUSERS = "text_conditioner"

BLOCKS = {"blocks": "block"}
"""What paths of modules in blocks begin with → a word for people."""

_FIXED = {
    "x_embedder.proj": "x_embedder.proj.1",
    "t_embedder.t_embedder.linear_1": "t_embedder.1.linear_1",
    "t_embedder.t_embedder.linear_2": "t_embedder.1.linear_2",
    "t_embedder.norm": "t_embedding_norm",
    "head_norm.linear_1": "final_layer.adaln_modulation.1",
    "head_norm.linear_2": "final_layer.adaln_modulation.2",
    "head_linear": "final_layer.linear",
}
_IN_BLOCK = {
    **{
        f"attn{number}.{path}": f"{attention}.{name}"
        for number, attention in ((1, "self_attn"), (2, "cross_attn"))
        for path, name in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out.0", "output_proj"))
    },
    **{
        f"attn{number}.norm_{which}": f"{attention}.{which}_norm"
        for number, attention in ((1, "self_attn"), (2, "cross_attn"))
        for which in "qk"
    },
    "ff.net.0.proj": "mlp.layer1",
    "ff.net.2": "mlp.layer2",
    **{
        f"norm{number}.linear_{layer}": f"adaln_modulation_{what}.{layer}"
        for number, what in ((1, "self_attn"), (2, "cross_attn"), (3, "mlp"))
        for layer in (1, 2)
    },
}
_IN_TEXT_BLOCK = (
    *(f"{attention}.{which}_proj" for attention in ("self_attn", "cross_attn") for which in "qkvo"),
    *("mlp.0", "mlp.2"),
)
_OF_CONDITIONER = ("in_proj", "out_proj")

_BLOCK = re.compile(r"^blocks\.(\d{1,2})\.(.+)$")
_TEXT_BLOCK = re.compile(rf"^{CONDITIONER}\.blocks\.(\d)\.(.+)$")
_FIXED_PATHS = {name: path for path, name in _FIXED.items()}
_IN_BLOCK_PATHS = {name: path for path, name in _IN_BLOCK.items()}
_OWN_IN_DIFFUSERS = re.compile(
    r"^(?:transformer_blocks\.\d+\.(?:attn[12]\.to_|ff\.net\.|norm[123]\.linear_)|time_embed\.t_embedder\.|patch_embed\.|norm_out\.linear_[12]$)"
)
_INSIDE = {name: path for path, name in OUTSIDE.items()}
UNDERSCORED_WORDS = frozenset(
    word
    for path in (
        *(*_FIXED, *_FIXED.values(), *_IN_BLOCK, *_IN_BLOCK.values(), *_IN_TEXT_BLOCK),
        *(*OUTSIDE, *OUTSIDE.values(), CONDITIONER, "out_proj"),
    )
    for word in path.split(".")
    if "_" in word
)
"""The parts of paths that hold underscores themselves."""


def _in_block(path: str) -> tuple[str, str] | None:
    """The block that a path is in, and the rest; None outside of blocks of published numbers."""
    match = _BLOCK.match(path)
    return (f"blocks.{match[1]}", match[2]) if match and int(match[1]) < MOST_BLOCKS else None


def _is_of_conditioner(path: str) -> bool:
    """Whether a path is that of a module of what turns prompts into what the transformer reads."""
    match = _TEXT_BLOCK.match(path)
    if match:
        return int(match[1]) < MOST_TEXT_BLOCKS and match[2] in _IN_TEXT_BLOCK
    return path in {f"{CONDITIONER}.{name}" for name in _OF_CONDITIONER}


def original_name(path: str) -> str | None:
    """The original code's name of a module: "blocks.0.attn1.to_q" → "blocks.0.self_attn.q_proj"; None without one."""
    if _is_of_conditioner(path):
        return path
    place = _in_block(path)
    if place is None:
        return _FIXED.get(path)
    return f"{place[0]}.{_IN_BLOCK[place[1]]}" if place[1] in _IN_BLOCK else None


def network_path(original: str) -> str | None:
    """A module's dotted path in the network from its name in the original code; the inverse of `original_name`."""
    if _is_of_conditioner(original):
        return original
    place = _in_block(original)
    if place is None:
        return _FIXED_PATHS.get(original)
    return f"{place[0]}.{_IN_BLOCK_PATHS[place[1]]}" if place[1] in _IN_BLOCK_PATHS else None


def path_of_tensor(original: str) -> str | None:
    """The network's name of a tensor, from the original code's: "blocks.0.mlp.layer1.weight"; None if it is unknown."""
    if original.startswith(f"{CONDITIONER}."):
        return original
    module, _, kind = original.rpartition(".")
    path = network_path(module)
    return f"{path}.{kind}" if path else None


def path_from_diffusers(name: str) -> str:
    """The network's name of a module or tensor from that in diffusers; inside blocks they are the same."""
    first, dot, rest = name.partition(".")
    return f"{_INSIDE.get(first, first)}{dot}{rest}"


def name_in_diffusers(path: str) -> str:
    """Diffusers' name of a module or tensor from that in the network; the inverse of `path_from_diffusers`."""
    first, dot, rest = path.partition(".")
    return f"{OUTSIDE.get(first, first)}{dot}{rest}"


def is_diffusers_name(path: str) -> bool:
    """Whether this is diffusers' name for a module of Anima only; it shares some names with other families."""
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
    if not inside.startswith("attn"):
        return True
    # what diffusers calls alike in LTX-Video, PixArt and Sana attends to prompts as wide as the picture's tokens
    is_square = not inside.startswith(("attn2.to_k", "attn2.to_v"))
    return outputs > 0 and outputs % HEAD == 0 and (outputs == inputs) is is_square
