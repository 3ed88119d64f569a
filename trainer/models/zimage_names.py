"""Names of the modules of Z-Image's transformer: in diffusers, whose network this pack uses, and in the original code.

The original code's files, which are ComfyUI's, have query, key and value projections in one tensor; the network's three
are views of it.
"""

from __future__ import annotations

import re

BLOCKS = {"layers": "layer", "noise_refiner": "noise-refiner", "context_refiner": "context-refiner"}
"""What paths of modules in blocks begin with → a word for people."""

MOST_BLOCKS = 30
HEAD = 128  # numbers of an attention head, of which a width is a multiple
JOINED = "attention.qkv"
PARTS = ("attention.to_q", "attention.to_k", "attention.to_v")
"""The modules in a block that the original code joins, in the order of the joined weight's rows."""

_FIXED = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    "cap_embedder.0": "cap_embedder.0",
    "cap_embedder.1": "cap_embedder.1",
    "t_embedder.mlp.0": "t_embedder.mlp.0",
    "t_embedder.mlp.2": "t_embedder.mlp.2",
}
_IN_BLOCK = {
    "attention.to_out.0": "attention.out",
    "attention.norm_q": "attention.q_norm",
    "attention.norm_k": "attention.k_norm",
    **{
        name: name
        for name in (
            *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"),
            *("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"),
        )
    },
}
_FIXED_PATHS = {name: path for path, name in _FIXED.items()}
_IN_BLOCK_PATHS = {name: path for path, name in _IN_BLOCK.items()}
_BLOCK = re.compile(rf"^({'|'.join(BLOCKS)})\.(\d{{1,2}})\.(.+)$")
# of the original code's names those that FLUX.2 has, too, in diffusers or in its original code
_SHARED = ("x_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1")
UNDERSCORED_WORDS = frozenset(
    word
    for names in (_FIXED, _IN_BLOCK, PARTS, BLOCKS)
    for path in (*names, *(names.values() if isinstance(names, dict) else ()))
    for word in path.split(".")
    if "_" in word
)
"""The parts of paths that hold underscores themselves."""


def _in_block(path: str) -> tuple[str, str] | None:
    """The block that a path is in, and the rest; None outside of blocks of published numbers."""
    match = _BLOCK.match(path)
    return (f"{match[1]}.{match[2]}", match[3]) if match and int(match[2]) < MOST_BLOCKS else None


def network_path(original: str) -> str | None:
    """A module's dotted path in the network from its name in the original code.

    Returns:
        None for a name that the original code does not have, and for joined projections, which are three modules.
    """
    place = _in_block(original)
    if place is None:
        return None if original in _SHARED else _FIXED_PATHS.get(original)
    return f"{place[0]}.{_IN_BLOCK_PATHS[place[1]]}" if place[1] in _IN_BLOCK_PATHS else None


def fixed_path(original: str) -> str | None:
    """The network's path of a module outside of blocks, from its name in the original code; None for any other.

    Some of these names belong to other families in diffusers; `network_path` leaves those out.
    """
    return _FIXED_PATHS.get(original)


def is_in_block(path: str) -> bool:
    """Whether a dotted path is that of a module in a block, by a name that no other family has."""
    return _in_block(path) is not None and is_module(path)


def paths_of_tensor(name: str) -> tuple[str, ...]:
    """The network's paths of a weight or bias from its name in the original code's files.

    Args:
        name: Of a module, such as "layers.0.attention.qkv".

    Returns:
        Three for joined projections, each a third of the rows, else one; none if the name is unknown.
    """
    parts = split_paths(name)
    if parts:
        return parts
    path = _FIXED_PATHS.get(name) if _in_block(name) is None else network_path(name)
    return (path,) if path else ()


def original_name(path: str) -> str | None:
    """The original code's name of a module that is separate there: the inverse of `network_path`; None for others."""
    place = _in_block(path)
    if place is None:
        return _FIXED.get(path)
    return f"{place[0]}.{_IN_BLOCK[place[1]]}" if place[1] in _IN_BLOCK else None


def split_paths(original: str) -> tuple[str, ...] | None:
    """The network's three paths of a projection that the original code joins; None for any other module."""
    place = _in_block(original)
    return tuple(f"{place[0]}.{part}" for part in PARTS) if place and place[1] == JOINED else None


def is_network_path(path: str) -> bool:
    """Whether a dotted path is that of a module of the network, which is named as in diffusers."""
    place = _in_block(path)
    return path in _FIXED if place is None else place[1] in (*_IN_BLOCK, *PARTS)


def is_module(path: str) -> bool:
    """Whether a dotted path, in the network or in the original code, is that of a module of such a model."""
    return bool(is_network_path(path) or network_path(path) or split_paths(path))


def fits(path: str, outputs: int, inputs: int) -> bool:
    """Whether a module of that path may have such a weight; Lumina 2 has modules of the same names.

    Args:
        path: In the network or in the original code.
        outputs: Rows of the weight.
        inputs: Columns of the weight.
    """
    place = _in_block(path)
    if place is None or place[1].startswith("adaLN"):
        return True
    width = min(outputs, inputs)
    ratios = {JOINED: (3 * width, width), "feed_forward.w2": (width, 8 * width // 3)}
    ratios |= dict.fromkeys(("feed_forward.w1", "feed_forward.w3"), (8 * width // 3, width))
    return width % HEAD == 0 and (outputs, inputs) == ratios.get(place[1], (width, width))
