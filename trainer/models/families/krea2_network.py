"""Krea 2's networks: diffusers' classes, around tensors of the original code, of a host or of a diffusers folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import WeightsError
from ..krea2_names import (
    HEAD,
    MODULATION,
    OUTSIDE,
    name_in_diffusers,
    original_name,
    path_from_diffusers,
    path_of_tensor,
)
from .base import Component, TextEncoderSpec, count_blocks, newer_class, required
from .qwen3 import qwen3_component
from .wan_vae import wan_autoencoder

NEEDED = {"model": "Krea 2", "pipeline": "Krea2Pipeline", "version": "0.39"}
PATCH = 2  # side of the square of latent pixels that is one token
_TEXT_HEADS = 20
_INCOMPLETE = "Use a complete file; if it was downloaded, download it again and compare its size."


def make_transformer(**config: Any) -> nn.Module:
    """Diffusers' transformer, with the original code's names for modules outside blocks.

    Its norms add one to their scales in float32, whatever the type of these, as the original code does; diffusers'
    own do so because diffusers loads the scales in float32.
    """
    network_class: Any = newer_class("Krea2Transformer2DModel", **NEEDED)
    aliases = {name: property(attrgetter(path)) for path, name in OUTSIDE.items()}
    network: Any = type("Krea2Transformer", (network_class,), aliases)(**config)
    for path, name in OUTSIDE.items():
        network._modules[path] = network._modules.pop(name)
    for module in network.modules():
        if type(module).__name__ == "Krea2RMSNorm":
            module.forward = MethodType(_normed, module)
    made: nn.Module = network
    return made


def _normed(norm: Any, hidden: Tensor) -> Tensor:
    """The root mean square norm in float32, (…, width) → the same."""
    return F.rms_norm(hidden.float(), (norm.dim,), norm.weight.float() + 1, norm.eps).to(hidden.dtype)


class Krea2Layout:
    """A transformer of blocks over prompt and picture together, Wan's autoencoder and Qwen 3 VL; see `Layout`."""

    folder = "transformer"
    network_class = "Krea2Transformer2DModel"
    block_names = ("blocks", "txtfusion")
    block_paths = ("blocks", "txtfusion")

    def holds(self, denoiser: Mapping[str, Tensor]) -> bool:
        """By the layer that joins the text encoder's hidden states."""
        return "txtfusion.projector.weight" in denoiser

    def denoiser_config(self, denoiser: Mapping[str, Tensor]) -> dict[str, Any]:
        """By widths and numbers of blocks."""
        tokens = required(denoiser, "first.weight")
        text_width = required(denoiser, "txtfusion.layerwise_blocks.0.prenorm.scale").shape[0]
        return {
            "in_channels": tokens.shape[1],
            "num_layers": count_blocks(denoiser, "blocks"),
            "num_attention_heads": required(denoiser, "blocks.0.attn.wq.weight").shape[0] // HEAD,
            "num_key_value_heads": required(denoiser, "blocks.0.attn.wk.weight").shape[0] // HEAD,
            "intermediate_size": required(denoiser, "blocks.0.mlp.gate.weight").shape[0],
            "timestep_embed_dim": required(denoiser, "tmlp.0.weight").shape[1],
            "text_hidden_dim": text_width,
            "num_text_layers": required(denoiser, "txtfusion.projector.weight").shape[1],
            "text_num_attention_heads": _TEXT_HEADS,
            "text_num_key_value_heads": _TEXT_HEADS,
            "text_intermediate_size": required(denoiser, "txtfusion.layerwise_blocks.0.mlp.gate.weight").shape[0],
        }

    def context_width(self, config: Mapping[str, Any]) -> int:
        """See `Layout.context_width`."""
        return int(config["num_text_layers"] * config["text_hidden_dim"])

    def denoiser(self, denoiser: Mapping[str, Tensor], config: Mapping[str, Any]) -> Component:
        """By renaming only; the modulation of a block, which the original code has flat, is a view."""
        tensors: dict[str, Tensor] = {}
        file_names: dict[str, str] = {}
        for name, tensor in denoiser.items():
            path = path_of_tensor(name)
            if path is None:
                raise WeightsError(f"The base model's transformer has an unknown tensor: {name}.", _INCOMPLETE)
            is_flat = path.endswith(MODULATION) and tensor.ndim == 1
            tensors[path] = tensor.view(6, -1) if is_flat else tensor
            file_names[path] = name
        return Component(tensors, config, file_names)

    def denoiser_of_folder(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Component:
        """Diffusers' names inside, the original code's outside."""
        names = {path_from_diffusers(name): name for name in tensors}
        return Component({path: tensors[name] for path, name in names.items()}, config, names)

    def tensors_of_folder(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By renaming only."""
        return {name_in_diffusers(path): tensor for path, tensor in tensors.items()}

    def vae(self, tensors: Mapping[str, Tensor], scaling_factor: float) -> Component:
        """In the original layout or in that of diffusers."""
        newer_class(self.network_class, **NEEDED)  # older versions can't rename it either
        return wan_autoencoder(tensors)

    def text_encoder(
        self, tensors: Mapping[str, Tensor], spec: TextEncoderSpec, config: Mapping[str, Any] | None = None
    ) -> Component:
        """The language model of Qwen 3 VL, without its vision part; see `qwen3_component`."""
        return qwen3_component(tensors, spec, config, sees=True)

    def original_names(self, paths: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
        """Whatever the configuration."""
        names = {path: original_name(path) for path in paths}
        return {path: name for path, name in names.items() if name}

    def published_name(self, path: str, depths: Sequence[int]) -> str | None:
        """Whatever the numbers of blocks."""
        return original_name(path)

    def is_published(self, path: str, depths: Sequence[int]) -> bool:
        """Every module in a block, since all published models have the same number of blocks."""
        return path.startswith(("blocks.", "txtfusion.")) and original_name(path) is not None
