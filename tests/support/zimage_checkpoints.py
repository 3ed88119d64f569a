"""Tiny Z-Image models with random weights: as a host lends them, and as a folder of diffusers' own classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints_networks import Entry, vae_entries
from flux2_checkpoints import Flux2Shape, filled, qwen3_entries, write_tokenizer
from torch import Tensor

# Qwen 3's own template, for one message of the user, with or without thinking.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
HEAD = 128
LATENT_CHANNELS = 16
REFINERS = 2
_NO_CONVOLUTION = ("quant_conv.", "post_quant_conv.")
_SMALL_TEXT = Flux2Shape(text_layers=36)


@dataclass(frozen=True)
class ZImageShape:
    """Sizes of a model.

    Attributes:
        heads: attention heads of the transformer, of 128 numbers each; a multiple of 3.
        layers: its blocks.
        text: sizes of Qwen 3, of whose layers 35 are read.
        vae_channels: channels of the autoencoder's first level.
        vae_multiples: of each level, in these channels.
        vae_blocks: residual blocks in each level of its encoder.
    """

    heads: int = 3
    layers: int = 2
    text: Flux2Shape = _SMALL_TEXT
    vae_channels: int = 32
    vae_multiples: tuple[int, ...] = (1, 1, 1, 1)
    vae_blocks: int = 1

    @property
    def width(self) -> int:
        """Width of the transformer."""
        return self.heads * HEAD

    @property
    def vae_widths(self) -> tuple[int, ...]:
        """Channels of each level of the autoencoder."""
        return tuple(multiple * self.vae_channels for multiple in self.vae_multiples)


# ComfyUI knows this autoencoder by its sizes, and has the real tokenizer
COMFY_SHAPE = ZImageShape(
    heads=9,  # the smallest of which its network has the same widths as the published one's ratios
    layers=2,
    text=Flux2Shape(text_layers=36, vocabulary=151936),
    vae_channels=128,
    vae_multiples=(1, 2, 4, 4),
    vae_blocks=2,
)
Z_IMAGE = ZImageShape(
    heads=30,
    layers=30,
    text=Flux2Shape(text_width=2560, text_layers=36, text_heads=32, text_key_heads=8, text_mlp=9728, vocabulary=151936),
    vae_channels=128,
    vae_multiples=(1, 2, 4, 4),
    vae_blocks=2,
)


@dataclass(frozen=True)
class ZImageWeights:
    """The tensors of each network under the original names, without prefix."""

    denoiser: Mapping[str, Tensor]
    vae: Mapping[str, Tensor]
    text: Mapping[str, Tensor]


def zimage_weights(shape: ZImageShape | None = None, *, seed: int = 0) -> ZImageWeights:
    """Random weights; the same seed gives the same."""
    shape = shape or ZImageShape()
    generator = torch.Generator().manual_seed(seed)
    return ZImageWeights(
        filled(transformer_entries(shape), generator),
        filled(autoencoder_entries(shape), generator),
        filled(qwen3_entries(shape.text), generator),
    )


def zimage_on_meta(shape: ZImageShape, *, fp8: bool = False) -> ZImageWeights:
    """Tensors without memory, in bfloat16, the autoencoder's in float32; `fp8`: the blocks' projections in float8."""

    def empty(entries: Iterator[Entry], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        return {name: torch.empty(dims, dtype=dtype, device="meta") for name, dims in entries}

    denoiser = empty(transformer_entries(shape))
    if fp8:
        projections = [name for name in denoiser if ".attention." in name or ".feed_forward." in name]
        denoiser |= {name: denoiser[name].to(torch.float8_e4m3fn) for name in projections if denoiser[name].ndim == 2}
    return ZImageWeights(denoiser, empty(autoencoder_entries(shape), torch.float32), empty(qwen3_entries(shape.text)))


def autoencoder_entries(shape: ZImageShape) -> Iterator[Entry]:
    """Names and shapes of FLUX.1's autoencoder, which has no convolutions around its latents."""
    for name, dims in vae_entries(shape.vae_widths, shape.vae_blocks, LATENT_CHANNELS):
        if not name.startswith(_NO_CONVOLUTION):
            yield name, dims


