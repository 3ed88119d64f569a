"""Tiny Animas with random weights: as a host lends them, and as the files and tokenizers of a command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints_networks import Entry
from flux2_checkpoints import Flux2Shape, filled, qwen3_entries, write_tokenizer
from krea2_checkpoints import Krea2Shape, autoencoder_entries
from safetensors.torch import save_file
from torch import Tensor

HEAD = 128
LATENT_CHANNELS = 16
CONDITIONER = "llm_adapter"
PATCHED = 4 * (LATENT_CHANNELS + 1)  # numbers of a token, those of the mask included

OUTSIDE = {
    "x_embedder": "patch_embed",
    "t_embedder": "time_embed",
    "blocks": "transformer_blocks",
    "head_norm": "norm_out",
    "head_linear": "proj_out",
}
"""What the network's modules outside of blocks are called in diffusers."""

_SMALL_TEXT = Flux2Shape(text_width=48, text_layers=28)


def can_be_made() -> bool:
    """Whether the installed libraries have what an Anima needs."""
    import diffusers
    import transformers

    return hasattr(diffusers, "AnimaTextConditioner") and hasattr(transformers, "Qwen3Model")


@dataclass(frozen=True)
class AnimaShape:
    """Sizes of a model.

    Attributes:
        heads: heads of the transformer's attention, of 128 numbers each.
        layers: its blocks.
        modulation: inner width of its blocks' modulation.
        conditioner_layers: blocks of the conditioner.
        conditioner_heads: heads of its attention.
        conditioner_width: width of the conditioner, and of what the transformer reads.
        vocabulary: tokens of T5's tokenizer.
        text: sizes of Qwen 3.
        vae_channels: channels of the autoencoder's first level.
    """

    heads: int = 2
    layers: int = 2
    modulation: int = 16
    conditioner_layers: int = 2
    conditioner_heads: int = 2
    conditioner_width: int = 32
    vocabulary: int = 64
    text: Flux2Shape = _SMALL_TEXT
    vae_channels: int = 8

    @property
    def width(self) -> int:
        """Width of the transformer."""
        return self.heads * HEAD


COMFY_SHAPE = AnimaShape(vocabulary=32128, text=Flux2Shape(text_width=48, text_layers=28, vocabulary=151936))
ANIMA = AnimaShape(
    heads=16,
    layers=28,
    modulation=256,
    conditioner_layers=6,
    conditioner_heads=16,
    conditioner_width=1024,
    vocabulary=32128,
    text=Flux2Shape(text_width=1024, text_layers=28, text_heads=16, text_key_heads=8, text_mlp=3072, vocabulary=151936),
    vae_channels=96,
)


@dataclass(frozen=True)
class AnimaWeights:
    """The tensors of each network under the original names, without prefix."""

    denoiser: Mapping[str, Tensor]
    vae: Mapping[str, Tensor]
    text: Mapping[str, Tensor]


def anima_weights(shape: AnimaShape | None = None, *, seed: int = 0) -> AnimaWeights:
    """Random weights; the same seed gives the same."""
    shape = shape or AnimaShape()
    generator = torch.Generator().manual_seed(seed)
    denoiser = filled(transformer_entries(shape), generator)
    return AnimaWeights(
        denoiser,
        filled(autoencoder_entries(Krea2Shape(vae_channels=shape.vae_channels)), generator),
        filled(qwen3_entries(shape.text), generator),
    )


