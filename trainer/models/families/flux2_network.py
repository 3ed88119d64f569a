"""FLUX.2's networks: diffusers' classes, around tensors of the original code, of a host or of a diffusers folder."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import WeightsError
from ..flux2_names import (
    DOUBLE,
    HEAD,
    LAST_NORM,
    SINGLE,
    SPLIT_PROJECTIONS,
    SWAPPED,
    joined_path,
    network_path,
    original_name,
    split_paths,
)
from .base import Component, TextEncoderSpec, count_blocks, newer_class, required
from .qwen3 import qwen3_component

AXIS = 32  # numbers of a head for each of the four axes: picture, row, column, place in the text
AXES = 4
THETA = 2000
MLP_RATIO = 3.0
NEEDED = {"model": "FLUX.2 klein", "pipeline": "Flux2KleinPipeline", "version": "0.37"}  # before, there is dev alone
_STATISTICS = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
_INCOMPLETE = "Use a complete file; if it was downloaded, download it again and compare its size."


class FinalNorm(nn.Module):
    """The norm before the last layer, with its projection's shift and scale in the original code's order.

    diffusers' own has scale and shift, so that the borrowed tensor would have to be copied.
    """

    def __init__(self, width: int, eps: float) -> None:
        """Make the projection, (2·width, width)."""
        super().__init__()
        self.projection = nn.Linear(width, 2 * width, bias=False)
        self._eps = eps

    def forward(self, hidden: Tensor, conditioning: Tensor) -> Tensor:
        """(batch, tokens, width), by (batch, width) → (batch, tokens, width)."""
        shift, scale = self.projection(nn.functional.silu(conditioning).to(hidden.dtype))[:, None].chunk(2, dim=-1)
        normed = nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=self._eps)
        result: Tensor = normed * (1 + scale) + shift
        return result


def make_transformer(**config: Any) -> nn.Module:
    """Diffusers' transformer with joined query, key and value projections and the original code's last norm."""
    network: Any = newer_class("Flux2Transformer2DModel", **NEEDED)(**config)
    for block in network.transformer_blocks:
        attention = block.attn
        width, inner = attention.query_dim, attention.inner_dim
        attention.to_qkv = nn.Linear(width, 3 * inner, bias=False)
        attention.to_added_qkv = nn.Linear(attention.added_kv_proj_dim, 3 * inner, bias=False)
        attention.fused_projections = True
        for parts in SPLIT_PROJECTIONS.values():
            for part in parts:
                delattr(attention, part.removeprefix("attn."))
    network.norm_out = FinalNorm(network.inner_dim, network.config.eps)
    made: nn.Module = network
    return made


class Flux2Layout:
    """A transformer of double and single blocks, FLUX.2's autoencoder and Qwen 3; see `Layout`."""

    folder = "transformer"
    network_class = "Flux2Transformer2DModel"
    block_names = (DOUBLE.original, SINGLE.original)
    block_paths = (DOUBLE.path, SINGLE.path)

    def holds(self, denoiser: Mapping[str, Tensor]) -> bool:
        """By the modulation that all double blocks share."""
        return "double_stream_modulation_img.lin.weight" in denoiser

    def denoiser_config(self, denoiser: Mapping[str, Tensor]) -> dict[str, Any]:
        """By widths and numbers of blocks."""
        tokens = required(denoiser, "img_in.weight")
        return {
            "in_channels": tokens.shape[1],
            "num_layers": count_blocks(denoiser, DOUBLE.original),
            "num_single_layers": count_blocks(denoiser, SINGLE.original),
            "num_attention_heads": tokens.shape[0] // HEAD,
            "joint_attention_dim": required(denoiser, "txt_in.weight").shape[1],
            "guidance_embeds": "guidance_in.in_layer.weight" in denoiser,
        }

    def context_width(self, config: Mapping[str, Any]) -> int:
        """See `Layout.context_width`."""
        return int(config["joint_attention_dim"])

    def denoiser(self, denoiser: Mapping[str, Tensor], config: Mapping[str, Any]) -> Component:
        """By renaming only."""
        tensors = {}
        file_names = {}
        for name, tensor in denoiser.items():
            module, _, kind = name.rpartition(".")
            path = network_path(module)
            if path is None:
                raise WeightsError(f"The base model's transformer has an unknown tensor: {name}.", _INCOMPLETE)
            own = f"{path}.{'weight' if kind == 'scale' else kind}"  # of norms, in the files of Black Forest Labs
            tensors[own] = tensor
            file_names[own] = name
        return Component(tensors, config, file_names)

    def denoiser_of_folder(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Component:
        """Copies query, key and value projections into one, and the last norm's projection in another order."""
        own: dict[str, Tensor] = {}
        thirds: dict[str, dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            module, _, kind = name.rpartition(".")
            joined = joined_path(module)
            if joined:
                thirds.setdefault(f"{joined[0]}.{kind}", {})[joined[1]] = tensor
            elif module == SWAPPED:
                own[f"{LAST_NORM}.{kind}"] = torch.cat(tensor.chunk(2)[::-1])
            else:
                own[name] = tensor
        for name, parts in thirds.items():
            if len(parts) == 3:
                own[name] = torch.cat([parts[number] for number in range(3)])
        return Component(own, config)

    def tensors_of_folder(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies joined projections into three, and the last norm's projection in diffusers' order."""
        theirs: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            module, _, kind = name.rpartition(".")
            paths = split_paths(module)
            if paths:
                parts = zip(paths, tensor.chunk(3), strict=True)
                theirs |= {f"{path}.{kind}": part.clone() for path, part in parts}
            elif module == LAST_NORM:
                theirs[f"{SWAPPED}.{kind}"] = torch.cat(tensor.chunk(2)[::-1])
            else:
                theirs[name] = tensor
        return theirs

    def vae(self, tensors: Mapping[str, Tensor], scaling_factor: float) -> Component:
        """In the original layout or in that of diffusers, with the statistics that normalise its latents."""
        from .ldm import UnetLayout

        lacking = next((name for name in _STATISTICS[:2] if name not in tensors), None)
        if lacking:
            raise WeightsError(
                f"This is not the FLUX.2 VAE: it lacks the tensor {lacking}.", "Use the FLUX.2 VAE (flux2-vae)."
            )
        networks = {name: tensor for name, tensor in tensors.items() if not name.startswith("bn.")}
        component = UnetLayout().vae(networks, scaling_factor)
        config = {name: value for name, value in component.config.items() if name != "scaling_factor"}
        statistics = {name: tensors.get(name, torch.tensor(0)) for name in _STATISTICS}
        return Component({**component.tensors, **statistics}, config, component.file_names)

    def text_encoder(
        self, tensors: Mapping[str, Tensor], spec: TextEncoderSpec, config: Mapping[str, Any] | None = None
    ) -> Component:
        """See `qwen3_component`."""
        return qwen3_component(tensors, spec, config)

    def original_names(self, paths: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
        """Whatever the configuration."""
        names = {path: original_name(path) for path in paths}
        return {path: name for path, name in names.items() if name}

    def published_name(self, path: str, depths: Sequence[int]) -> str | None:
        """Whatever the numbers of blocks."""
        return original_name(path)

    def is_published(self, path: str, depths: Sequence[int]) -> bool:
        """By the number of its block."""
        match = re.match(r"(single_)?transformer_blocks\.(\d+)\.", path)
        return match is not None and int(match[2]) < depths[1 if match[1] else 0]
