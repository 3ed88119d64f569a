"""The list of families, and recognition of unsupported models.

A new family is one file in this folder and its entry in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ...core.errors import UnsupportedModelError, WeightsError
from .anima import FAMILY as ANIMA
from .base import Family, Layout
from .flux2 import FAMILY as FLUX2
from .krea2 import FAMILY as KREA2
from .sd1 import FAMILY as SD1
from .sd2 import FAMILY as SD2
from .sdxl import FAMILY as SDXL
from .zimage import FAMILY as ZIMAGE

FAMILIES: tuple[Family, ...] = (SD1, SD2, SDXL, FLUX2, ZIMAGE, KREA2, ANIMA)


_KNOWN = ""  # a family here, whose names others share
_FOREIGN_KEYS = (  # in this order: further down are those that several families have
    ("llm_adapter.", _KNOWN),
    ("adaln_modulation_self_attn.", "Cosmos Predict 2"),
    ("txtfusion.", _KNOWN),
    ("text_fusion.", _KNOWN),
    ("txt_in.individual_token_refiner", "HunyuanVideo"),
    ("context_embedder.token_refiner", "HunyuanVideo"),
    ("distilled_guidance_layer.", "Chroma"),
    ("double_stream_modulation_img.", _KNOWN),
    ("layers.0.adaLN_modulation.0.", _KNOWN),
    ("double_layers.0.attn.w1q", "AuraFlow"),
    ("joint_transformer_blocks.0.", "AuraFlow"),
    ("double_blocks.0.img_attn.norm.key_norm", "Flux"),
    ("double_blocks.0.img_attn.qkv", "Flux"),
    ("double_blocks.0.img_mod", "Flux"),
    ("single_transformer_blocks.0.", "Flux"),
    ("transformer_blocks.0.img_mod.", "Qwen-Image"),
    ("joint_blocks.0.", "Stable Diffusion 3"),
    ("pos_embed.pos_embed", "Stable Diffusion 3"),
    ("transformer_blocks.0.attn.", "a diffusion transformer (Flux, SD 3 or Qwen-Image)"),
    ("down_blocks.0.0.depthwise", "Stable Cascade"),
    ("clip_txt_mapper", "Stable Cascade"),
    ("cap_embedder.", "Lumina"),
    ("noise_refiner.0.", "Lumina"),
    ("pos_embed.proj", "PixArt"),
    ("t_block.1", "PixArt"),
    ("blocks.0.cross_attn.norm_k", "Wan"),
    ("condition_embedder.time_proj.", "Wan"),
    ("mlp_t5.0", "HunyuanDiT"),
    ("adaln_single.", "LTX-Video"),
    ("noise_augmentor.", "Stable unCLIP"),
)
_FOREIGN_CLASSES = {
    "Flux": "Flux",
    "StableDiffusion3": "Stable Diffusion 3",
    "SD3": "Stable Diffusion 3",
    "PixArt": "PixArt",
    "StableCascade": "Stable Cascade",
    "Sana": "Sana",
    "QwenImage": "Qwen-Image",
    "ZImage": "a relative of Z-Image",
    "Lumina": "Lumina",
    "Hunyuan": "Hunyuan",
    "Kandinsky": "Kandinsky",
    "Wan": "Wan",
    "LTX": "LTX-Video",
    "Chroma": "Chroma",
    "AuraFlow": "AuraFlow",
    "Cosmos": "Cosmos",
}


def joined_titles(families: Iterable[Family]) -> str:
    """The families' titles, for messages."""
    return ", ".join(family.title for family in families)


def _refuse(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The base model is {name}, which is not supported.",
        f"Use one of these base models: {joined_titles(FAMILIES)}.",
    )


def layouts() -> list[Layout]:
    """The layouts of all families, each once."""
    return list({family.layout.network_class: family.layout for family in FAMILIES}.values())


def layout_of(denoiser: Mapping[str, Tensor]) -> Layout | None:
    """The layout of a denoiser with these tensors, by original names without prefix; None if there is none."""
    return next((layout for layout in layouts() if layout.holds(denoiser)), None)


def refuse_foreign_keys(tensors: Mapping[str, Tensor]) -> None:
    """Refuse networks of unsupported families, by the names of their tensors.

    Args:
        tensors: Names of a checkpoint or a network, with or without prefixes.

    Raises:
        UnsupportedModelError: It is a known model that is not supported.
        WeightsError: It is an adapter.
    """
    parts = (".lora_", ".hada_w", ".lokr_w", ".oft_blocks")
    if any(name.startswith("lora_") or any(part in name for part in parts) for name in tensors):
        raise WeightsError(
            "This file is an adapter (LoRA), not a base model.",
            "Use the checkpoint that the adapter was made for; adapters have a separate setting.",
        )
    for part, name in _FOREIGN_KEYS:
        if any(part in key for key in tensors):
            if name == _KNOWN:
                return
            raise _refuse(name)
    if any("time_stack" in key or "temporal_transformer" in key for key in tensors):
        raise _refuse("Stable Video Diffusion")


def refuse_foreign_class(class_name: str) -> None:
    """Refuse a diffusers class that is not the denoiser of a supported family.

    Raises:
        UnsupportedModelError: Always for another class; the message names the model.
    """
    if class_name in {layout.network_class for layout in layouts()}:
        return
    known = next((title for start, title in _FOREIGN_CLASSES.items() if class_name.startswith(start)), None)
    raise _refuse(known or f"of the class {class_name}")


def identify(denoiser_config: Mapping[str, Any]) -> Family:
    """The family of a denoiser.

    Args:
        denoiser_config: Configuration with diffusers' keys, read or inferred.

    Raises:
        UnsupportedModelError: It belongs to a family that is not supported; the message names it.
    """
    for family in FAMILIES:
        if family.claims(denoiser_config):
            return family
    raise _refuse(_unsupported_name(denoiser_config))


def _unsupported_name(config: Mapping[str, Any]) -> str:
    if "num_single_layers" in config:
        return "FLUX.2 dev"
    if "cap_feat_dim" in config:
        return "Z-Image Omni"
    if "adaln_lora_dim" in config:
        return "Cosmos Predict"
    context = config.get("cross_attention_dim")
    has_added_conditions = config.get("addition_embed_type") is not None
    if has_added_conditions:
        generation = "SDXL"
    else:
        generation = "SD 2.x" if config.get("use_linear_projection") else "SD 1.x"
    by_channels = {9: "an inpainting model", 8: "an InstructPix2Pix model", 5: "a depth model", 7: "an upscaler"}
    channels = config.get("in_channels", 4)
    if channels in by_channels:
        return f"{by_channels[channels]} ({generation})"
    if has_added_conditions and context == 1280:
        return "the SDXL refiner"
    if has_added_conditions or config.get("class_embed_type") is not None:
        return "Stable unCLIP"
    return f"an unknown UNet ({channels} input channels, context width {context})"