def anima_on_meta(shape: AnimaShape, *, fp8: bool = False) -> AnimaWeights:
    """Tensors without memory, in bfloat16, the autoencoder's in float32; `fp8`: the blocks' projections in float8."""

    def empty(entries: Iterator[Entry], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        return {name: torch.empty(dims, dtype=dtype, device="meta") for name, dims in entries}

    denoiser = empty(transformer_entries(shape))
    if fp8:
        projections = [name for name, tensor in denoiser.items() if name.startswith("blocks.") and tensor.ndim == 2]
        denoiser |= {name: denoiser[name].to(torch.float8_e4m3fn) for name in projections}
    vae = empty(autoencoder_entries(Krea2Shape(vae_channels=shape.vae_channels)), torch.float32)
    return AnimaWeights(denoiser, vae, empty(qwen3_entries(shape.text)))


def transformer_entries(shape: AnimaShape) -> Iterator[Entry]:
    """Names and shapes of the transformer's tensors in the published files."""
    width = shape.width
    yield "x_embedder.proj.1.weight", (width, PATCHED)
    yield "t_embedder.1.linear_1.weight", (width, width)
    yield "t_embedder.1.linear_2.weight", (3 * width, width)
    yield "t_embedding_norm.weight", (width,)
    for number in range(shape.layers):
        block = f"blocks.{number}"
        for attention, inputs in (("self_attn", width), ("cross_attn", shape.conditioner_width)):
            yield from _attention(f"{block}.{attention}", width, inputs, HEAD, "output_proj")
        yield f"{block}.mlp.layer1.weight", (4 * width, width)
        yield f"{block}.mlp.layer2.weight", (width, 4 * width)
        for what in ("self_attn", "cross_attn", "mlp"):
            yield f"{block}.adaln_modulation_{what}.1.weight", (shape.modulation, width)
            yield f"{block}.adaln_modulation_{what}.2.weight", (3 * width, shape.modulation)
    yield "final_layer.linear.weight", (4 * LATENT_CHANNELS, width)
    yield "final_layer.adaln_modulation.1.weight", (shape.modulation, width)
    yield "final_layer.adaln_modulation.2.weight", (2 * width, shape.modulation)
    yield from _conditioner_entries(shape)


def _attention(name: str, width: int, inputs: int, head: int, output: str) -> Iterator[Entry]:
    yield f"{name}.q_proj.weight", (width, width)
    yield f"{name}.k_proj.weight", (width, inputs)
    yield f"{name}.v_proj.weight", (width, inputs)
    yield f"{name}.{output}.weight", (width, width)
    yield f"{name}.q_norm.weight", (head,)
    yield f"{name}.k_norm.weight", (head,)


def _conditioner_entries(shape: AnimaShape) -> Iterator[Entry]:
    width = shape.conditioner_width
    head = width // shape.conditioner_heads
    yield f"{CONDITIONER}.embed.weight", (shape.vocabulary, width)
    for number in range(shape.conditioner_layers):
        block = f"{CONDITIONER}.blocks.{number}"
        for attention, inputs in (("self_attn", width), ("cross_attn", shape.text.text_width)):
            yield f"{block}.norm_{attention}.weight", (width,)
            yield from _attention(f"{block}.{attention}", width, inputs, head, "o_proj")
        yield f"{block}.norm_mlp.weight", (width,)
        for layer, dims in (("0", (4 * width, width)), ("2", (width, 4 * width))):
            yield f"{block}.mlp.{layer}.weight", dims
            yield f"{block}.mlp.{layer}.bias", dims[:1]
    yield f"{CONDITIONER}.out_proj.weight", (width, width)
    yield f"{CONDITIONER}.out_proj.bias", (width,)
    yield f"{CONDITIONER}.norm.weight", (width,)


def write_target_tokenizer(folder: Path) -> Path:
    """A tokenizer of characters of T5's class, which ends every text with </s>."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(ord("a"), ord("z") + 1)), ".", ","]
    contents = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "special": True,
                **dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False),
            }
            for number, token in enumerate(letters[:3])
        ],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [[letter, -float(n)] for n, letter in enumerate(letters)]},
        **dict.fromkeys(("truncation", "padding", "normalizer")),
    }
    (folder / "tokenizer.json").write_text(json.dumps(contents), encoding="utf-8")
    config = {
        "tokenizer_class": "T5TokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "additional_special_tokens": [],
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class AnimaFiles:
    """Files of a model in one folder: `transformer`, `vae`, `text_encoder`, with the tokenizers beside them."""

    transformer: Path
    vae: Path
    text_encoder: Path


def anima_files(folder: Path, shape: AnimaShape | None = None, *, seed: int = 0) -> AnimaFiles:
    """Write what a command line takes: the transformer's names begin with "net.", as in the published file."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = anima_weights(shape, seed=seed)
    files = AnimaFiles(folder / "anima-base.safetensors", folder / "vae.safetensors", folder / "qwen.safetensors")
    save_file({f"net.{name}": tensor for name, tensor in weights.denoiser.items()}, files.transformer)
    save_file(dict(weights.vae), files.vae)
    save_file(dict(weights.text), files.text_encoder)
    write_tokenizer(folder / "tokenizer")
    write_target_tokenizer(folder / "t5_tokenizer")
    return files


def anima_folder(path: Path, shape: AnimaShape | None = None, *, seed: int = 0) -> Path:
    """A folder that `AnimaModularPipeline.from_pretrained` loads, written by the libraries from the same weights."""
    from diffusers import (
        AnimaAutoBlocks,
        AnimaTextConditioner,
        AutoencoderKLQwenImage,
        CosmosTransformer3DModel,
        FlowMatchEulerDiscreteScheduler,
    )
    from diffusers.loaders.single_file_utils import (
        convert_cosmos_transformer_checkpoint_to_diffusers,
        convert_wan_vae_to_diffusers,
    )
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    shape = shape or AnimaShape()
    weights = anima_weights(shape, seed=seed)
    parts: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    for name, tensor in weights.denoiser.items():
        is_conditioner = name.startswith(f"{CONDITIONER}.")
        parts[is_conditioner][name.removeprefix(f"{CONDITIONER}.") if is_conditioner else f"net.{name}"] = tensor
    transformer = CosmosTransformer3DModel(
        num_attention_heads=shape.heads,
        num_layers=shape.layers,
        text_embed_dim=shape.conditioner_width,
        adaln_lora_dim=shape.modulation,
        rope_scale=(1.0, 4.0, 4.0),
        extra_pos_embed_type=None,
    )
    transformer.load_state_dict(convert_cosmos_transformer_checkpoint_to_diffusers(parts[False]))
    conditioner = AnimaTextConditioner(
        source_dim=shape.text.text_width,
        target_dim=shape.conditioner_width,
        model_dim=shape.conditioner_width,
        num_layers=shape.conditioner_layers,
        num_attention_heads=shape.conditioner_heads,
        target_vocab_size=shape.vocabulary,
    )
    conditioner.load_state_dict(parts[True])
    vae = AutoencoderKLQwenImage(base_dim=shape.vae_channels)
    vae.load_state_dict(convert_wan_vae_to_diffusers(dict(weights.vae)))
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=shape.text.vocabulary,
            hidden_size=shape.text.text_width,
            intermediate_size=shape.text.text_mlp,
            num_hidden_layers=shape.text.text_layers,
            num_attention_heads=shape.text.text_heads,
            num_key_value_heads=shape.text.text_key_heads,
            head_dim=HEAD,
            max_position_embeddings=40960,
            rope_theta=1e6,
        )
    )
    text_encoder.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.text.items()})
    beside = path.parent / f"{path.name} tokenizers"
    pipeline = AnimaAutoBlocks().init_pipeline()
    pipeline.update_components(
        transformer=transformer.eval(),
        text_conditioner=conditioner.eval(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=AutoTokenizer.from_pretrained(write_tokenizer(beside / "tokenizer")),
        t5_tokenizer=AutoTokenizer.from_pretrained(write_target_tokenizer(beside / "t5_tokenizer")),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(str(path), overwrite_modular_index=True)
    return path