def transformer_entries(shape: ZImageShape) -> Iterator[Entry]:
    """Names and shapes of the transformer's tensors in the published files."""
    width = shape.width
    modulation = min(width, 256)
    yield "x_embedder.weight", (width, 4 * LATENT_CHANNELS)
    yield "x_embedder.bias", (width,)
    yield "x_pad_token", (1, width)
    yield "cap_pad_token", (1, width)
    yield "cap_embedder.0.weight", (shape.text.text_width,)
    yield "cap_embedder.1.weight", (width, shape.text.text_width)
    yield "cap_embedder.1.bias", (width,)
    yield "t_embedder.mlp.0.weight", (1024, 256)
    yield "t_embedder.mlp.0.bias", (1024,)
    yield "t_embedder.mlp.2.weight", (modulation, 1024)
    yield "t_embedder.mlp.2.bias", (modulation,)
    blocks = {"noise_refiner": REFINERS, "context_refiner": REFINERS, "layers": shape.layers}
    for kind, count in blocks.items():
        for number in range(count):
            block = f"{kind}.{number}"
            if kind != "context_refiner":
                yield f"{block}.adaLN_modulation.0.weight", (4 * width, modulation)
                yield f"{block}.adaLN_modulation.0.bias", (4 * width,)
            yield f"{block}.attention.qkv.weight", (3 * width, width)
            yield f"{block}.attention.out.weight", (width, width)
            yield f"{block}.attention.q_norm.weight", (HEAD,)
            yield f"{block}.attention.k_norm.weight", (HEAD,)
            yield f"{block}.feed_forward.w1.weight", (8 * width // 3, width)
            yield f"{block}.feed_forward.w2.weight", (width, 8 * width // 3)
            yield f"{block}.feed_forward.w3.weight", (8 * width // 3, width)
            for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                yield f"{block}.{norm}.weight", (width,)
    yield "final_layer.linear.weight", (4 * LATENT_CHANNELS, width)
    yield "final_layer.linear.bias", (4 * LATENT_CHANNELS,)
    yield "final_layer.adaLN_modulation.1.weight", (width, modulation)
    yield "final_layer.adaLN_modulation.1.bias", (width,)


def zimage_folder(path: Path, shape: ZImageShape | None = None, *, seed: int = 0) -> Path:
    """A folder that `ZImagePipeline.from_pretrained` loads, written by the libraries from the same weights."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from diffusers.loaders.single_file_utils import (
        convert_ldm_vae_checkpoint,
        convert_z_image_transformer_checkpoint_to_diffusers,
    )
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    shape = shape or ZImageShape()
    weights = zimage_weights(shape, seed=seed)
    transformer = ZImageTransformer2DModel(
        dim=shape.width,
        n_layers=shape.layers,
        n_refiner_layers=REFINERS,
        n_heads=shape.heads,
        n_kv_heads=shape.heads,
        cap_feat_dim=shape.text.text_width,
        axes_lens=[1536, 512, 512],
    )
    transformer.load_state_dict(convert_z_image_transformer_checkpoint_to_diffusers(dict(weights.denoiser)))
    sizes = {
        "block_out_channels": list(shape.vae_widths),
        "layers_per_block": shape.vae_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * len(shape.vae_widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(shape.vae_widths),
    }
    vae = AutoencoderKL(
        **sizes,
        latent_channels=LATENT_CHANNELS,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    prefixed = {f"first_stage_model.{name}": tensor for name, tensor in weights.vae.items()}
    converted = convert_ldm_vae_checkpoint(prefixed, sizes)
    vae.load_state_dict(
        {
            name: tensor[:, :, 0, 0] if ".to_" in name and tensor.ndim == 4 else tensor
            for name, tensor in converted.items()
        }
    )
    config = Qwen3Config(
        vocab_size=shape.text.vocabulary,
        hidden_size=shape.text.text_width,
        intermediate_size=shape.text.text_mlp,
        num_hidden_layers=shape.text.text_layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=HEAD,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    text_encoder = Qwen3ForCausalLM(config)
    text_encoder.load_state_dict(dict(weights.text), strict=False)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=AutoTokenizer.from_pretrained(write_tokenizer(path.parent / f"{path.name} tokenizer")),
        transformer=transformer,
    ).save_pretrained(path)
    return path
