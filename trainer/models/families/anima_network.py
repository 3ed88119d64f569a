"""Anima's networks: diffusers' Cosmos Predict 2 and Anima's conditioner, around tensors of the original code."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import WeightsError
from ..anima_names import CONDITIONER, OUTSIDE, name_in_diffusers, original_name, path_from_diffusers
from ..anima_names import path_of_tensor as path_of_original_tensor
from .base import Component, TextEncoderSpec, count_blocks, newer_class, required
from .qwen3 import qwen3_component
from .wan_vae import wan_autoencoder

NEEDED = {"model": "Anima", "pipeline": "AnimaModularPipeline", "version": "0.39"}
PATCH = 2  # side of the square of latent pixels that is one token
MASK_CHANNELS = 1  # which say where a picture is padding: nowhere
_LARGEST = (128, 240, 240)  # frames, rows and columns of latents for which there are places
_STRETCH = (1.0, 4.0, 4.0)  # of the places of frames, rows and columns, as Cosmos Predict 2 has it
_COMPUTED = ("pos_embedder.", "accum_")  # buffers of NVIDIA's code that kohya's full fine-tunes hold, for no module
_INCOMPLETE = "Use a complete file; if it was downloaded, download it again and compare its size."


def make_transformer(conditioner: Mapping[str, Any], **config: Any) -> nn.Module:
    """Diffusers' transformer, with other names outside blocks, and with the conditioner as a part of it.

    Args:
        conditioner: Configuration of diffusers' `AnimaTextConditioner`.
        config: Configuration of diffusers' `CosmosTransformer3DModel`.
    """
    conditioner_class: Any = newer_class("AnimaTextConditioner", **NEEDED)
    network_class: Any = newer_class("CosmosTransformer3DModel", **NEEDED)
    aliases = {name: property(attrgetter(path)) for path, name in OUTSIDE.items()}
    network: Any = type("AnimaTransformer", (network_class,), aliases)(**config)
    for path, name in OUTSIDE.items():
        network._modules[path] = network._modules.pop(name)
    network.llm_adapter = conditioner_class(**conditioner)
    _add_in_float32(network)
    made: nn.Module = network
    return made


def _add_in_float32(network: Any) -> None:
    """In fp16 let what blocks add to be in float32, as in ComfyUI: it leaves fp16's range. Layers compute in fp16."""
    computing: dict[str, torch.dtype] = {}

    def widened(_module: nn.Module, _inputs: Any, tokens: Tensor) -> Tensor:
        return tokens.float() if tokens.dtype == torch.float16 else tokens

    def begun(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
        computing["dtype"] = tokens.dtype
        return widened(module, inputs, tokens)

    def narrowed(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].to(computing["dtype"]), *inputs[1:])

    network.x_embedder.register_forward_hook(begun)
    network.t_embedder.register_forward_pre_hook(narrowed)
    network.head_linear.register_forward_pre_hook(narrowed)
    for block in network.blocks:
        for part in (block.attn1, block.attn2, block.ff):
            part.register_forward_pre_hook(narrowed)
            part.register_forward_hook(widened)


def with_frequencies(network: Any) -> Any:
    """The network with the conditioner's rotary frequencies, which no file holds; they stay in float32 when it is cast.

    Args:
        network: From `make_transformer`, on the meta device or around tensors.
    """
    embedding = network.llm_adapter.rotary_emb
    head = 2 * embedding.inv_freq.shape[0]
    del embedding.inv_freq  # a buffer, which is cast
    embedding.inv_freq = 1.0 / (10000.0 ** (torch.arange(0, head, 2, device="cpu").float() / head))
    return network


