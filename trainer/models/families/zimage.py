"""Z-Image: rectified flow, a transformer over the tokens of picture and prompt together, Qwen 3 4B.

Sources: Tongyi-MAI/Z-Image; diffusers' ZImagePipeline and its training example.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flow import ConstantMu, FlowObjective
from ..latents import LatentFormat, ScaledLatents
from .base import (
    AdapterMarks,
    BaseWeights,
    Conditioning,
    DiffusionModel,
    Family,
    Layout,
    Prediction,
    TextEncoderSpec,
    on_meta,
)
from .language_model import LanguageModelConditioned
from .zimage_network import PATCH, ZImageLayout, make_transformer

_LAYER = 35  # of the 36 of Qwen 3 4B, after which hidden states are read
_TRAINING_SHIFT = 2.0  # musubi-tuner, docs/zimage.md
_SAMPLING_SHIFT = 3.0  # ComfyUI's supported_models.ZImage, where no scheduler's configuration states another
_ATTENTION = r"layers\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)"
_MLP = r"layers\.\d+\.feed_forward\.w[123]"


class ZImageModel(LanguageModelConditioned):
    """A built model; see `DiffusionModel`."""

    text_layers = (_LAYER,)
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    sizes = "Use Qwen 3 4B."

    def __init__(self, family: Family, weights: BaseWeights) -> None:
        """Build the networks around the tensors, without a copy; raises as `LanguageModelConditioned`."""
        from diffusers import AutoencoderKL

        shift = weights.scheduler.get("shift") or _SAMPLING_SHIFT
        super().__init__(
            family,
            weights,
            on_meta(make_transformer, weights.denoiser.config),
            AutoencoderKL,
            FlowObjective(ConstantMu(math.log(_TRAINING_SHIFT)), ConstantMu(math.log(shift)), patch=PATCH),
        )

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer over the tokens of picture and prompt, each with its own length."""
        height, width = latents.shape[-2:]
        latents = F.pad(latents, (0, -width % PATCH, 0, -height % PATCH), mode="circular")  # as ComfyUI does
        text = conditioning["text"].to(latents.dtype)
        lengths = conditioning["lengths"]
        ends = [text.shape[1]] * len(text) if lengths.is_meta else lengths.tolist()  # without numbers, the longest
        output: Tensor = self.denoiser(
            x=list(latents[:, :, None].unbind()),
            timestep=timesteps.to(latents.device, torch.float32) / self.objective.timesteps,
            cap_feats=[row[:end] for row, end in zip(text, ends, strict=True)],
        )
        return output[:, :, 0, :height, :width]

    def facts(self) -> dict[str, Any]:
        """The parts of the configurations that affect what the networks compute."""
        transformer = ("rope_theta", "axes_dims", "t_scale", "norm_eps", "qk_norm")
        return {
            **super().facts(),
            "transformer": [self.denoiser.config[name] for name in transformer],
            "vae": [self.vae.config[name] for name in ("scaling_factor", "shift_factor", "norm_num_groups", "act_fn")],
        }


class ZImage:
    """The family: the base model, and by shape the distilled Turbo, which generates but is not trained."""

    name = "zimage"
    title = "Z-Image"
    short_title = "Z-Image"
    scaling_factor = 0.3611
    latents: LatentFormat = ScaledLatents()
    layout: Layout = ZImageLayout()
    targets: Mapping[str, str] = {
        "attention": _ATTENTION,
        "attention-mlp": rf"{_ATTENTION}|{_MLP}",
        "all": r"(layers|noise_refiner|context_refiner|all_final_layer|t_embedder)\..*",  # but for the embedders
    }
    text_targets: Mapping[str, str] = {}
    adapter_marks = AdapterMarks(
        context_width=0,
        module_names=r"^lora_unet_(layers|noise_refiner|context_refiner)_\d+_|^lora_unet_all_(x_embedder|final_layer)_",
        architecture="Z-Image",
        base_version="z_image",
    )
    original_names = False
    transformer_depths: Sequence[int] = (30, 2)
    kohya_v2 = False
    trains_fully = False
    prompt_modules = ""
    text_encoders: Sequence[TextEncoderSpec] = (
        TextEncoderSpec(
            name="text_encoder",
            short_name="qwen3",
            file_prefixes=("text_encoders.qwen3_4b.transformer.",),
            adapter_prefix="lora_te_",
            hidden_act="silu",
            pads_with_end=False,
            layer=_LAYER,
            normed=False,
            is_language_model=True,
            max_tokens=512,
            reads_padding=False,
        ),
    )

    def architecture(self, prediction: Prediction) -> str:
        """One name for all."""
        return "Z-Image"

    def base_version(self, prediction: Prediction) -> str:
        """One name for all."""
        return "z_image"

    def claims(self, denoiser_config: Mapping[str, Any]) -> bool:
        """A transformer that reads a prompt's features, without those of pictures, which Z-Image Omni has."""
        return "cap_feat_dim" in denoiser_config and denoiser_config.get("siglip_feat_dim") is None

    def complete(self, denoiser_config: Mapping[str, Any]) -> dict[str, Any]:
        """The positions of tokens, as in ComfyUI."""
        return {**denoiser_config, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512]}

    def detect(self, denoiser: Mapping[str, Tensor]) -> Prediction:
        """Flow matching alone."""
        return Prediction("flow")

    def base_of_distilled(self, title: str) -> str | None:
        """By name, except de-distilled ones: Turbo has the shapes of the base model."""
        words = re.sub(r"[-_. ]", "", title.lower())
        is_distilled = "zimage" in words and "turbo" in words and not any(word in words for word in ("deturbo", "base"))
        return "Z-Image" if is_distilled else None

    def build(self, weights: BaseWeights) -> DiffusionModel:
        """Build the networks around the tensors, without a copy."""
        return ZImageModel(self, weights)


FAMILY = ZImage()
