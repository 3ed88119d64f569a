"""Names and shapes of the networks in checkpoints with the original names, from plain sizes; no model class is needed.

Every generator yields the name, without a prefix, and the dimensions of each tensor, in the order of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Entry = tuple[str, tuple[int, ...]]

ONE_RESNET = -1
"""In place of the middle block's transformer depth: the block is a single residual block."""
NO_MIDDLE = -2
"""In place of the middle block's transformer depth: there is no middle block."""


@dataclass(frozen=True)
class UNetSizes:
    """What decides every name and shape in a UNet. Widths must be multiples of 32 (the groups of GroupNorm)."""

    model_channels: int
    """Channels of the first level."""
    channel_mult: tuple[int, ...]
    """One entry per level: its channels in units of `model_channels`."""
    depths_down: tuple[tuple[int, ...], ...]
    """Per level, the transformer's depth after each residual block on the way down; 0 is none."""
    depth_middle: int
    """The transformer's depth in the middle block, or `ONE_RESNET`, or `NO_MIDDLE`."""
    depths_up: tuple[tuple[int, ...], ...]
    """As `depths_down` on the way up, with one entry more per level. The first level still stands first."""
    context_dim: int
    """Width of what cross-attention reads."""
    in_channels: int = 4
    out_channels: int = 4
    linear: bool = False
    """Whether transformers begin and end with a linear layer instead of a 1×1 convolution."""
    label_dim: int | None = None
    """Width of the vector that is added to the timestep, as in SDXL."""


def unet_entries(sizes: UNetSizes) -> Iterator[Entry]:
    """A UNet's tensors."""
    time_dim = 4 * sizes.model_channels
    widths = [mult * sizes.model_channels for mult in sizes.channel_mult]
    yield from _linear("time_embed.0", sizes.model_channels, time_dim)
    yield from _linear("time_embed.2", time_dim, time_dim)
    if sizes.label_dim is not None:
        yield from _linear("label_emb.0.0", sizes.label_dim, time_dim)
        yield from _linear("label_emb.0.2", time_dim, time_dim)
    yield from _conv("input_blocks.0.0", sizes.in_channels, sizes.model_channels)
    channels = sizes.model_channels
    skips = [channels]
    for level, (width, depths) in enumerate(zip(widths, sizes.depths_down)):
        for depth in depths:
            block = f"input_blocks.{len(skips)}"
            yield from _unet_resnet(f"{block}.0", channels, width, time_dim)
            channels = width
            if depth:
                yield from _transformer(f"{block}.1", channels, depth, sizes)
            skips.append(channels)
        if level != len(widths) - 1:
            yield from _conv(f"input_blocks.{len(skips)}.0.op", channels, channels)
            skips.append(channels)
    if sizes.depth_middle != NO_MIDDLE:
        yield from _unet_resnet("middle_block.0", channels, channels, time_dim)
    if sizes.depth_middle >= 0:
        yield from _transformer("middle_block.1", channels, sizes.depth_middle, sizes)
        yield from _unet_resnet("middle_block.2", channels, channels, time_dim)
    index = 0
    for level, (width, depths) in reversed(list(enumerate(zip(widths, sizes.depths_up)))):
        for number, depth in enumerate(depths):
            block = f"output_blocks.{index}"
            yield from _unet_resnet(f"{block}.0", channels + skips.pop(), width, time_dim)
            channels = width
            if depth:
                yield from _transformer(f"{block}.1", channels, depth, sizes)
            if level and number == len(depths) - 1:
                yield from _conv(f"{block}.{2 if depth else 1}.conv", channels, channels)
            index += 1
    yield from _norm("out.0", channels)
    yield from _conv("out.2", channels, sizes.out_channels)


def vae_entries(widths: tuple[int, ...], res_blocks: int, latent_channels: int) -> Iterator[Entry]:
    """An autoencoder's tensors: encoder, decoder, and the 1×1 convolutions between them.

    Args:
        widths: channels of each level; n levels make latents 2^(n-1) times smaller than the picture.
        res_blocks: residual blocks per level of the encoder; the decoder has one more.
        latent_channels: channels of the latents.
    """
    moments = 2 * latent_channels
    yield from _conv("encoder.conv_in", 3, widths[0])
    channels = widths[0]
    for level, width in enumerate(widths):
        for block in range(res_blocks):
            yield from _vae_resnet(f"encoder.down.{level}.block.{block}", channels, width)
            channels = width
        if level != len(widths) - 1:
            yield from _conv(f"encoder.down.{level}.downsample.conv", width, width)
    yield from _vae_middle("encoder", channels)
    yield from _norm("encoder.norm_out", channels)
    yield from _conv("encoder.conv_out", channels, moments)
    yield from _conv("quant_conv", moments, moments, kernel=1)
    yield from _conv("post_quant_conv", latent_channels, latent_channels, kernel=1)
    yield from _conv("decoder.conv_in", latent_channels, channels)
    yield from _vae_middle("decoder", channels)
    for level, width in reversed(list(enumerate(widths))):
        for block in range(res_blocks + 1):
            yield from _vae_resnet(f"decoder.up.{level}.block.{block}", channels, width)
            channels = width
        if level:
            yield from _conv(f"decoder.up.{level}.upsample.conv", width, width)
    yield from _norm("decoder.norm_out", channels)
    yield from _conv("decoder.conv_out", channels, 3)


