"""Random-weight checkpoints in the shape of Stable Diffusion 1.x, for tests.

A checkpoint is a single ``.safetensors`` file with the original (LDM) names: ``model.diffusion_model.`` for the UNet,
``first_stage_model.`` for the VAE and ``cond_stage_model.transformer.`` for CLIP-L; at full size it has the 1131 keys
of the pruned v1-5 file. Every name and shape follows from an `SD1Shape`; no model class is needed to make one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."

Entry = tuple[str, tuple[int, ...]]
Size = Literal["tiny", "slim", "full"]

EMBEDDING_STD = 0.02
LATENT_STD = 5.0
LATENT_LOGVAR = -10.0


@dataclass(frozen=True)
class SD1Shape:
    """The sizes that decide every name and shape in a checkpoint; the defaults are SD 1.5.

    All widths but `context_dim` must be multiples of 32 (the groups of GroupNorm); the UNet has 8 attention heads.
    """

    model_channels: int = 320
    """Channels of the UNet's first level."""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """One entry per UNet level: its channels in units of `model_channels`."""
    num_res_blocks: int = 2
    """Residual blocks per level on the way down; one more on the way up."""
    attention_levels: tuple[int, ...] = (0, 1, 2)
    """Levels with a transformer after each residual block. The middle block always has one."""
    in_channels: int = 4
    """Input channels of the UNet: 4, or 9 for an inpainting model."""
    context_dim: int = 768
    """Width of the text encoder, and so of what cross-attention reads."""
    clip_layers: int = 12
    """Transformer layers of the text encoder."""
    clip_mlp: int = 3072
    """Inner width of the text encoder's MLPs."""
    vocab_size: int = 49408
    """Tokens that the text encoder knows."""
    max_tokens: int = 77
    """Positions that the text encoder knows."""
    vae_channels: int = 128
    """Channels of the VAE's first level."""
    vae_channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """One entry per VAE level; n levels make latents 2^(n-1) times smaller than the picture."""
    vae_res_blocks: int = 2
    """Residual blocks per level of the VAE's encoder; its decoder has one more."""
    latent_channels: int = 4
    """Channels of the latents, and output channels of the UNet."""


SHAPES: dict[str, SD1Shape] = {
    # For tests of the trainer alone: 4.4 M parameters, most of them the embedding of the real vocabulary.
    "tiny": SD1Shape(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(0,),
        context_dim=64,
        clip_layers=2,
        clip_mlp=256,
        vae_channels=32,
        vae_channel_mult=(1, 1, 1, 1),
        vae_res_blocks=1,
    ),
    # For a real host, which knows SD 1.x by `model_channels` and `context_dim` and fixes the VAE and the text encoder.
    "slim": SD1Shape(channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,)),
    "full": SD1Shape(),
}


