"""Stable Diffusion XL and its distilled relatives: CLIP-L and OpenCLIP-G, pooled text, size and crop conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..latents import LatentFormat, ScaledLatents
from .base import AdapterMarks, BaseWeights, Conditioning, DiffusionModel, Layout, Prediction, TextEncoderSpec
from .ldm import UnetLayout
from .sd2 import heads
from .stable_diffusion import TARGETS, TEXT_TARGETS, StableDiffusionModel

_FOREIGN_CONTEXTS = (1280, 1024)  # context widths of SDXL's refiner and of Stable unCLIP
_B_LORA = r"up_blocks\.0\.attentions\.{}\..*attn[12]\.(to_q|to_k|to_v|to_out\.0)"


class StableDiffusionXL:
    """The family: SDXL 1.0, its fine-tunes with epsilon or velocity, and SSD-1B, Segmind Vega and KOALA by shape.

    The presets "b-lora-content" and "b-lora-style" are the two transformer blocks of Frenkel et al. 2024 (B-LoRA).
    """

    name = "sdxl"
    title = "Stable Diffusion XL"
    short_title = "SDXL"
    scaling_factor = 0.13025
    latents: LatentFormat = ScaledLatents()
    layout: Layout = UnetLayout()
    targets: Mapping[str, str] = {
        **TARGETS,
        "b-lora-content": _B_LORA.format("0"),
        "b-lora-style": _B_LORA.format("1"),
    }
    text_targets: Mapping[str, str] = TEXT_TARGETS
    adapter_marks = AdapterMarks(
        context_width=2048,
        module_names="^lora_te2_|^lora_unet_label_emb",
        architecture="stable-diffusion-xl",
        base_version="sdxl",
    )
    original_names = True
    transformer_depths: Sequence[int] = (0, 2, 10)
    kohya_v2 = False
    trains_fully = False
    prompt_modules = ""
    text_encoders: Sequence[TextEncoderSpec] = (
        TextEncoderSpec(
            name="text_encoder",
            short_name="clip_l",
            file_prefixes=("conditioner.embedders.0.transformer.",),
            adapter_prefix="lora_te1_",
            hidden_act="quick_gelu",
            pads_with_end=True,
            layer=2,
            normed=False,
        ),
        TextEncoderSpec(
            name="text_encoder_2",
            short_name="clip_g",
            file_prefixes=("conditioner.embedders.1.model.",),
            adapter_prefix="lora_te2_",
            hidden_act="gelu",
            pads_with_end=False,
            layer=2,
            normed=False,
            pooled=True,
        ),
    )

    def architecture(self, prediction: Prediction) -> str:
        """One name for all."""
        return "stable-diffusion-xl-v1-base"

    def base_version(self, prediction: Prediction) -> str:
        """One name for all."""
        return "sdxl_base_v1-0"

    def claims(self, denoiser_config: Mapping[str, Any]) -> bool:
        """Pooled text and sizes as further conditioning; SDXL's refiner and Stable unCLIP are narrower."""
        return (
            denoiser_config.get("in_channels", 4) == 4
            and denoiser_config.get("addition_embed_type") == "text_time"
            and denoiser_config.get("cross_attention_dim") not in _FOREIGN_CONTEXTS
        )

    def complete(self, denoiser_config: Mapping[str, Any]) -> dict[str, Any]:
        """Heads of 64 channels; size and crop are six numbers, embedded in 256 channels each."""
        return {**denoiser_config, "attention_head_dim": heads(denoiser_config), "addition_time_embed_dim": 256}

    def detect(self, denoiser: Mapping[str, Tensor]) -> Prediction:
        """Epsilon; checkpoints that predict velocity state it."""
        return Prediction()

    def added_conditions(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        """The pooled text of the second encoder, and size and crop."""
        return {"text_embeds": conditioning["pooled_2"], "time_ids": conditioning["size"]}

    def base_of_distilled(self, title: str) -> str | None:
        """None: distilled models of this family can be trained."""
        return None

    def build(self, weights: BaseWeights) -> DiffusionModel:
        """Build the networks around the tensors, without a copy."""
        return StableDiffusionModel(self, weights)


FAMILY = StableDiffusionXL()
