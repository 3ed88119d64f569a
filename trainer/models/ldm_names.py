"""Names of a UNet's modules in the original code ("input_blocks.1.1.proj_in"), from diffusers', and back.

Both vocabularies are closed: `is_unet_module` knows every module with weights that a UNet of Stable Diffusion's kind
has, norms included, whatever its numbers of levels, layers and blocks; `has_words_of_unet` asks for less.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

ORIGINAL_BLOCKS = ("input_blocks", "middle_block", "output_blocks")
DIFFUSERS_BLOCKS = ("down_blocks", "mid_block", "up_blocks")
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_FIXED = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_N = r"\d{1,2}"
_IN_TRANSFORMER = (
    rf"(?:norm|proj_in|proj_out|transformer_blocks\.{_N}\."
    r"(?:norm[123]|attn[12]\.(?:to_[qkv]|to_out\.0)|ff\.net\.(?:0\.proj|2)))"
)
_IN_RESNET = "(?:" + "|".join(_RESNET) + ")"
_IN_ORIGINAL_RESNET = "(?:" + "|".join(map(re.escape, _RESNET.values())) + ")"
_DIFFUSERS_MODULE = re.compile(
    "|".join(map(re.escape, _FIXED))
    + rf"|(?:(?:down|up)_blocks\.{_N}|mid_block)\.(?:resnets\.{_N}\.{_IN_RESNET}|attentions\.{_N}\.{_IN_TRANSFORMER})"
    rf"|(?:down_blocks\.{_N}\.downsamplers|up_blocks\.{_N}\.upsamplers)\.0\.conv"
)
_ORIGINAL_MODULE = re.compile(
    "|".join(map(re.escape, _FIXED.values()))
    + rf"|(?:(?:input|output)_blocks\.{_N}\.0|middle_block\.[02])\.{_IN_ORIGINAL_RESNET}"
    rf"|(?:(?:input|output)_blocks\.{_N}|middle_block)\.1\.{_IN_TRANSFORMER}"
    rf"|input_blocks\.{_N}\.0\.op|output_blocks\.{_N}\.[12]\.conv"
)
_DIFFUSERS_BEGINNINGS = {*DIFFUSERS_BLOCKS, *(path.partition(".")[0] for path in _FIXED)}
_ORIGINAL_BEGINNINGS = {*ORIGINAL_BLOCKS, *(name.partition(".")[0] for name in _FIXED.values())}
_TRANSFORMER_WORDS = {"norm", "proj_in", "proj_out", "transformer_blocks", "norm1", "norm2", "norm3", "attn1", "attn2"}
_TRANSFORMER_WORDS |= {"to_q", "to_k", "to_v", "to_out", "ff", "net", "proj"}
_DIFFUSERS_WORDS = _TRANSFORMER_WORDS | {*_RESNET, "resnets", "attentions", "downsamplers", "upsamplers", "conv"}
_DIFFUSERS_WORDS |= {"linear_1", "linear_2"}
_ORIGINAL_WORDS = _TRANSFORMER_WORDS | {name.partition(".")[0] for name in _RESNET.values()} | {"op", "conv"}
_PART = re.compile(r"^(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.")


def is_unet_module(path: str) -> bool:
    """Whether a dotted path, in diffusers or the original code, is that of a module of such a UNet."""
    return any(pattern.fullmatch(path) for pattern in (_DIFFUSERS_MODULE, _ORIGINAL_MODULE))


def has_words_of_unet(path: str) -> bool:
    """Whether a dotted path begins like a module of such a UNet and has only words of one vocabulary."""
    first, *others = path.split(".")
    return any(
        first in beginnings and all(word in words or re.fullmatch(_N, word) for word in others)
        for beginnings, words in ((_DIFFUSERS_BEGINNINGS, _DIFFUSERS_WORDS), (_ORIGINAL_BEGINNINGS, _ORIGINAL_WORDS))
    )


def original_names(paths: Collection[str], layers_per_block: int) -> dict[str, str]:
    """The original code's name of every module.

    Args:
        paths: Dotted paths in diffusers of all modules of a UNet; those of attention decide the numbers of others.
        layers_per_block: Residual layers per level on the way down.

    Returns:
        Path in diffusers → path in the original code. Paths that have no counterpart there are left out.
    """
    attention_levels = {
        path.split(".")[1] for path in paths if path.startswith("up_blocks.") and ".attentions." in path
    }
    names = {path: _FIXED.get(path) or _original_name(path, layers_per_block + 1, attention_levels) for path in paths}
    return {path: name for path, name in names.items() if name}


def _original_name(path: str, blocks_per_level: int, attention_levels: Collection[str]) -> str | None:
    """The name of a module inside a block; `attention_levels` are the numbers of the up blocks with attention."""
    match = _PART.match(path)
    if not match:
        return None
    side, level, kind = match.groups()
    rest = path[match.end() :]
    if kind == "downsamplers":
        return f"input_blocks.{blocks_per_level * (int(level) + 1)}.0.op" if rest == "0.conv" else None
    if kind == "upsamplers":
        block = blocks_per_level * int(level) + blocks_per_level - 1
        index = 2 if level in attention_levels else 1
        return f"output_blocks.{block}.{index}.conv" if rest == "0.conv" else None
    number, _, inner = rest.partition(".")
    if kind == "resnets":
        inner = _RESNET.get(inner, inner)
    if not inner:
        return None
    index = 0 if kind == "resnets" else 1
    if side == "mid_block":
        return f"middle_block.{2 * int(number) + index}.{inner}"
    if side == "down_blocks":
        return f"input_blocks.{blocks_per_level * int(level) + int(number) + 1}.{index}.{inner}"
    return f"output_blocks.{blocks_per_level * int(level) + int(number)}.{index}.{inner}"


def published_name(path: str, depths: Sequence[int]) -> str | None:
    """The original code's name of a module of a published UNet, by its path in diffusers.

    Args:
        path: Dotted path in diffusers.
        depths: For each level on the way down, the number of transformer blocks in its attention layers.
    """
    attentions = [f"up_blocks.{level}.attentions.0" for level, depth in enumerate(reversed(depths)) if depth]
    return original_names([path, *attentions], layers_per_block=2).get(path)


def is_in_published(path: str, depths: Sequence[int]) -> bool:
    """Whether published UNets have a module of that path in a block; arguments as of `published_name`."""
    block = re.match(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.([a-z]+)\.(\d+)(?:\.transformer_blocks\.(\d+))?", path)
    if block is None:
        return False
    direction, level, kind, layer, depth = block.groups()
    if direction is None:
        in_direction: Sequence[int] = [max(depths)]
        layers = {"resnets": 2}.get(kind, 1)
    else:
        in_direction = depths if direction == "down" else depths[::-1]
        layers = {"down": 2, "up": 3}[direction]
    own_depth = in_direction[int(level or 0)] if int(level or 0) < len(in_direction) else 0
    if kind == "attentions" and int(depth or 0) >= own_depth:
        return False
    return int(level or 0) < len(in_direction) and int(layer) < layers


_ORIGINAL = re.compile(r"^(?:(input|output)_blocks\.(\d+)|middle_block)\.(\d+)(?:\.(.+))?$")


def diffusers_name(original: str, layers_per_block: int = 2) -> str | None:
    """A module's name in diffusers from the original code's; the inverse of `original_names`.

    Args:
        original: Dotted path in the original code.
        layers_per_block: Residual layers per level on the way down; two in Stable Diffusion 1, 2 and XL.

    Returns:
        Dotted path in diffusers; None for a name that the original code does not have.
    """
    fixed = next((path for path, name in _FIXED.items() if name == original), None)
    match = _ORIGINAL.match(original)
    if fixed or not match:
        return fixed
    side = match[1]
    number = int(match[2] or 0)
    index = int(match[3])
    rest = match[4] or ""
    if side is None:
        middle = "attentions.0" if index == 1 else f"resnets.{index // 2}"
        return f"mid_block.{middle}.{_inner(rest, index)}".strip(".")
    level, layer = divmod(number - 1 if side == "input" else number, layers_per_block + 1)
    if side == "input" and rest == "op":
        return f"down_blocks.{level}.downsamplers.0.conv"
    if side == "output" and rest == "conv":
        return f"up_blocks.{level}.upsamplers.0.conv"
    direction = "down" if side == "input" else "up"
    kind = "attentions" if index == 1 else "resnets"
    return f"{direction}_blocks.{level}.{kind}.{layer}.{_inner(rest, index)}".strip(".")


def _inner(rest: str, index: int) -> str:
    """The name inside a residual layer or a transformer; only the former differs."""
    return rest if index == 1 else next((path for path, name in _RESNET.items() if name == rest), rest)
