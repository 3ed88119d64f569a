"""The sizes of Stable Diffusion 1.x, 2.x and XL with its smaller relatives, and of small models of the same structure.

A shape decides every name and dimension in a checkpoint. Its `unet`, `text_encoders` and the fields of the VAE are all
that the rest of the code reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from checkpoints_networks import (
    NO_MIDDLE,
    ONE_RESNET,
    Entry,
    TextSizes,
    UNetSizes,
    clip_entries,
    open_clip_entries,
)

CLIP_PREFIX = "cond_stage_model.transformer."
OPEN_CLIP_PREFIX = "cond_stage_model.model."
SDXL_CLIP_PREFIX = "conditioner.embedders.0.transformer."
SDXL_OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."

SIX_NUMBERS = 6 * 256
"""Width of SDXL's size, crop and target: six numbers, each as 256 sines and cosines."""


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

    def unet(self) -> UNetSizes:
        """The UNet's sizes: transformers of one block each."""
        depths = [int(level in self.attention_levels) for level in range(len(self.channel_mult))]
        return UNetSizes(
            model_channels=self.model_channels,
            channel_mult=self.channel_mult,
            depths_down=tuple((depth,) * self.num_res_blocks for depth in depths),
            depth_middle=1,
            depths_up=tuple((depth,) * (self.num_res_blocks + 1) for depth in depths),
            context_dim=self.context_dim,
            in_channels=self.in_channels,
            out_channels=self.latent_channels,
        )

    def text_encoder(self) -> TextSizes:
        """The text encoder's sizes."""
        return TextSizes(
            self.context_dim, self.clip_layers, self.clip_mlp, self.vocab_size, self.max_tokens, self.context_dim
        )

    def text_encoders(self) -> Mapping[str, Iterator[Entry]]:
        """Prefix → the tensors of the text encoder that lies there."""
        return {CLIP_PREFIX: clip_entries(self.text_encoder())}


@dataclass(frozen=True)
class SD2Shape(SD1Shape):
    """The same for SD 2.x; the defaults are SD 2.1. Attention heads have 64 channels, in the text encoder too."""

    context_dim: int = 1024
    clip_layers: int = 24
    clip_mlp: int = 4096

    def unet(self) -> UNetSizes:
        """The UNet's sizes: as SD 1.x's, with linear layers around transformers."""
        return replace(super().unet(), linear=True)

    def text_encoders(self) -> Mapping[str, Iterator[Entry]]:
        """Prefix → the tensors of the text encoder that lies there."""
        return {OPEN_CLIP_PREFIX: open_clip_entries(self.text_encoder())}


@dataclass(frozen=True)
class SDXLShape:
    """The same for SDXL and its relatives; the defaults are SDXL. All attention heads have 64 channels."""

    model_channels: int = 320
    """Channels of the UNet's first level."""
    channel_mult: tuple[int, ...] = (1, 2, 4)
    """One entry per UNet level: its channels in units of `model_channels`."""
    num_res_blocks: int = 2
    """Residual blocks per level on the way down; one more on the way up."""
    depths: tuple[int, ...] = (0, 2, 10)
    """Per level, the depth of the transformer after each residual block; 0 is none."""
    depth_middle: int | None = None
    """The depth in the middle block, `ONE_RESNET` or `NO_MIDDLE`; by default as in the last level."""
    depths_up: tuple[tuple[int, ...], ...] | None = None
    """Per level, first level first, the depth after each residual block on the way up; by default as `depths`."""
    in_channels: int = 4
    """Input channels of the UNet: 4, or 9 for an inpainting model."""
    clip_width: int = 768
    """Width of the first text encoder (CLIP-L)."""
    clip_layers: int = 12
    """Transformer layers of the first text encoder."""
    clip_mlp: int = 3072
    """Inner width of the first text encoder's MLPs."""
    open_clip_width: int = 1280
    """Width of the second text encoder (OpenCLIP-G), and of its pooled output."""
    open_clip_layers: int = 32
    """Transformer layers of the second text encoder."""
    open_clip_mlp: int = 5120
    """Inner width of the second text encoder's MLPs."""
    vocab_size: int = 49408
    """Tokens that the text encoders know."""
    max_tokens: int = 77
    """Positions that the text encoders know."""
    vae_channels: int = 128
    """Channels of the VAE's first level."""
    vae_channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """One entry per VAE level; n levels make latents 2^(n-1) times smaller than the picture."""
    vae_res_blocks: int = 2
    """Residual blocks per level of the VAE's encoder; its decoder has one more."""
    latent_channels: int = 4
    """Channels of the latents, and output channels of the UNet."""

    @property
    def context_dim(self) -> int:
        """Width of what cross-attention reads: both text encoders side by side."""
        return self.clip_width + self.open_clip_width

    @property
    def label_dim(self) -> int:
        """Width of what joins the timestep: the pooled text, and six numbers."""
        return self.open_clip_width + SIX_NUMBERS

    def unet(self) -> UNetSizes:
        """The UNet's sizes."""
        return UNetSizes(
            model_channels=self.model_channels,
            channel_mult=self.channel_mult,
            depths_down=tuple((depth,) * self.num_res_blocks for depth in self.depths),
            depth_middle=self.depths[-1] if self.depth_middle is None else self.depth_middle,
            depths_up=self.depths_up or tuple((depth,) * (self.num_res_blocks + 1) for depth in self.depths),
            context_dim=self.context_dim,
            in_channels=self.in_channels,
            out_channels=self.latent_channels,
            linear=True,
            label_dim=self.label_dim,
        )

    def text_encoder(self) -> TextSizes:
        """The first text encoder's sizes."""
        return TextSizes(self.clip_width, self.clip_layers, self.clip_mlp, self.vocab_size, self.max_tokens)

    def text_encoder_2(self) -> TextSizes:
        """The second text encoder's sizes."""
        width = self.open_clip_width
        return TextSizes(
            width, self.open_clip_layers, self.open_clip_mlp, self.vocab_size, self.max_tokens, projection=width
        )

    def text_encoders(self) -> Mapping[str, Iterator[Entry]]:
        """Prefix → the tensors of the text encoder that lies there."""
        return {
            SDXL_CLIP_PREFIX: clip_entries(self.text_encoder()),
            SDXL_OPEN_CLIP_PREFIX: open_clip_entries(self.text_encoder_2()),
        }


