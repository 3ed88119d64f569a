"""Stable Diffusion 2.x: OpenCLIP-H, read one layer before the last; Linear projections; epsilon or velocity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..latents import LatentFormat, ScaledLatents
from .base import AdapterMarks, BaseWeights, Conditioning, DiffusionModel, Layout, Prediction, TextEncoderSpec
from .ldm import UnetLayout
from .stable_diffusion import TARGETS, TEXT_TARGETS, StableDiffusionModel, reads_text_alone

_HEAD_CHANNELS = 64
_VELOCITY_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_VELOCITY_STD = 0.09  # a larger spread of that bias means velocity


class StableDiffusion2:
    """The family: SD 2.0 and 2.1, both the 512 (epsilon) and the 768 (velocity) models, and their fine-tunes."""

    name = "sd2"
    title = "Stable Diffusion 2.x"
    short_title = "SD 2"
    scaling_factor = 0.18215
    latents: LatentFormat = ScaledLatents()
    layout: Layout = UnetLayout()
    targets: Mapping[str, str] = TARGETS
    text_targets: Mapping[str, str] = TEXT_TARGETS
    adapter_marks = AdapterMarks(
        context_width=1024,
        module_names="",
        architecture="stable-diffusion-v2",
        base_version="sd_v2",
    )
    original_names = False
    transformer_depths: Sequence[int] = (1, 1, 1, 0)
    kohya_v2 = True
    trains_fully = False
    prompt_modules = ""
    text_encoders: Sequence[TextEncoderSpec] = (
        TextEncoderSpec(
            name="text_encoder",
            short_name="clip_h",
            file_prefixes=("cond_stage_model.model.", "conditioner.embedders.0.model."),
            adapter_prefix="lora_te_",
            hidden_act="gelu",
            pads_with_end=False,
            layer=1,
            normed=True,
            unused_layers=1,
            published_layers=24,
        ),
    )

    def architecture(self, prediction: Prediction) -> str:
        """Stability's names distinguish the two prediction types by their resolutions."""
        return "stable-diffusion-v2-768-v" if prediction.type == "v_prediction" else "stable-diffusion-v2-512"

    def base_version(self, prediction: Prediction) -> str:
        """Kohya's names."""
        return "sd_v2_v" if prediction.type == "v_prediction" else "sd_v2"

    def claims(self, denoiser_config: Mapping[str, Any]) -> bool:
        """Four latent channels, Linear projections and no conditioning besides the text."""
        return reads_text_alone(denoiser_config) and bool(denoiser_config.get("use_linear_projection"))

    def complete(self, denoiser_config: Mapping[str, Any]) -> dict[str, Any]:
        """Heads of 64 channels; diffusers calls their number attention_head_dim."""
        return {**denoiser_config, "attention_head_dim": heads(denoiser_config)}

    def detect(self, denoiser: Mapping[str, Tensor]) -> Prediction:
        """By the spread of one bias, as ComfyUI distinguishes the 768 from the 512 models: the file states nothing."""
        bias = denoiser.get(_VELOCITY_BIAS)
        if bias is not None and float(bias.float().std(correction=0)) > _VELOCITY_STD:
            return Prediction("v_prediction", source="detected in the weights")
        return Prediction("epsilon", source="detected in the weights")

    def added_conditions(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        """Nothing."""
        return None

    def base_of_distilled(self, title: str) -> str | None:
        """None: distilled models of this family can be trained."""
        return None

    def build(self, weights: BaseWeights) -> DiffusionModel:
        """Build the networks around the tensors, without a copy."""
        return StableDiffusionModel(self, weights)


def heads(denoiser_config: Mapping[str, Any]) -> tuple[int, ...]:
    """Number of attention heads at each level, of 64 channels each."""
    return tuple(max(1, channels // _HEAD_CHANNELS) for channels in denoiser_config["block_out_channels"])


FAMILY = StableDiffusion2()
