"""Tiny FLUX.2 klein models with random weights: as a host lends them, and as a folder of diffusers' own classes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints_networks import Entry, vae_entries
from torch import Tensor

HEAD = 128
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Flux2Shape:
    """Sizes of a model.

    Attributes:
        heads: attention heads of the transformer, of 128 numbers each.
        double: double blocks.
        single: single blocks.
        text_width: width of Qwen 3.
        text_layers: layers of Qwen 3; 27 are read.
        text_heads: heads of its queries, of 128 numbers each.
        text_key_heads: heads of its keys and values.
        text_mlp: width of its MLPs.
        vae_channels: channels of the autoencoder's first level.
        vae_multiples: of each level, in these channels.
        vae_blocks: residual blocks in each level of its encoder.
        vocabulary: number of tokens that Qwen 3 knows; that of `write_tokenizer`, or 151936 for the real one.
        guidance: whether it has FLUX.2 dev's further input.
    """

    heads: int = 1
    double: int = 2
    single: int = 2
    text_width: int = 32
    text_layers: int = 28
    text_heads: int = 1
    text_key_heads: int = 1
    text_mlp: int = 64
    vae_channels: int = 32
    vae_multiples: tuple[int, ...] = (1, 1, 1, 1)
    vae_blocks: int = 1
    vocabulary: int = 256 + len(SPECIAL_TOKENS)
    guidance: bool = False

    @property
    def width(self) -> int:
        """Width of the transformer."""
        return self.heads * HEAD

    @property
    def vae_widths(self) -> tuple[int, ...]:
        """Channels of each level of the autoencoder."""
        return tuple(multiple * self.vae_channels for multiple in self.vae_multiples)


# ComfyUI knows this autoencoder by its sizes, and has the real tokenizer
COMFY_SHAPE = Flux2Shape(
    heads=2,
    double=2,
    single=3,
    vae_channels=128,
    vae_multiples=(1, 2, 4, 4),
    vae_blocks=2,
    vocabulary=151936,
    text_layers=30,
)


KLEIN_4B = Flux2Shape(
    heads=24,
    double=5,
    single=20,
    text_width=2560,
    text_layers=36,
    text_heads=32,
    text_key_heads=8,
    text_mlp=9728,
    vae_channels=128,
    vae_multiples=(1, 2, 4, 4),
    vae_blocks=2,
    vocabulary=151936,
)


@dataclass(frozen=True)
class Flux2Weights:
    """The tensors of each network under the original names, without prefix."""

    denoiser: Mapping[str, Tensor]
    vae: Mapping[str, Tensor]
    text: Mapping[str, Tensor]


def flux2_weights(shape: Flux2Shape | None = None, *, seed: int = 0, norms: str = "scale") -> Flux2Weights:
    """Random weights.

    Args:
        shape: sizes.
        seed: the same seed gives the same weights.
        norms: what the weights of norms are called: "scale", as in the published files, or "weight", as in ComfyUI.
    """
    shape = shape or Flux2Shape()
    generator = torch.Generator().manual_seed(seed)
    vae = filled(vae_entries(shape.vae_widths, shape.vae_blocks, 32), generator)
    vae |= {
        "bn.running_mean": torch.randn(128, generator=generator) * 0.2,
        "bn.running_var": torch.rand(128, generator=generator) + 0.5,
        "bn.num_batches_tracked": torch.tensor(0),
    }
    denoiser = filled(transformer_entries(shape), generator)
    if norms == "weight":
        denoiser = {
            name.removesuffix(".scale") + ".weight" if name.endswith(".scale") else name: tensor
            for name, tensor in denoiser.items()
        }
    return Flux2Weights(denoiser, vae, filled(qwen3_entries(shape), generator))


def in_float8(denoiser: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The blocks' projections as ComfyUI's files hold them in eight bits, to be computed in full precision."""
    description = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
    stored: dict[str, Tensor] = {}
    for name, tensor in denoiser.items():
        if not re.search(r"blocks\.|\.attention\.|\.feed_forward\.", name) or tensor.ndim != 2:
            stored[name] = tensor
            continue
        module = name.removesuffix(".weight")
        scale = tensor.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[f"{module}.weight_scale"] = scale
        stored[f"{module}.comfy_quant"] = torch.tensor(list(description), dtype=torch.uint8)
    return stored