@dataclass(frozen=True)
class TextSizes:
    """What decides every name and shape in a text encoder."""

    width: int
    layers: int
    mlp: int
    """Inner width of the MLPs."""
    vocab_size: int
    """Tokens that it knows."""
    max_tokens: int
    """Positions that it knows."""
    projection: int = 0
    """Width of the pooled output in OpenCLIP's layout; Hugging Face's `CLIPTextModel` has none."""


def clip_entries(sizes: TextSizes) -> Iterator[Entry]:
    """A text encoder's tensors in Hugging Face's layout."""
    yield "text_model.embeddings.token_embedding.weight", (sizes.vocab_size, sizes.width)
    yield "text_model.embeddings.position_embedding.weight", (sizes.max_tokens, sizes.width)
    for layer in range(sizes.layers):
        name = f"text_model.encoder.layers.{layer}"
        yield from _norm(f"{name}.layer_norm1", sizes.width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{name}.self_attn.{projection}", sizes.width, sizes.width)
        yield from _norm(f"{name}.layer_norm2", sizes.width)
        yield from _linear(f"{name}.mlp.fc1", sizes.width, sizes.mlp)
        yield from _linear(f"{name}.mlp.fc2", sizes.mlp, sizes.width)
    yield from _norm("text_model.final_layer_norm", sizes.width)


def open_clip_entries(sizes: TextSizes) -> Iterator[Entry]:
    """A text encoder's tensors in OpenCLIP's layout: queries, keys and values lie in one tensor."""
    yield "positional_embedding", (sizes.max_tokens, sizes.width)
    yield "token_embedding.weight", (sizes.vocab_size, sizes.width)
    for layer in range(sizes.layers):
        name = f"transformer.resblocks.{layer}"
        yield from _norm(f"{name}.ln_1", sizes.width)
        yield f"{name}.attn.in_proj_weight", (3 * sizes.width, sizes.width)
        yield f"{name}.attn.in_proj_bias", (3 * sizes.width,)
        yield from _linear(f"{name}.attn.out_proj", sizes.width, sizes.width)
        yield from _norm(f"{name}.ln_2", sizes.width)
        yield from _linear(f"{name}.mlp.c_fc", sizes.width, sizes.mlp)
        yield from _linear(f"{name}.mlp.c_proj", sizes.mlp, sizes.width)
    yield from _norm("ln_final", sizes.width)
    yield "text_projection", (sizes.width, sizes.projection)
    yield "logit_scale", ()


def _unet_resnet(name: str, channels: int, out_channels: int, time_dim: int) -> Iterator[Entry]:
    yield from _norm(f"{name}.in_layers.0", channels)
    yield from _conv(f"{name}.in_layers.2", channels, out_channels)
    yield from _linear(f"{name}.emb_layers.1", time_dim, out_channels)
    yield from _norm(f"{name}.out_layers.0", out_channels)
    yield from _conv(f"{name}.out_layers.3", out_channels, out_channels)
    if channels != out_channels:
        yield from _conv(f"{name}.skip_connection", channels, out_channels, kernel=1)


def _transformer(name: str, channels: int, depth: int, sizes: UNetSizes) -> Iterator[Entry]:
    yield from _norm(f"{name}.norm", channels)
    yield from _projection(f"{name}.proj_in", channels, sizes)
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        for attention, key_dim in (("attn1", channels), ("attn2", sizes.context_dim)):
            yield from _linear(f"{block}.{attention}.to_q", channels, channels, bias=False)
            yield from _linear(f"{block}.{attention}.to_k", key_dim, channels, bias=False)
            yield from _linear(f"{block}.{attention}.to_v", key_dim, channels, bias=False)
            yield from _linear(f"{block}.{attention}.to_out.0", channels, channels)
        yield from _linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
        yield from _linear(f"{block}.ff.net.2", 4 * channels, channels)
        for normalisation in ("norm1", "norm2", "norm3"):
            yield from _norm(f"{block}.{normalisation}", channels)
    yield from _projection(f"{name}.proj_out", channels, sizes)


def _projection(name: str, channels: int, sizes: UNetSizes) -> Iterator[Entry]:
    return _linear(name, channels, channels) if sizes.linear else _conv(name, channels, channels, kernel=1)


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
    """A linear layer's tensors."""
    yield f"{name}.weight", (out_features, in_features)
    if bias:
        yield f"{name}.bias", (out_features,)


def _conv(name: str, channels: int, out_channels: int, *, kernel: int = 3) -> Iterator[Entry]:
    """A convolution's tensors."""
    yield f"{name}.weight", (out_channels, channels, kernel, kernel)
    yield f"{name}.bias", (out_channels,)


def _norm(name: str, channels: int) -> Iterator[Entry]:
    """A normalisation's tensors."""
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)
