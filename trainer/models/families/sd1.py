"""Stable Diffusion 1.x: one CLIP-L text encoder, 1×1 convolutions around the attention, eight heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..latents import LatentFormat, ScaledLatents
from .base import AdapterMarks, BaseWeights, Conditioning, DiffusionModel, Layout, Prediction, TextEncoderSpec
from .ldm import UnetLayout
from .stable_diffusion import TARGETS, TEXT_TARGETS, StableDiffusionModel, reads_text_alone


class StableDiffusion1:
    """The family: SD 1.1 to 1.5, their fine-tunes, and slim relatives with fewer blocks."""

    name = "sd1"
    title = "Stable Diffusion 1.x"
    short_title = "SD 1"
    scaling_factor = 0.18215
    latents: LatentFormat = ScaledLatents()
    layout: Layout = UnetLayout()
    targets: Mapping[str, str] = TARGETS
    text_targets: Mapping[str, str] = TEXT_TARGETS
    adapter_marks = AdapterMarks(
        context_width=768,
        module_names="",
        architecture="stable-diffusion-v1",
        base_version="sd_v1",
    )
    original_names = False
    transformer_depths: Sequence[int] = (1, 1, 1, 0)
    kohya_v2 = False
    trains_fully = True
    prompt_modules = ""
    text_encoders: Sequence[TextEncoderSpec] = (
        TextEncoderSpec(
            name="text_encoder",
            short_name="clip_l",
            file_prefixes=("cond_stage_model.transformer.",),
            adapter_prefix="lora_te_",
            hidden_act="quick_gelu",
            pads_with_end=True,
            layer=1,
            normed=True,
        ),
    )

    def architecture(self, prediction: Prediction) -> str:
        """One name for all."""
        return "stable-diffusion-v1"

    def base_version(self, prediction: Prediction) -> str:
        """One name for all."""
        return "sd_v1"

    def claims(self, denoiser_config: Mapping[str, Any]) -> bool:
        """Four latent channels, convolutional projections and no conditioning besides the text."""
        return reads_text_alone(denoiser_config) and not denoiser_config.get("use_linear_projection")

    def complete(self, denoiser_config: Mapping[str, Any]) -> dict[str, Any]:
        """Eight heads at every width, which diffusers calls attention_head_dim."""
        return {**denoiser_config, "attention_head_dim": 8}

    def detect(self, denoiser: Mapping[str, Tensor]) -> Prediction:
        """Epsilon."""
        return Prediction()

    def added_conditions(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        """Nothing."""
        return None

    def base_of_distilled(self, title: str) -> str | None:
        """None: distilled models of this family can be trained."""
        return None

    def build(self, weights: BaseWeights) -> DiffusionModel:
        """Build the networks around the tensors, without a copy."""
        return StableDiffusionModel(self, weights)


FAMILY = StableDiffusion1()
