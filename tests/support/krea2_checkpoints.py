"""Tiny Krea 2 models with random weights: as a host lends them, and as a folder of diffusers' own classes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints_networks import Entry
from flux2_checkpoints import Flux2Shape, filled, qwen3_entries, write_tokenizer
from torch import Tensor

HEAD = 128
LATENT_CHANNELS = 16
TAPPED = 12
TEXT_HEADS = 20
SYSTEM = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
OUTSIDE = {
    "first": "img_in",
    "tmlp": "time_embed",
    "tproj": "time_mod_proj",
    "txtfusion": "text_fusion",
    "txtmlp": "txt_in",
    "blocks": "transformer_blocks",
    "last": "final_layer",
}
"""What the network's modules outside of blocks are called in diffusers."""

_SMALL_TEXT = Flux2Shape(text_width=40, text_layers=36)


def can_be_made() -> bool:
    """Whether the installed libraries have what `krea2_folder` needs."""
    import diffusers
    import transformers

    return hasattr(diffusers, "Krea2Pipeline") and hasattr(transformers, "Qwen3VLModel")


@dataclass(frozen=True)
class Krea2Shape:
    """Sizes of a model.

    Attributes:
        heads: heads of the transformer's queries, of 128 numbers each.
        key_heads: heads of its keys and values.
        layers: its blocks.
        text: sizes of Qwen 3 VL's language model, of whose layers 35 are read; its width is a multiple of 20.
        vae_channels: channels of the autoencoder's first level.
    """

    heads: int = 2
    key_heads: int = 1
    layers: int = 2
    text: Flux2Shape = _SMALL_TEXT
    vae_channels: int = 8

    @property
    def width(self) -> int:
        """Width of the transformer."""
        return self.heads * HEAD


COMFY_SHAPE = Krea2Shape(text=Flux2Shape(text_width=40, text_layers=36, vocabulary=151936))
KREA_2 = Krea2Shape(
    heads=48,
    key_heads=12,
    layers=28,
    text=Flux2Shape(text_width=2560, text_layers=36, text_heads=32, text_key_heads=8, text_mlp=9728, vocabulary=151936),
    vae_channels=96,
)


@dataclass(frozen=True)
class Krea2Weights:
    """The tensors of each network under the original names, without prefix."""

    denoiser: Mapping[str, Tensor]
    vae: Mapping[str, Tensor]
    text: Mapping[str, Tensor]


def krea2_weights(shape: Krea2Shape | None = None, *, seed: int = 0) -> Krea2Weights:
    """Random weights; the same seed gives the same."""
    shape = shape or Krea2Shape()
    generator = torch.Generator().manual_seed(seed)
    denoiser = filled(transformer_entries(shape), generator)
    for name, tensor in denoiser.items():
        if name.endswith((".scale", ".lin")) and tensor.ndim == 1:
            tensor -= 1.0  # both are counted from 1
    return Krea2Weights(
        denoiser, filled(autoencoder_entries(shape), generator), filled(qwen3_entries(shape.text), generator)
    )


