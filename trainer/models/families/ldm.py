"""The original ("LDM") layout of Stable Diffusion checkpoints: configuration from shapes, names to diffusers'.

Nothing here copies a tensor. The renaming itself is diffusers' own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...core.errors import WeightsError
from ..ldm_names import DIFFUSERS_BLOCKS, ORIGINAL_BLOCKS, is_in_published, original_names, published_name
from ..state_dicts import with_current_attention_names
from .base import Component, TextEncoderSpec
from .clip import text_component

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
_INCOMPLETE = "Use a complete checkpoint; if it was downloaded, download it again and compare its size."


class UnetLayout:
    """A UNet, a KL autoencoder and CLIP text encoders; see `Layout`."""

    folder = "unet"
    network_class = "UNet2DConditionModel"
    block_names = ORIGINAL_BLOCKS
    block_paths = DIFFUSERS_BLOCKS

    def holds(self, denoiser: Mapping[str, Tensor]) -> bool:
        """By the first convolution."""
        return "input_blocks.0.0.weight" in denoiser

    def denoiser_config(self, denoiser: Mapping[str, Tensor]) -> dict[str, Any]:
        """See `unet_config`."""
        return unet_config(denoiser)

    def context_width(self, config: Mapping[str, Any]) -> int:
        """See `Layout.context_width`."""
        return int(config["cross_attention_dim"])

    def denoiser(self, denoiser: Mapping[str, Tensor], config: Mapping[str, Any]) -> Component:
        """See `unet_component`."""
        return unet_component(denoiser, config)

    def denoiser_of_folder(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Component:
        """Diffusers' names are the network's."""
        return Component(tensors, config)

    def tensors_of_folder(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Diffusers' names are the network's."""
        return dict(tensors)

    def vae(self, tensors: Mapping[str, Tensor], scaling_factor: float) -> Component:
        """In the original layout or in that of diffusers."""
        if "encoder.conv_in.weight" in tensors and "quant_conv.weight" not in tensors:
            raise WeightsError(
                "This is not a Stable Diffusion VAE: it lacks the tensor quant_conv.weight.",
                "Use the checkpoint's own VAE or a full Stable Diffusion VAE (not TAESD, just a decoder or FLUX's).",
            )
        return autoencoder_component(tensors, scaling_factor)

    def text_encoder(
        self, tensors: Mapping[str, Tensor], spec: TextEncoderSpec, config: Mapping[str, Any] | None = None
    ) -> Component:
        """See `text_component`."""
        return text_component(tensors, spec, config)

    def original_names(self, paths: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
        """See `ldm_names.original_names`."""
        return original_names(paths, int(config["layers_per_block"]))

    def published_name(self, path: str, depths: Sequence[int]) -> str | None:
        """See `ldm_names.published_name`."""
        return published_name(path, depths)

    def is_published(self, path: str, depths: Sequence[int]) -> bool:
        """By the numbers of its level, layer and transformer block."""
        return is_in_published(path, depths)


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with names that begin with `prefix`, which is removed."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _required(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of that name.

    Raises:
        WeightsError: There is none.
    """
    if name not in tensors:
        raise WeightsError(f"The base model lacks the tensor {name}.", _INCOMPLETE)
    return tensors[name]


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the group of `pattern` has among the names."""
    matches = (re.match(pattern, name) for name in tensors)
    return len({match[1] for match in matches if match})


def unet_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer a diffusers `UNet2DConditionModel` configuration from the shapes of an original UNet.

    Args:
        tensors: Original names without prefix ("input_blocks.0.0.weight" …).

    Returns:
        Keyword arguments. `attention_head_dim` is left out: shapes do not show the number of heads.

    Raises:
        WeightsError: Blocks are missing or uneven.
    """
    channels: list[int] = []
    depths: list[list[int]] = [[]]
    for index in range(1, _count(tensors, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{index}.0.op.weight" in tensors:
            depths.append([])
            continue
        out = _required(tensors, f"input_blocks.{index}.0.out_layers.3.weight")
        if not depths[-1]:
            channels.append(out.shape[0])
        depths[-1].append(_depth(tensors, f"input_blocks.{index}.1"))
    layers = len(depths[0])
    if not channels or any(len(level) != layers for level in depths):
        raise WeightsError("The UNet's levels have different numbers of layers, which is not supported.", _INCOMPLETE)
    depths_up = [
        [_depth(tensors, f"output_blocks.{level * (layers + 1) + layer}.1") for layer in range(layers + 1)]
        for level in range(len(depths))
    ]
    conv_in = _required(tensors, "input_blocks.0.0.weight")
    key = next((tensor for name, tensor in tensors.items() if name.endswith("attn2.to_k.weight")), None)
    projection = next((tensor for name, tensor in tensors.items() if name.endswith("1.proj_in.weight")), None)
    if key is None or projection is None:
        raise WeightsError("The UNet has no cross-attention, so prompts would have no effect on it.", _INCOMPLETE)
    config = {
        "in_channels": conv_in.shape[1],
        "out_channels": _required(tensors, "out.2.weight").shape[0],
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in depths_up),
        "cross_attention_dim": key.shape[1],
        "use_linear_projection": projection.ndim == 2,
        "addition_embed_type": "text_time" if "label_emb.0.0.weight" in tensors else None,
    }
    if "label_emb.0.0.weight" in tensors:
        config["projection_class_embeddings_input_dim"] = tensors["label_emb.0.0.weight"].shape[1]
    middle = _depth(tensors, "middle_block.1")
    if not middle:  # the distilled relatives of SDXL have a residual block there, or nothing
        config["mid_block_type"] = "UNetMidBlock2D" if "middle_block.0.in_layers.2.weight" in tensors else None
    if {*itertools.chain(*depths, *depths_up), middle} - {0, 1}:
        config["transformer_layers_per_block"] = tuple(_even(level) for level in depths)
        if [_even(level) for level in depths_up] != [_even(level) for level in reversed(depths)]:
            config["reverse_transformer_layers_per_block"] = tuple(_even(level) for level in depths_up)
    return config


def _depth(tensors: Mapping[str, Tensor], block: str) -> int:
    """How many transformer layers a block has; 0 if it is not a transformer."""
    return _count(tensors, re.escape(block) + r"\.transformer_blocks\.(\d+)\.")


def _even(level: list[int]) -> int | tuple[int, ...]:
    """A level's transformer depths as diffusers writes them: one number if all are equal; without attention 1."""
    return max(level[0], 1) if len(set(level)) == 1 else tuple(level)


def unet_component(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Component:
    """Rename an original UNet's tensors to diffusers' names; they stay where they are."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    prefixed = {UNET_PREFIX + name: tensor for name, tensor in tensors.items()}
    renamed = convert_ldm_unet_checkpoint(prefixed, dict(config))
    new_names = {id(tensor): name for name, tensor in renamed.items()}
    for name, tensor in tensors.items():
        if id(tensor) not in new_names:
            raise WeightsError(f"The UNet has an unknown tensor: {name}.", _INCOMPLETE)
    file_names = {new_names[id(tensor)]: name for name, tensor in tensors.items()}
    return Component({name: tensor for name, tensor in renamed.items() if tensor is not None}, config, file_names)


def diffusers_vae_component(tensors: Mapping[str, Tensor], scaling_factor: float) -> Component:
    """Infer the configuration of an autoencoder that already has diffusers' names, as single files on the hub have.

    Args:
        tensors: Names such as "encoder.down_blocks.0.resnets.0.conv1.weight".
        scaling_factor: Factor of the latents.

    Raises:
        WeightsError: A tensor that the configuration depends on is missing.
    """
    levels = _count(tensors, r"encoder\.down_blocks\.(\d+)\.")
    first = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    return Component(
        tensors,
        {
            "block_out_channels": tuple(_required(tensors, first.format(level)).shape[0] for level in range(levels)),
            "layers_per_block": _count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            **_vae_blocks(levels),
            **_vae_latents(tensors),
            "scaling_factor": scaling_factor,
        },
    )


def _vae_blocks(levels: int) -> dict[str, Any]:
    return {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def _vae_latents(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Channels of the latents, and whether there are 1×1 convolutions around them."""
    channels = _required(tensors, "encoder.conv_out.weight").shape[0] // 2
    if "quant_conv.weight" in tensors:
        return {"latent_channels": channels}
    return {"latent_channels": channels, "use_quant_conv": False, "use_post_quant_conv": False}


def autoencoder_component(tensors: Mapping[str, Tensor], scaling_factor: float) -> Component:
    """A KL autoencoder in the original layout or in that of diffusers; see `vae_component`."""
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return diffusers_vae_component(with_current_attention_names(tensors), scaling_factor)
    return vae_component(tensors, scaling_factor)


def vae_component(tensors: Mapping[str, Tensor], scaling_factor: float) -> Component:
    """Infer a diffusers `AutoencoderKL` configuration from an original VAE and rename its tensors.

    Args:
        tensors: Original names without prefix ("encoder.conv_in.weight" …).
        scaling_factor: Factor of the latents, given by the family.

    Raises:
        WeightsError: It is not a KL autoencoder in this layout.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    if "encoder.conv_in.weight" not in tensors or "encoder.conv_out.weight" not in tensors:
        raise WeightsError(
            "The VAE has no Stable Diffusion encoder, so pictures can't be encoded into latents.",
            "Use the checkpoint's own VAE or a full Stable Diffusion VAE (not TAESD or just a decoder).",
        )
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    config = {
        "block_out_channels": tuple(
            _required(tensors, f"encoder.down.{level}.block.0.conv1.weight").shape[0] for level in range(levels)
        ),
        "layers_per_block": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        **_vae_blocks(levels),
        **_vae_latents(tensors),
        "scaling_factor": scaling_factor,
    }
    prefixed = {VAE_PREFIX + name: tensor for name, tensor in tensors.items()}
    renamed = convert_ldm_vae_checkpoint(prefixed, config)
    attention = re.compile(r"mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$")
    with_linear_attention = {
        name: tensor[:, :, 0, 0] if tensor.ndim == 4 and attention.search(name) else tensor
        for name, tensor in renamed.items()
    }
    return Component(with_linear_attention, config)
