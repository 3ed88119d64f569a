"""Wan's autoencoder, also Qwen-Image's and Krea 2's: of videos, and of pictures as videos of one frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...core.errors import WeightsError
from .base import Component

_ORIGINAL = "decoder.middle.0.residual.0.gamma"
_DIFFUSERS = "decoder.mid_block.resnets.0.norm1.gamma"
_LARGER = "decoder.upsamples.0.upsamples.0.residual.2.weight"  # Wan 2.2's, of 48 channels
_LEVELS = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}


def wan_autoencoder(tensors: Mapping[str, Tensor]) -> Component:
    """The autoencoder in the original layout or in that of diffusers, for diffusers' `AutoencoderKLQwenImage`.

    Raises:
        WeightsError: It is another one.
    """
    is_original = _ORIGINAL in tensors and _LARGER not in tensors
    if not is_original and _DIFFUSERS not in tensors:
        raise WeightsError("This is not the Wan or Qwen-Image VAE.", "Use the Qwen-Image VAE (qwen_image_vae).")
    names: Mapping[str, str] = {name: name for name in tensors}
    if is_original:
        names = _names_in_diffusers(tensors)
    named = {path: tensors[name] for path, name in names.items()}
    try:
        config: dict[str, Any] = {
            **_LEVELS,
            "base_dim": named["decoder.norm_out.gamma"].shape[0],
            "z_dim": named["post_quant_conv.weight"].shape[0],
        }
    except KeyError as error:
        raise WeightsError(
            f"The VAE lacks the tensor {error.args[0]}.",
            "Use a complete file; if it was downloaded, download it again and compare its size.",
        ) from None
    return Component(named, config, names)


def _names_in_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in diffusers → name in the original code."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    renamed = convert_wan_vae_to_diffusers(dict(tensors))  # the same tensors under other names
    original = {id(tensor): name for name, tensor in tensors.items()}
    return {path: original[id(tensor)] for path, tensor in renamed.items()}
