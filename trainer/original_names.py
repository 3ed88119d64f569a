"""Names of a UNet's modules in the original layout ("input_blocks.1.1.proj_in") and in diffusers'."""

from __future__ import annotations

import re

_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_FIXED = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
_BLOCK = re.compile(r"^(input_blocks|output_blocks)_(\d+)_(\d)_(.+)$")


def diffusers_name(name: str, layers_per_block: int) -> str:
    """Diffusers' name of a module that may have the original layout's.

    Args:
        name: A module's path with underscores for dots, as in a kohya file behind the prefix.
        layers_per_block: Residual layers per level of the UNet.

    Returns:
        The path in diffusers, with underscores; `name` itself if it is none of the original layout.
    """
    if name in _FIXED:
        return _FIXED[name]
    middle = re.match(r"^middle_block_([012])_(.+)$", name)
    if middle:
        if middle[1] == "1":
            return f"mid_block_attentions_0_{middle[2]}"
        return f"mid_block_resnets_{int(middle[1]) // 2}_{_RESNET.get(middle[2], middle[2])}"
    block = _BLOCK.match(name)
    if not block:
        return name
    side, number, part, rest = block[1], int(block[2]), int(block[3]), block[4]
    per_level = layers_per_block + 1
    level, layer = divmod(number - 1 if side == "input_blocks" else number, per_level)
    start = f"down_blocks_{level}" if side == "input_blocks" else f"up_blocks_{level}"
    if side == "input_blocks" and rest == "op":
        return f"{start}_downsamplers_0_conv"
    if side == "output_blocks" and rest == "conv":
        return f"{start}_upsamplers_0_conv"
    if part == 0:
        return f"{start}_resnets_{layer}_{_RESNET.get(rest, rest)}"
    return f"{start}_attentions_{layer}_{rest}"