class AnimaLayout:
    """A transformer with cross-attention to the prompt, its conditioner, Wan's autoencoder, and Qwen 3."""

    folder = "transformer"
    network_class = "CosmosTransformer3DModel"
    block_names = ("blocks",)
    block_paths = ("blocks",)

    def holds(self, denoiser: Mapping[str, Tensor]) -> bool:
        """By the conditioner, which Cosmos Predict 2 does not have."""
        return f"{CONDITIONER}.embed.weight" in denoiser

    def denoiser_config(self, denoiser: Mapping[str, Tensor]) -> dict[str, Any]:
        """By widths and numbers of blocks."""
        width, patches = required(denoiser, "x_embedder.proj.1.weight").shape
        return {
            "in_channels": patches // PATCH**2,
            "out_channels": required(denoiser, "final_layer.linear.weight").shape[0] // PATCH**2,
            "num_attention_heads": width // required(denoiser, "blocks.0.self_attn.q_norm.weight").shape[0],
            "attention_head_dim": required(denoiser, "blocks.0.self_attn.q_norm.weight").shape[0],
            "num_layers": count_blocks(denoiser, "blocks"),
            "mlp_ratio": required(denoiser, "blocks.0.mlp.layer1.weight").shape[0] / width,
            "text_embed_dim": required(denoiser, "blocks.0.cross_attn.k_proj.weight").shape[1],
            "adaln_lora_dim": required(denoiser, "blocks.0.adaln_modulation_self_attn.1.weight").shape[0],
            "conditioner": self._conditioner_config(denoiser),
        }

    def _conditioner_config(self, denoiser: Mapping[str, Tensor]) -> dict[str, Any]:
        """The configuration of diffusers' `AnimaTextConditioner`."""
        vocabulary, target = required(denoiser, f"{CONDITIONER}.embed.weight").shape
        own = {
            name.removeprefix(f"{CONDITIONER}."): tensor
            for name, tensor in denoiser.items()
            if name.startswith(CONDITIONER)
        }
        width = required(denoiser, f"{CONDITIONER}.out_proj.weight").shape[1]
        query = required(denoiser, f"{CONDITIONER}.blocks.0.cross_attn.q_proj.weight")
        head = required(denoiser, f"{CONDITIONER}.blocks.0.cross_attn.q_norm.weight").shape[0]
        return {
            "source_dim": required(denoiser, f"{CONDITIONER}.blocks.0.cross_attn.k_proj.weight").shape[1],
            "target_dim": target,
            "model_dim": width,
            "num_layers": count_blocks(own, "blocks"),
            "num_attention_heads": query.shape[0] // head,
            "mlp_ratio": required(denoiser, f"{CONDITIONER}.blocks.0.mlp.0.weight").shape[0] / width,
            "target_vocab_size": vocabulary,
        }

    def context_width(self, config: Mapping[str, Any]) -> int:
        """The width of the language model, which the conditioner reads; see `Layout.context_width`."""
        return int(config["conditioner"]["source_dim"])

    def denoiser(self, denoiser: Mapping[str, Tensor], config: Mapping[str, Any]) -> Component:
        """By renaming only."""
        names: dict[str, str] = {}
        for name in denoiser:
            if name.startswith(_COMPUTED):
                continue
            path = path_of_original_tensor(name)
            if path is None:
                raise WeightsError(f"The base model's transformer has an unknown tensor: {name}.", _INCOMPLETE)
            names[path] = name
        return Component({path: denoiser[name] for path, name in names.items()}, config, names)

    def denoiser_of_folder(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Component:
        """Diffusers' names inside blocks; the conditioner's begin with `CONDITIONER`."""
        names = {path_from_diffusers(name): name for name in tensors}
        own = {**config, "in_channels": config["in_channels"] + MASK_CHANNELS, "concat_padding_mask": False}
        return Component({path: tensors[name] for path, name in names.items()}, own, names)

    def tensors_of_folder(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By renaming only."""
        return {name_in_diffusers(path): tensor for path, tensor in tensors.items()}

    def vae(self, tensors: Mapping[str, Tensor], scaling_factor: float) -> Component:
        """In the original layout or in that of diffusers."""
        newer_class("AnimaTextConditioner", **NEEDED)  # older versions can't rename it either
        return wan_autoencoder(tensors)

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
        """Every module in a block, since all published models have the same number of blocks."""
        return path.startswith("blocks.") and original_name(path) is not None


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration from shapes, completed with what they don't show."""
    return {
        **config,
        # the channel of the mask is one of the inputs here, as diffusers would resize the mask by torchvision
        "concat_padding_mask": False,
        "max_size": _LARGEST,
        "patch_size": (1, PATCH, PATCH),
        "rope_scale": _STRETCH,
        "extra_pos_embed_type": None,
    }
