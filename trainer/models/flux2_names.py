"""Names of the modules of FLUX.2's transformer: in this pack's network, in diffusers and in the original code.

The network is diffusers' with its query, key and value projections joined, and the last norm's scale and shift in the
order of the original code: so each module of the original code is one of the network's, and its tensors are borrowed
just by renaming. diffusers' own files split these projections and have that norm the other way round: `joined_path`,
`SWAPPED`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """One of the two kinds of blocks.

    Attributes:
        path: The prefix of paths of modules in such a block, in the network and in diffusers.
        original: The same in the original code.
        most: The largest number of such blocks in a published model.
    """

    path: str
    original: str
    most: int


DOUBLE = Blocks("transformer_blocks", "double_blocks", 8)
SINGLE = Blocks("single_transformer_blocks", "single_blocks", 48)

SPLIT_PROJECTIONS = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""A joined projection in a block → the three of diffusers, in the order of its rows."""

LAST_NORM = "norm_out.projection"
SWAPPED = "norm_out.linear"
"""diffusers' name of the last norm's projection, whose rows are scale and shift; `LAST_NORM` has shift and scale."""

_FIXED = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    LAST_NORM: "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_IN_DOUBLE = {
    "attn.to_qkv": "img_attn.qkv",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "attn.to_added_qkv": "txt_attn.qkv",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_IN_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
_PATHS = {name: path for path, name in _FIXED.items()}
_IN_DOUBLE_PATHS = {name: path for path, name in _IN_DOUBLE.items()}
_IN_SINGLE_PATHS = {name: path for path, name in _IN_SINGLE.items()}
_JOINED = {part: joined for joined, parts in SPLIT_PROJECTIONS.items() for part in parts}
BLOCKS = {DOUBLE.path: "double", SINGLE.path: "single"}
"""What paths of modules in blocks begin with → a word for people."""

HEAD = 128  # numbers of an attention head, of which a width is a multiple
_RATIOS = {  # outputs and inputs of modules in blocks, in widths
    "attn.to_qkv": (3, 1),
    "attn.to_added_qkv": (3, 1),
    **dict.fromkeys(_JOINED, (1, 1)),
    "attn.to_out.0": (1, 1),
    "attn.to_add_out": (1, 1),
    "ff.linear_in": (6, 1),
    "ff_context.linear_in": (6, 1),
    "ff.linear_out": (1, 3),
    "ff_context.linear_out": (1, 3),
    "attn.to_qkv_mlp_proj": (9, 1),
    "attn.to_out": (1, 4),
}
_BLOCK = re.compile(rf"^({DOUBLE.path}|{DOUBLE.original}|{SINGLE.path}|{SINGLE.original})\.(\d{{1,2}})\.(.+)$")
UNDERSCORED_WORDS = frozenset(
    word
    for names in (_FIXED, _IN_DOUBLE, _IN_SINGLE, _JOINED)
    for path in (*names, *names.values(), SWAPPED, DOUBLE.path, DOUBLE.original, SINGLE.path, SINGLE.original)
    for word in path.split(".")
    if "_" in word
)
"""The parts of paths that hold underscores themselves."""


def _in_block(path: str) -> tuple[str, int, str] | None:
    """A path's kind of block, the block's number, and the rest; None outside of blocks of published numbers."""
    match = _BLOCK.match(path)
    if match is None:
        return None
    most = DOUBLE.most if match[1] in (DOUBLE.path, DOUBLE.original) else SINGLE.most
    return (match[1], int(match[2]), match[3]) if int(match[2]) < most else None


def original_name(path: str) -> str | None:
    """The original code's name of a module: "transformer_blocks.0.attn.to_qkv" → "double_blocks.0.img_attn.qkv".

    Args:
        path: Its dotted path in the network.

    Returns:
        None for a path without a module in the original code.
    """
    return _renamed(
        path, _FIXED, {DOUBLE.path: (DOUBLE.original, _IN_DOUBLE), SINGLE.path: (SINGLE.original, _IN_SINGLE)}
    )


def network_path(original: str) -> str | None:
    """A module's dotted path in the network from its name in the original code; the inverse of `original_name`."""
    blocks = {DOUBLE.original: (DOUBLE.path, _IN_DOUBLE_PATHS), SINGLE.original: (SINGLE.path, _IN_SINGLE_PATHS)}
    return _renamed(original, _PATHS, blocks)


def _renamed(path: str, fixed: Mapping[str, str], blocks: Mapping[str, tuple[str, Mapping[str, str]]]) -> str | None:
    """A path in the other naming.

    Args:
        path: Dotted path.
        fixed: Path outside of blocks → its other name.
        blocks: Kind of block → its other name, and that of each path inside.
    """
    place = _in_block(path)
    if place is None or place[0] not in blocks:
        return fixed.get(path)
    other, inside = blocks[place[0]]
    return f"{other}.{place[1]}.{inside[place[2]]}" if place[2] in inside else None


def joined_path(path: str) -> tuple[str, int] | None:
    """The joined projection of one of diffusers' three, and which it is: 0 query, 1 key, 2 value; else None."""
    place = _in_block(path)
    if place is None or place[0] != DOUBLE.path or place[2] not in _JOINED:
        return None
    joined = _JOINED[place[2]]
    return f"{place[0]}.{place[1]}.{joined}", SPLIT_PROJECTIONS[joined].index(place[2])


def split_paths(path: str) -> tuple[str, ...] | None:
    """Diffusers' three paths of a joined projection, in the order of its rows; None for any other module."""
    place = _in_block(path)
    if place is None or place[0] != DOUBLE.path or place[2] not in SPLIT_PROJECTIONS:
        return None
    return tuple(f"{place[0]}.{place[1]}.{part}" for part in SPLIT_PROJECTIONS[place[2]])


def is_module(path: str) -> bool:
    """Whether a dotted path, in the network, diffusers or the original code, is that of a module of such a model."""
    return bool(path == SWAPPED or original_name(path) or network_path(path) or joined_path(path))


def fits(path: str, outputs: int, inputs: int) -> bool:
    """Whether a module of that path may have such a weight; FLUX.1 and others have modules of the same names.

    Args:
        path: In the network or in diffusers.
        outputs: Rows of the weight.
        inputs: Columns of the weight.
    """
    place = _in_block(path)
    ratio = _RATIOS.get(place[2]) if place else None
    if ratio is None:
        return True
    width = min(outputs, inputs)
    return width % HEAD == 0 and (outputs, inputs) == (ratio[0] * width, ratio[1] * width)
