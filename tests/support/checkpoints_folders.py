"""Tiny models as folders in diffusers' layout: the weights of a single file, in the classes of diffusers itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from checkpoints import (
    OPEN_CLIP_PREFIX,
    SD2_SHAPES,
    SDXL_CLIP_PREFIX,
    SDXL_OPEN_CLIP_PREFIX,
    SDXL_SHAPES,
    SD2Shape,
    SDXLShape,
    Shape,
    sd2_state_dict,
    sdxl_state_dict,
)
from checkpoints_networks import NO_MIDDLE, ONE_RESNET, TextSizes
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENIZER = Path(__file__).resolve().parents[2] / "demo" / "base" / "tokenizer"
HEAD_CHANNELS = 64
SCALING_FACTORS = {"sd2": 0.18215, "sdxl": 0.13025}
OPEN_CLIP_NAMES = (
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("ln_final.", "text_model.final_layer_norm."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("attn.out_proj.", "self_attn.out_proj."),
)


def diffusers_folder(
    path: Path,
    family: Literal["sd2", "sdxl"],
    *,
    size: str | Shape = "tiny",
    velocity: bool = False,
    ztsnr: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a random-weight pipeline that `from_pretrained` loads.

    Networks hold what `sd2_state_dict` or `sdxl_state_dict` gives for the same size, seed and type; only the text
    encoder of SD 2 lacks its last layer, which nothing reads, as in the published folders. Tokenizers are the demo's.

    Args:
        path: the folder to write.
        family: which family.
        size: one of the family's sizes with the demo's vocabulary, or sizes of one's own.
        velocity: whether the scheduler says that the model predicts v.
        ztsnr: whether the scheduler says that the model was trained with zero terminal signal-to-noise ratio.
        seed: the same seed gives the same weights, up to the rounding of `dtype`.
        dtype: type of all weights.

    Returns:
        `path`.
    """
    if family == "sd2":
        shape: Shape = SD2_SHAPES[size] if isinstance(size, str) else size
        weights = sd2_state_dict(shape, velocity=velocity, seed=seed, dtype=dtype)
    else:
        shape = SDXL_SHAPES[size] if isinstance(size, str) else size
        weights = sdxl_state_dict(shape, seed=seed, dtype=dtype)
    parts = {
        "unet": unet(shape, weights),
        "vae": vae(shape, weights, SCALING_FACTORS[family]),
        "scheduler": scheduler(velocity=velocity, ztsnr=ztsnr),
    }
    if isinstance(shape, SDXLShape):
        parts |= sdxl_text(shape, weights)
        pipeline = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True)
    else:
        parts |= sd2_text(shape, weights)
        parts |= {"safety_checker": None, "feature_extractor": None}
        pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(path)
    return path


def unet_config(shape: Shape) -> dict[str, Any]:
    """Keyword arguments of diffusers' UNet, as the published folders have them; heads have 64 channels."""
    sizes = shape.unet()
    widths = [mult * sizes.model_channels for mult in sizes.channel_mult]
    attends = [any(depths) for depths in sizes.depths_down]
    middle = {NO_MIDDLE: None, ONE_RESNET: "UNetMidBlock2D"}.get(sizes.depth_middle, "UNetMidBlock2DCrossAttn")
    config: dict[str, Any] = {
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "block_out_channels": widths,
        "layers_per_block": len(sizes.depths_down[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attends],
        "mid_block_type": middle,
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attends)],
        "attention_head_dim": [max(1, width // HEAD_CHANNELS) for width in widths],  # the number of heads, by a mistake
        "cross_attention_dim": sizes.context_dim,
        "use_linear_projection": sizes.linear,
        "sample_size": 64,
    }
    if sizes.label_dim is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": sizes.label_dim,
        }
    if any(len(set(depths)) > 1 for depths in sizes.depths_up) or sizes.depth_middle == ONE_RESNET:
        config["transformer_layers_per_block"] = [list(depths) if any(depths) else 1 for depths in sizes.depths_down]
        config["reverse_transformer_layers_per_block"] = [
            list(depths) if any(depths) else 1 for depths in reversed(sizes.depths_up)
        ]
    else:
        config["transformer_layers_per_block"] = [max(1, depths[0]) for depths in sizes.depths_down]
    return config