def flux2_on_meta(shape: Flux2Shape, *, fp8: bool = False) -> Flux2Weights:
    """Tensors without memory, in bfloat16, the autoencoder's in float32; `fp8`: the blocks' projections in float8."""

    def empty(entries: Iterator[Entry], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        return {name: torch.empty(dims, dtype=dtype, device="meta") for name, dims in entries}

    vae = empty(vae_entries(shape.vae_widths, shape.vae_blocks, 32), torch.float32)
    vae |= empty(iter([("bn.running_mean", (128,)), ("bn.running_var", (128,))]), torch.float32)
    denoiser = empty(transformer_entries(shape))
    if fp8:
        projections = [name for name, tensor in denoiser.items() if "_blocks." in name and tensor.ndim == 2]
        denoiser |= {name: denoiser[name].to(torch.float8_e4m3fn) for name in projections}
    return Flux2Weights(denoiser, vae, empty(qwen3_entries(shape)))


def transformer_entries(shape: Flux2Shape) -> Iterator[Entry]:
    """Names and shapes of the transformer's tensors in the published files."""
    width = shape.width
    yield "img_in.weight", (width, 128)
    yield "txt_in.weight", (width, 3 * shape.text_width)
    for embedder in ("time_in", "guidance_in") if shape.guidance else ("time_in",):
        yield f"{embedder}.in_layer.weight", (width, 256)
        yield f"{embedder}.out_layer.weight", (width, width)
    yield "double_stream_modulation_img.lin.weight", (6 * width, width)
    yield "double_stream_modulation_txt.lin.weight", (6 * width, width)
    yield "single_stream_modulation.lin.weight", (3 * width, width)
    for number in range(shape.double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{number}.{stream}"
            yield f"{block}_attn.qkv.weight", (3 * width, width)
            yield f"{block}_attn.norm.query_norm.scale", (HEAD,)
            yield f"{block}_attn.norm.key_norm.scale", (HEAD,)
            yield f"{block}_attn.proj.weight", (width, width)
            yield f"{block}_mlp.0.weight", (6 * width, width)
            yield f"{block}_mlp.2.weight", (width, 3 * width)
    for number in range(shape.single):
        block = f"single_blocks.{number}"
        yield f"{block}.linear1.weight", (9 * width, width)
        yield f"{block}.linear2.weight", (width, 4 * width)
        yield f"{block}.norm.query_norm.scale", (HEAD,)
        yield f"{block}.norm.key_norm.scale", (HEAD,)
    yield "final_layer.adaLN_modulation.1.weight", (2 * width, width)
    yield "final_layer.linear.weight", (128, width)


def qwen3_entries(shape: Flux2Shape) -> Iterator[Entry]:
    """Names and shapes of Qwen 3's tensors, with the vocabulary of `tokenizer`."""
    width = shape.text_width
    yield "model.embed_tokens.weight", (shape.vocabulary, width)
    for number in range(shape.text_layers):
        layer = f"model.layers.{number}"
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.self_attn.q_proj.weight", (shape.text_heads * HEAD, width)
        yield f"{layer}.self_attn.k_proj.weight", (shape.text_key_heads * HEAD, width)
        yield f"{layer}.self_attn.v_proj.weight", (shape.text_key_heads * HEAD, width)
        yield f"{layer}.self_attn.o_proj.weight", (width, shape.text_heads * HEAD)
        yield f"{layer}.self_attn.q_norm.weight", (HEAD,)
        yield f"{layer}.self_attn.k_norm.weight", (HEAD,)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
        yield f"{layer}.mlp.gate_proj.weight", (shape.text_mlp, width)
        yield f"{layer}.mlp.up_proj.weight", (shape.text_mlp, width)
        yield f"{layer}.mlp.down_proj.weight", (width, shape.text_mlp)
    yield "model.norm.weight", (width,)


def filled(entries: Iterator[Entry], generator: torch.Generator) -> dict[str, Tensor]:
    """Random tensors of these names and shapes, such that activations keep their size."""
    tensors = {}
    for name, dims in entries:
        noise = torch.randn(dims, generator=generator)
        if len(dims) == 1:
            tensors[name] = 0.1 * noise + (0.0 if name.endswith(".bias") else 1.0)
        else:
            tensors[name] = noise / math.sqrt(math.prod(dims[1:]))
    return tensors


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer of Qwen's class and special tokens, without merges."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + len(characters) - len(printable))
    vocabulary = {characters[byte]: byte for byte in range(256)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    added = {
        str(256 + number): {"content": token, "special": True, "lstrip": False, "rstrip": False, "normalized": False}
        for number, token in enumerate(SPECIAL_TOKENS)
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "bos_token": None,
        "unk_token": None,
        "model_max_length": 131072,
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def flux2_folder(path: Path, shape: Flux2Shape | None = None, *, seed: int = 0) -> Path:
    """A folder that `Flux2KleinPipeline.from_pretrained` loads, written by the libraries from the same weights."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from diffusers.loaders.single_file_utils import (
        convert_flux2_transformer_checkpoint_to_diffusers,
        convert_ldm_vae_checkpoint,
    )
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    shape = shape or Flux2Shape()
    weights = flux2_weights(shape, seed=seed)
    transformer = Flux2Transformer2DModel(
        num_layers=shape.double,
        num_single_layers=shape.single,
        num_attention_heads=shape.heads,
        joint_attention_dim=3 * shape.text_width,
        guidance_embeds=shape.guidance,
    )
    transformer.load_state_dict(convert_flux2_transformer_checkpoint_to_diffusers(dict(weights.denoiser)))
    sizes: dict[str, Any] = {
        "block_out_channels": list(shape.vae_widths),
        "layers_per_block": shape.vae_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    vae = AutoencoderKLFlux2(**sizes)
    networks = {f"first_stage_model.{name}": tensor for name, tensor in weights.vae.items() if "bn." not in name}
    converted = convert_ldm_vae_checkpoint(networks, sizes)
    linear = {
        name: tensor[:, :, 0, 0] if ".to_" in name and tensor.ndim == 4 else tensor
        for name, tensor in converted.items()
    }
    vae.load_state_dict({**linear, **{name: tensor for name, tensor in weights.vae.items() if "bn." in name}})
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.text_width,
        intermediate_size=shape.text_mlp,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=HEAD,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    text_encoder = Qwen3ForCausalLM(config)
    text_encoder.load_state_dict(dict(weights.text), strict=False)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=AutoTokenizer.from_pretrained(write_tokenizer(path.parent / f"{path.name} tokenizer")),
        transformer=transformer,
    )
    pipeline.save_pretrained(path)
    return path