def sd15_checkpoint(
    path: Path, *, size: Size | SD1Shape = "slim", seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Writes a random-weight SD 1.x checkpoint.

    Args:
        path: the file to write; its folder is made if need be.
        size: one of `SHAPES`, or sizes of one's own.
        seed: the same seed gives the same weights, up to the rounding of `dtype`.
        dtype: type of all weights.

    Returns:
        `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(sd15_state_dict(size, seed=seed, dtype=dtype), path, metadata={"format": "pt"})
    return path


def sd15_state_dict(
    size: Size | SD1Shape = "slim", *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Returns what `sd15_checkpoint` writes, by its prefixed name.

    Norms start as the identity and biases at zero; other weights are normal with variance 1 / fan_in, so that
    activations neither vanish nor overflow in half precision, and no output is constant. Two exceptions keep the
    random model's statistics like a trained one's: the text encoder's residual branches are as small as its embeddings
    (each token stays itself), and the VAE's posterior is narrow (latents follow the picture instead of the noise).
    """
    shape = size if isinstance(size, SD1Shape) else SHAPES[size]
    generator = torch.Generator().manual_seed(seed)
    weights = {name: _init(name, dims, generator).to(dtype) for name, dims in parameter_shapes(shape)}
    moments = weights[f"{VAE_PREFIX}quant_conv.weight"]
    moments[: shape.latent_channels] *= LATENT_STD
    moments[shape.latent_channels :] *= 0.1
    weights[f"{VAE_PREFIX}quant_conv.bias"][shape.latent_channels :] = LATENT_LOGVAR
    position_ids = torch.arange(shape.max_tokens).unsqueeze(0)
    weights[f"{CLIP_PREFIX}text_model.embeddings.position_ids"] = position_ids
    return weights


def parameter_shapes(shape: SD1Shape) -> Iterator[Entry]:
    """Yields the prefixed name and the dimensions of every trainable tensor."""
    parts = ((UNET_PREFIX, unet_shapes(shape)), (VAE_PREFIX, vae_shapes(shape)), (CLIP_PREFIX, clip_shapes(shape)))
    for prefix, entries in parts:
        for name, dims in entries:
            yield prefix + name, dims


def unet_shapes(shape: SD1Shape) -> Iterator[Entry]:
    """Yields the name and dimensions of every UNet weight, in the order of the forward pass."""
    time_dim = 4 * shape.model_channels
    last_level = len(shape.channel_mult) - 1
    yield from _linear("time_embed.0", shape.model_channels, time_dim)
    yield from _linear("time_embed.2", time_dim, time_dim)
    yield from _conv("input_blocks.0.0", shape.in_channels, shape.model_channels)
    channels = shape.model_channels
    skips = [channels]
    for level, mult in enumerate(shape.channel_mult):
        for _ in range(shape.num_res_blocks):
            block = f"input_blocks.{len(skips)}"
            yield from _unet_resnet(f"{block}.0", channels, mult * shape.model_channels, time_dim)
            channels = mult * shape.model_channels
            if level in shape.attention_levels:
                yield from _transformer(f"{block}.1", channels, shape.context_dim)
            skips.append(channels)
        if level != last_level:
            yield from _conv(f"input_blocks.{len(skips)}.0.op", channels, channels)
            skips.append(channels)
    yield from _unet_resnet("middle_block.0", channels, channels, time_dim)
    yield from _transformer("middle_block.1", channels, shape.context_dim)
    yield from _unet_resnet("middle_block.2", channels, channels, time_dim)
    index = 0
    for level, mult in reversed(list(enumerate(shape.channel_mult))):
        for i in range(shape.num_res_blocks + 1):
            block = f"output_blocks.{index}"
            yield from _unet_resnet(f"{block}.0", channels + skips.pop(), mult * shape.model_channels, time_dim)
            channels = mult * shape.model_channels
            attends = level in shape.attention_levels
            if attends:
                yield from _transformer(f"{block}.1", channels, shape.context_dim)
            if level and i == shape.num_res_blocks:
                yield from _conv(f"{block}.{2 if attends else 1}.conv", channels, channels)
            index += 1
    yield from _norm("out.0", channels)
    yield from _conv("out.2", channels, shape.latent_channels)


def vae_shapes(shape: SD1Shape) -> Iterator[Entry]:
    """Yields the name and dimensions of every VAE weight: encoder, decoder, and the 1×1 convolutions between them."""
    widths = [mult * shape.vae_channels for mult in shape.vae_channel_mult]
    moments = 2 * shape.latent_channels
    yield from _conv("encoder.conv_in", 3, widths[0])
    channels = widths[0]
    for level, width in enumerate(widths):
        for block in range(shape.vae_res_blocks):
            yield from _vae_resnet(f"encoder.down.{level}.block.{block}", channels, width)
            channels = width
        if level != len(widths) - 1:
            yield from _conv(f"encoder.down.{level}.downsample.conv", width, width)
    yield from _vae_middle("encoder", channels)
    yield from _norm("encoder.norm_out", channels)
    yield from _conv("encoder.conv_out", channels, moments)
    yield from _conv("quant_conv", moments, moments, kernel=1)
    yield from _conv("post_quant_conv", shape.latent_channels, shape.latent_channels, kernel=1)
    yield from _conv("decoder.conv_in", shape.latent_channels, channels)
    yield from _vae_middle("decoder", channels)
    for level, width in reversed(list(enumerate(widths))):
        for block in range(shape.vae_res_blocks + 1):
            yield from _vae_resnet(f"decoder.up.{level}.block.{block}", channels, width)
            channels = width
        if level:
            yield from _conv(f"decoder.up.{level}.upsample.conv", width, width)
    yield from _norm("decoder.norm_out", channels)
    yield from _conv("decoder.conv_out", channels, 3)


def clip_shapes(shape: SD1Shape) -> Iterator[Entry]:
    """Yields the name and dimensions of every text encoder weight."""
    width = shape.context_dim
    yield "text_model.embeddings.token_embedding.weight", (shape.vocab_size, width)
    yield "text_model.embeddings.position_embedding.weight", (shape.max_tokens, width)
    for layer in range(shape.clip_layers):
        name = f"text_model.encoder.layers.{layer}"
        yield from _norm(f"{name}.layer_norm1", width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{name}.self_attn.{projection}", width, width)
        yield from _norm(f"{name}.layer_norm2", width)
        yield from _linear(f"{name}.mlp.fc1", width, shape.clip_mlp)
        yield from _linear(f"{name}.mlp.fc2", shape.clip_mlp, width)
    yield from _norm("text_model.final_layer_norm", width)


def _unet_resnet(name: str, channels: int, out_channels: int, time_dim: int) -> Iterator[Entry]:
    yield from _norm(f"{name}.in_layers.0", channels)
    yield from _conv(f"{name}.in_layers.2", channels, out_channels)
    yield from _linear(f"{name}.emb_layers.1", time_dim, out_channels)
    yield from _norm(f"{name}.out_layers.0", out_channels)
    yield from _conv(f"{name}.out_layers.3", out_channels, out_channels)
    if channels != out_channels:
        yield from _conv(f"{name}.skip_connection", channels, out_channels, kernel=1)


def _transformer(name: str, channels: int, context_dim: int) -> Iterator[Entry]:
    block = f"{name}.transformer_blocks.0"
    yield from _norm(f"{name}.norm", channels)
    yield from _conv(f"{name}.proj_in", channels, channels, kernel=1)
    for attention, key_dim in (("attn1", channels), ("attn2", context_dim)):
        yield from _linear(f"{block}.{attention}.to_q", channels, channels, bias=False)
        yield from _linear(f"{block}.{attention}.to_k", key_dim, channels, bias=False)
        yield from _linear(f"{block}.{attention}.to_v", key_dim, channels, bias=False)
        yield from _linear(f"{block}.{attention}.to_out.0", channels, channels)
    yield from _linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
    yield from _linear(f"{block}.ff.net.2", 4 * channels, channels)
    for norm in ("norm1", "norm2", "norm3"):
        yield from _norm(f"{block}.{norm}", channels)
    yield from _conv(f"{name}.proj_out", channels, channels, kernel=1)


def _vae_resnet(name: str, channels: int, out_channels: int) -> Iterator[Entry]:
    yield from _norm(f"{name}.norm1", channels)
    yield from _conv(f"{name}.conv1", channels, out_channels)
    yield from _norm(f"{name}.norm2", out_channels)
    yield from _conv(f"{name}.conv2", out_channels, out_channels)
    if channels != out_channels:
        yield from _conv(f"{name}.nin_shortcut", channels, out_channels, kernel=1)


def _vae_middle(coder: str, channels: int) -> Iterator[Entry]:
    yield from _vae_resnet(f"{coder}.mid.block_1", channels, channels)
    yield from _norm(f"{coder}.mid.attn_1.norm", channels)
    for projection in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{coder}.mid.attn_1.{projection}", channels, channels, kernel=1)
    yield from _vae_resnet(f"{coder}.mid.block_2", channels, channels)


def _linear(name: str, in_features: int, out_features: int, *, bias: bool = True) -> Iterator[Entry]:
    yield f"{name}.weight", (out_features, in_features)
    if bias:
        yield f"{name}.bias", (out_features,)


def _conv(name: str, channels: int, out_channels: int, *, kernel: int = 3) -> Iterator[Entry]:
    yield f"{name}.weight", (out_channels, channels, kernel, kernel)
    yield f"{name}.bias", (out_channels,)


def _norm(name: str, channels: int) -> Iterator[Entry]:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def _init(name: str, dims: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(dims) == 1:
        return torch.ones(dims) if name.endswith(".weight") else torch.zeros(dims)
    std = 1 / math.sqrt(math.prod(dims[1:]))
    if "embedding" in name:
        std = EMBEDDING_STD
    elif name.endswith((".self_attn.out_proj.weight", ".mlp.fc2.weight")):
        std *= EMBEDDING_STD
    return torch.empty(dims).normal_(0, std, generator=generator)