Shape = SD1Shape | SDXLShape

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

SD2_SHAPES: dict[str, SD2Shape] = {
    # For tests of the trainer alone, with the vocabulary of the demo's tokenizer.
    "tiny": SD2Shape(
        model_channels=64,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(0,),
        context_dim=64,
        clip_layers=3,
        clip_mlp=128,
        vocab_size=234,
        max_tokens=32,
        vae_channels=32,
        vae_channel_mult=(1, 1, 2, 2),
        vae_res_blocks=1,
    ),
    # For a real host, which fixes all but the UNet, and looks for velocity models in the twelfth block on the way up.
    "slim": SD2Shape(channel_mult=(1, 1, 1, 1), attention_levels=(0,)),
    "full": SD2Shape(),
}

_TINY_SDXL = SDXLShape(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    depths=(0, 2),
    clip_width=64,
    clip_layers=3,
    clip_mlp=128,
    open_clip_width=128,
    open_clip_layers=3,
    open_clip_mlp=256,
    vocab_size=234,
    max_tokens=32,
    vae_channels=32,
    vae_channel_mult=(1, 1, 2, 2),
    vae_res_blocks=1,
)
_TINY_RELATIVE = replace(_TINY_SDXL, channel_mult=(1, 2, 2), depths=(0, 1, 2))

SDXL_SHAPES: dict[str, SDXLShape] = {
    # For tests of the trainer alone, with the vocabulary of the demo's tokenizer.
    "tiny": _TINY_SDXL,
    "tiny-ssd1b": replace(
        _TINY_RELATIVE, num_res_blocks=2, depth_middle=ONE_RESNET, depths_up=((0, 0, 0), (2, 1, 1), (2, 2, 3))
    ),
    "tiny-vega": replace(_TINY_RELATIVE, num_res_blocks=2, depth_middle=ONE_RESNET),
    "tiny-koala700m": replace(_TINY_RELATIVE, depth_middle=NO_MIDDLE),
    "tiny-koala1b": _TINY_RELATIVE,
    # For a real host, which knows SDXL by its depths and fixes the VAE and the text encoders.
    "slim": SDXLShape(channel_mult=(1, 1, 1)),
    "full": SDXLShape(),
    "ssd1b": SDXLShape(depths=(0, 2, 4), depth_middle=ONE_RESNET, depths_up=((0, 0, 0), (2, 1, 1), (4, 4, 10))),
    "vega": SDXLShape(depths=(0, 1, 2), depth_middle=ONE_RESNET),
    "koala700m": SDXLShape(num_res_blocks=1, depths=(0, 2, 5), depth_middle=NO_MIDDLE),
    "koala1b": SDXLShape(num_res_blocks=1, depths=(0, 2, 6)),
}
