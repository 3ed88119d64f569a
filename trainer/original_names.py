"""Names of a UNet's modules in the original code ("input_blocks.1.1.proj_in"), from diffusers'."""

from __future__ import annotations

import re
from collections.abc import Collection

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
_PART = re.compile(r"^(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.")


def original_names(paths: Collection[str], layers_per_block: int) -> dict[str, str]:
    """The original code's name of every module.

    Args:
        paths: Dotted paths in diffusers of a whole UNet's modules; those of attention decide how others are numbered.
        layers_per_block: Residual layers per level on the way down.

    Returns:
        Path in diffusers → path in the original code. Paths that have no counterpart there are left out.
    """
    attentive = {path.split(".")[1] for path in paths if path.startswith("up_blocks.") and ".attentions." in path}
    found = ((path, _FIXED.get(path) or _original_name(path, layers_per_block + 1, attentive)) for path in paths)
    return {path: name for path, name in found if name}


def _original_name(path: str, per_level: int, attentive: Collection[str]) -> str | None:
    """The name of a module inside a block; `attentive` are the numbers of the up blocks that have attention."""
    match = _PART.match(path)
    if not match:
        return None
    side, level, kind = match.groups()
    rest = path[match.end() :]
    if kind == "downsamplers":
        return f"input_blocks.{per_level * (int(level) + 1)}.0.op" if rest == "0.conv" else None
    if kind == "upsamplers":
        place = 2 if level in attentive else 1
        return f"output_blocks.{per_level * int(level) + per_level - 1}.{place}.conv" if rest == "0.conv" else None
    number, _, inner = rest.partition(".")
    if kind == "resnets":
        inner = _RESNET.get(inner, inner)
    if not inner:
        return None
    place = 0 if kind == "resnets" else 1
    if side == "mid_block":
        return f"middle_block.{2 * int(number) + place}.{inner}"
    if side == "down_blocks":
        return f"input_blocks.{per_level * int(level) + int(number) + 1}.{place}.{inner}"
    return f"output_blocks.{per_level * int(level) + int(number)}.{place}.{inner}"