def unet(shape: Shape, weights: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """The UNet of a checkpoint in diffusers' class."""
    config = unet_config(shape)
    names = {"class_embed_type": None, "addition_embed_type": None, **config}
    return filled(UNet2DConditionModel(**config), convert_ldm_unet_checkpoint(weights, names))


def vae(shape: Shape, weights: Mapping[str, Tensor], scaling_factor: float) -> AutoencoderKL:
    """The autoencoder of a checkpoint in diffusers' class."""
    levels = len(shape.vae_channel_mult)
    config = {
        "block_out_channels": [mult * shape.vae_channels for mult in shape.vae_channel_mult],
        "layers_per_block": shape.vae_res_blocks,
        "latent_channels": shape.latent_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    network = AutoencoderKL(**config, scaling_factor=scaling_factor, sample_size=64)
    return filled(network, convert_ldm_vae_checkpoint(weights, config))


def scheduler(*, velocity: bool, ztsnr: bool) -> DDPMScheduler:
    """The noise schedule of SD 2 and SDXL."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction" if velocity else "epsilon",
        rescale_betas_zero_snr=ztsnr,
        timestep_spacing="trailing" if ztsnr else "leading",
    )


def sd2_text(shape: SD2Shape, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Text encoder and tokenizer of SD 2."""
    sizes = replace(shape.text_encoder(), layers=shape.clip_layers - 1)
    names = hugging_face_names(below(weights, OPEN_CLIP_PREFIX))
    kept = {
        name: tensor
        for name, tensor in names.items()
        if f".layers.{sizes.layers}." not in name and not name.startswith("text_projection")
    }
    return {
        "text_encoder": text_model(CLIPTextModel, sizes, kept, "gelu"),
        "tokenizer": CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=first_token()),
    }


def sdxl_text(shape: SDXLShape, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Both text encoders and tokenizers of SDXL."""
    first = below(weights, SDXL_CLIP_PREFIX)
    first.pop("text_model.embeddings.position_ids")
    second = hugging_face_names(below(weights, SDXL_OPEN_CLIP_PREFIX))
    return {
        "text_encoder": text_model(CLIPTextModel, shape.text_encoder(), first, "quick_gelu"),
        "text_encoder_2": text_model(CLIPTextModelWithProjection, shape.text_encoder_2(), second, "gelu"),
        "tokenizer": CLIPTokenizer.from_pretrained(TOKENIZER),
        "tokenizer_2": CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=first_token()),
    }


def text_model(kind: type[nn.Module], sizes: TextSizes, weights: Mapping[str, Tensor], activation: str) -> nn.Module:
    """A text encoder in transformers' class; heads have 64 channels."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    config = CLIPTextConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // HEAD_CHANNELS,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=sizes.max_tokens,
        hidden_act=activation,
        projection_dim=sizes.projection or sizes.width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    network = kind(config)
    if not any(name.startswith("text_model.") for name in network.state_dict()):  # as of transformers 5
        weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    return filled(network, weights)


def hugging_face_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An OpenCLIP text encoder's tensors under Hugging Face's names, queries, keys and values apart."""
    named = {}
    for name, tensor in weights.items():
        for ours, theirs in OPEN_CLIP_NAMES:
            name = name.replace(ours, theirs, 1)
        if ".attn.in_proj_" in name:
            layer, kind = name.split(".attn.in_proj_")
            for projection, rows in zip("qkv", tensor.chunk(3)):
                named[f"{layer}.self_attn.{projection}_proj.{kind}"] = rows.clone()
        elif name == "text_projection":
            named["text_projection.weight"] = tensor.T.contiguous()
        elif name != "logit_scale":
            named[name] = tensor
    return named


def first_token() -> str:
    """The token of id 0, which fills prompts for OpenCLIP."""
    return CLIPTokenizer.from_pretrained(TOKENIZER).convert_ids_to_tokens(0)


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def filled(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The network with these weights, all of them and no others, and of their type."""
    dtype = next(iter(weights.values())).dtype
    if dtype != torch.float32:
        network.to(dtype)
    network.load_state_dict(weights, strict=True)
    return network.eval()