def krea2_on_meta(shape: Krea2Shape, *, fp8: bool = False) -> Krea2Weights:
    """Tensors without memory, in bfloat16, the autoencoder's in float32; `fp8`: the blocks' projections in float8."""

    def empty(entries: Iterator[Entry], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        return {name: torch.empty(dims, dtype=dtype, device="meta") for name, dims in entries}

    denoiser = empty(transformer_entries(shape))
    if fp8:
        projections = [name for name, tensor in denoiser.items() if name.startswith("blocks.") and tensor.ndim == 2]
        denoiser |= {name: denoiser[name].to(torch.float8_e4m3fn) for name in projections}
    text = empty(iter([*qwen3_entries(shape.text), ("visual.patch_embed.proj.bias", (1024,))]))
    return Krea2Weights(denoiser, empty(autoencoder_entries(shape), torch.float32), text)


def _mlp(width: int) -> int:
    """Width inside of an MLP, as the original code rounds it."""
    return 128 * -(-(int(2 * width / 3) * 4) // 128)


def _block(name: str, width: int, head: int, key_width: int) -> Iterator[Entry]:
    """What blocks of text alone and those of text and picture have in common."""
    yield f"{name}.prenorm.scale", (width,)
    yield f"{name}.postnorm.scale", (width,)
    yield f"{name}.attn.wq.weight", (width, width)
    yield f"{name}.attn.wk.weight", (key_width, width)
    yield f"{name}.attn.wv.weight", (key_width, width)
    yield f"{name}.attn.gate.weight", (width, width)
    yield f"{name}.attn.wo.weight", (width, width)
    yield f"{name}.attn.qknorm.qnorm.scale", (head,)
    yield f"{name}.attn.qknorm.knorm.scale", (head,)
    yield f"{name}.mlp.gate.weight", (_mlp(width), width)
    yield f"{name}.mlp.up.weight", (_mlp(width), width)
    yield f"{name}.mlp.down.weight", (width, _mlp(width))


def transformer_entries(shape: Krea2Shape) -> Iterator[Entry]:
    """Names and shapes of the transformer's tensors in the published files."""
    width, text_width = shape.width, shape.text.text_width
    linears = {
        "first": (width, 4 * LATENT_CHANNELS),
        "tmlp.0": (width, 256),
        "tmlp.2": (width, width),
        "tproj.1": (6 * width, width),
        "txtmlp.1": (width, text_width),
        "txtmlp.3": (width, width),
        "last.linear": (4 * LATENT_CHANNELS, width),
    }
    for name, dims in linears.items():
        yield f"{name}.weight", dims
        yield f"{name}.bias", dims[:1]
    yield "txtmlp.0.scale", (text_width,)
    yield "last.norm.scale", (width,)
    yield "last.modulation.lin", (2, width)
    yield "txtfusion.projector.weight", (1, TAPPED)
    for kind in ("layerwise_blocks", "refiner_blocks"):
        for number in range(2):
            yield from _block(f"txtfusion.{kind}.{number}", text_width, text_width // TEXT_HEADS, text_width)
    for number in range(shape.layers):
        yield f"blocks.{number}.mod.lin", (6 * width,)
        yield from _block(f"blocks.{number}", width, HEAD, shape.key_heads * HEAD)


def _convolution(name: str, *dims: int) -> Iterator[Entry]:
    yield f"{name}.weight", dims
    yield f"{name}.bias", dims[:1]


def _residual(name: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield f"{name}.residual.0.gamma", (inputs, 1, 1, 1)
    yield from _convolution(f"{name}.residual.2", outputs, inputs, 3, 3, 3)
    yield f"{name}.residual.3.gamma", (outputs, 1, 1, 1)
    yield from _convolution(f"{name}.residual.6", outputs, outputs, 3, 3, 3)
    if inputs != outputs:
        yield from _convolution(f"{name}.shortcut", outputs, inputs, 1, 1, 1)


def _middle(name: str, width: int) -> Iterator[Entry]:
    yield from _residual(f"{name}.middle.0", width, width)
    yield f"{name}.middle.1.norm.gamma", (width, 1, 1)
    yield from _convolution(f"{name}.middle.1.to_qkv", 3 * width, width, 1, 1)
    yield from _convolution(f"{name}.middle.1.proj", width, width, 1, 1)
    yield from _residual(f"{name}.middle.2", width, width)


def autoencoder_entries(shape: Krea2Shape) -> Iterator[Entry]:
    """Names and shapes of Wan's autoencoder."""
    first = shape.vae_channels
    widths = [first, first, 2 * first, 4 * first, 4 * first]
    yield from _convolution("encoder.conv1", first, 3, 3, 3, 3)
    number = 0
    for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        for layer in range(2):
            yield from _residual(f"encoder.downsamples.{number}", outputs if layer else inputs, outputs)
            number += 1
        if level < 3:
            yield from _convolution(f"encoder.downsamples.{number}.resample.1", outputs, outputs, 3, 3)
            if level > 0:
                yield from _convolution(f"encoder.downsamples.{number}.time_conv", outputs, outputs, 3, 1, 1)
            number += 1
    yield from _middle("encoder", widths[-1])
    yield "encoder.head.0.gamma", (widths[-1], 1, 1, 1)
    yield from _convolution("encoder.head.2", 2 * LATENT_CHANNELS, widths[-1], 3, 3, 3)
    yield from _convolution("conv1", 2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1, 1, 1)
    yield from _convolution("conv2", LATENT_CHANNELS, LATENT_CHANNELS, 1, 1, 1)
    yield from _convolution("decoder.conv1", widths[-1], LATENT_CHANNELS, 3, 3, 3)
    yield from _middle("decoder", widths[-1])
    number = 0
    inputs = widths[-1]
    for level, outputs in enumerate(reversed(widths[1:])):
        for layer in range(3):
            yield from _residual(f"decoder.upsamples.{number}", outputs if layer else inputs, outputs)
            number += 1
        if level < 3:
            yield from _convolution(f"decoder.upsamples.{number}.resample.1", outputs // 2, outputs, 3, 3)
            if level < 2:
                yield from _convolution(f"decoder.upsamples.{number}.time_conv", 2 * outputs, outputs, 3, 1, 1)
            number += 1
        inputs = outputs // 2
    yield "decoder.head.0.gamma", (first, 1, 1, 1)
    yield from _convolution("decoder.head.2", 3, first, 3, 3, 3)


def krea2_folder(path: Path, shape: Krea2Shape | None = None, *, seed: int = 0) -> Path:
    """A folder that `Krea2Pipeline.from_pretrained` loads, written by the libraries from the same weights."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        Krea2Pipeline,
        Krea2Transformer2DModel,
    )
    from diffusers.loaders.single_file_utils import (
        convert_krea2_transformer_checkpoint_to_diffusers,
        convert_wan_vae_to_diffusers,
    )
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLModel

    shape = shape or Krea2Shape()
    weights = krea2_weights(shape, seed=seed)
    transformer = Krea2Transformer2DModel(
        num_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        intermediate_size=_mlp(shape.width),
        text_hidden_dim=shape.text.text_width,
        text_intermediate_size=_mlp(shape.text.text_width),
    )
    transformer.load_state_dict(convert_krea2_transformer_checkpoint_to_diffusers(dict(weights.denoiser)))
    vae = AutoencoderKLQwenImage(base_dim=shape.vae_channels)
    vae.load_state_dict(convert_wan_vae_to_diffusers(dict(weights.vae)))
    text = {
        "vocab_size": shape.text.vocabulary,
        "hidden_size": shape.text.text_width,
        "intermediate_size": shape.text.text_mlp,
        "num_hidden_layers": shape.text.text_layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
        "max_position_embeddings": 262144,
        "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 40}
    text_encoder = Qwen3VLModel(
        Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    )
    named = {f"language_{name}": tensor for name, tensor in weights.text.items()}
    missing, unexpected = text_encoder.load_state_dict(named, strict=False)
    assert not unexpected
    assert all(name.startswith("visual.") for name in missing)
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(path.parent / f"{path.name} tokenizer"))
    Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
        ),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(path)
    return path
