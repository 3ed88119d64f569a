"""Z-Image's networks: diffusers' classes, around tensors of the original code, of a host or of a diffusers folder."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import WeightsError
from ..zimage_names import BLOCKS, HEAD, original_name, paths_of_tensor
from .base import Component, TextEncoderSpec, count_blocks, newer_class, required
from .qwen3 import qwen3_component

NEEDED = {"model": "Z-Image", "pipeline": "ZImagePipeline", "version": "0.36"}
PATCH = 2  # side of the square of latent pixels that is one token
_SHIFT = 0.1159  # of FLUX.1's autoencoder
_PAD_TOKENS = ("x_pad_token", "cap_pad_token")
_UNUSED = "norm_final.weight"  # in the published file, for no module
_INCOMPLETE = "Use a complete file; if it was downloaded, download it again and compare its size."


def make_transformer(**config: Any) -> nn.Module:
    """Diffusers' transformer, modified to take noise levels, like the others, and to predict noise - picture.

    diffusers' own counts time from noise to picture, and predicts picture - noise.
    """
    network_class: Any = newer_class("ZImageTransformer2DModel", **NEEDED)

    class ZImageTransformer(network_class):  # type: ignore[misc]
        def forward(self, *, x: list[Tensor], timestep: Tensor, cap_feats: list[Tensor]) -> Tensor:
            """Pictures (channels, 1, height, width), noise levels (batch,), prompts (tokens, width) → as pictures."""
            outputs = super().forward(x=x, t=1 - timestep, cap_feats=cap_feats, return_dict=False)[0]
            return -torch.stack(outputs)

    made: nn.Module = ZImageTransformer(**config)
    return made


class ZImageLayout:
    """A transformer of blocks over picture and prompt together, FLUX.1's autoencoder and Qwen 3; see `Layout`."""

    folder = "transformer"
    network_class = "ZImageTransformer2DModel"
    block_names = tuple(BLOCKS)
    block_paths = tuple(BLOCKS)

    def holds(self, denoiser: Mapping[str, Tensor]) -> bool:
        """By the modulation of its blocks, which differs from Lumina 2's, and the joined projections."""
        return {"layers.0.adaLN_modulation.0.weight", "layers.0.attention.qkv.weight"} <= set(denoiser)

    def denoiser_config(self, denoiser: Mapping[str, Tensor]) -> dict[str, Any]:
        """By widths and numbers of blocks."""
        tokens = required(denoiser, "x_embedder.weight")
        return {
            "in_channels": tokens.shape[1] // PATCH**2,
            "dim": tokens.shape[0],
            "n_layers": count_blocks(denoiser, "layers"),
            "n_refiner_layers": count_blocks(denoiser, "noise_refiner"),
            "n_heads": tokens.shape[0] // HEAD,
            "n_kv_heads": tokens.shape[0] // HEAD,
            "cap_feat_dim": required(denoiser, "cap_embedder.1.weight").shape[1],
        }

    def context_width(self, config: Mapping[str, Any]) -> int:
        """See `Layout.context_width`."""
        return int(config["cap_feat_dim"])

    def denoiser(self, denoiser: Mapping[str, Tensor], config: Mapping[str, Any]) -> Component:
        """By renaming; of a joined projection, each of the network's three is a view."""
        tensors: dict[str, Tensor] = {}
        file_names: dict[str, str] = {}
        for name, tensor in denoiser.items():
            module, _, kind = name.rpartition(".")
            if name in _PAD_TOKENS:
                tensors[name] = tensor
            elif name != _UNUSED:
                paths = paths_of_tensor(module)
                if not paths:
                    raise WeightsError(f"The base model's transformer has an unknown tensor: {name}.", _INCOMPLETE)
                for path, part in zip(paths, tensor.chunk(len(paths)), strict=True):
                    tensors[f"{path}.{kind}"] = part
                    file_names[f"{path}.{kind}"] = name
        return Component(tensors, config, file_names)

    def denoiser_of_folder(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Component:
        """Diffusers' names are the network's; Omni's parts are left out, since diffusers 0.36 does not have them."""
        return Component(tensors, {name: value for name, value in config.items() if name != "siglip_feat_dim"})

    def tensors_of_folder(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Diffusers' names are the network's."""
        return dict(tensors)

    def vae(self, tensors: Mapping[str, Tensor], scaling_factor: float) -> Component:
        """In the original layout or in that of diffusers; it has no convolutions around its latents."""
        from .ldm import autoencoder_component

        if "quant_conv.weight" in tensors or "bn.running_mean" in tensors:
            raise WeightsError(
                "This is not the Z-Image VAE.", "Use the VAE that Z-Image shares with FLUX.1 (ae.safetensors)."
            )
        component = autoencoder_component(tensors, scaling_factor)
        return Component(component.tensors, {**component.config, "shift_factor": _SHIFT}, component.file_names)

    def text_encoder(
        self, tensors: Mapping[str, Tensor], spec: TextEncoderSpec, config: Mapping[str, Any] | None = None
    ) -> Component:
        """See `qwen3_component`."""
        return qwen3_component(tensors, spec, config)

    def original_names(self, paths: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
        """Of modules that are separate in the original code, whatever the configuration."""
        names = {path: original_name(path) for path in paths}
        return {path: name for path, name in names.items() if name}

    def published_name(self, path: str, depths: Sequence[int]) -> str | None:
        """Whatever the numbers of blocks."""
        return original_name(path)

    def is_published(self, path: str, depths: Sequence[int]) -> bool:
        """By the number of its block."""
        match = re.match(r"(layers|noise_refiner|context_refiner)\.(\d+)\.", path)
        return match is not None and int(match[2]) < depths[0 if match[1] == "layers" else 1]
