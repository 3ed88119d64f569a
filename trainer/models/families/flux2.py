"""FLUX.2 klein, 4B and 9B: rectified flow, a transformer over the tokens of picture and prompt, Qwen 3.

Sources: black-forest-labs/flux2; diffusers' Flux2KleinPipeline and its training example.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.devices import sent
from ..flow import FlowObjective, LinearMu, flux2_sampling_mu
from ..latents import LatentFormat, PatchedLatents
from .base import (
    AdapterMarks,
    BaseWeights,
    Conditioning,
    DiffusionModel,
    Family,
    Layout,
    Prediction,
    TextEncoderSpec,
    newer_class,
    on_meta,
)
from .flux2_network import AXES, AXIS, MLP_RATIO, NEEDED, THETA, Flux2Layout, make_transformer
from .language_model import LanguageModelConditioned

_LAYERS = (9, 18, 27)  # of Qwen 3, after which hidden states are read
_ATTENTION = r"transformer_blocks\.\d+\.attn\.(to_qkv|to_added_qkv|to_out\.0|to_add_out)"
_SINGLE = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
_MLP = r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)"


class Flux2Model(LanguageModelConditioned):
    """A built model; see `DiffusionModel`."""

    text_layers = _LAYERS
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    sizes = "Use Qwen 3 4B with FLUX.2 klein 4B, and Qwen 3 8B with 9B."

    def __init__(self, family: Family, weights: BaseWeights) -> None:
        """Build the networks around the tensors, without a copy; raises as `LanguageModelConditioned`."""
        super().__init__(
            family,
            weights,
            on_meta(make_transformer, weights.denoiser.config),
            newer_class("AutoencoderKLFlux2", **NEEDED),
            FlowObjective(training_mu=LinearMu(), sampling_mu=flux2_sampling_mu),
        )
        self.denoiser.time_guidance_embed.time_proj.register_forward_pre_hook(self._with_exact_timesteps)
        self._timesteps: Tensor | None = None

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer over the tokens of picture and prompt; every position of the latents is a token."""
        _, _, height, width = latents.shape
        text = conditioning["text"].to(latents.dtype)
        self._timesteps = timesteps.to(latents.device, torch.float32)
        output: Tensor = self.denoiser(
            hidden_states=latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            timestep=timesteps / self.objective.timesteps,
            img_ids=sent(_places(1, height, width, 1), latents.device),
            txt_ids=sent(_places(1, 1, 1, text.shape[1]), latents.device),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).reshape(latents.shape)

    def _with_exact_timesteps(self, module: nn.Module, inputs: object) -> Tensor:
        """The timesteps in float32: rounded to bfloat16, as diffusers does, they are off by up to 2 of 1000."""
        assert self._timesteps is not None
        return self._timesteps

    def facts(self) -> dict[str, Any]:
        """The parts of the configurations that affect what the networks compute."""
        return {
            **super().facts(),
            "transformer": [self.denoiser.config[name] for name in ("rope_theta", "axes_dims_rope", "eps")],
            "vae": [self.vae.config[name] for name in ("batch_norm_eps", "norm_num_groups", "act_fn")],
        }


def _places(*counts: int) -> Tensor:
    """The places of tokens along picture, rows, columns and text, (tokens, 4)."""
    return torch.cartesian_prod(*(torch.arange(count) for count in counts)).float()


class Flux2Klein:
    """The family: the base models, and by shape the distilled ones, which generate but are not trained."""

    name = "flux2"
    title = "FLUX.2 klein"
    short_title = "FLUX.2"
    scaling_factor = 1.0
    latents: LatentFormat = PatchedLatents()
    layout: Layout = Flux2Layout()
    targets: Mapping[str, str] = {
        "attention": rf"{_ATTENTION}|{_SINGLE}",
        "attention-mlp": rf"{_ATTENTION}|{_MLP}|{_SINGLE}",
        "all": ".*",
    }
    text_targets: Mapping[str, str] = {}
    adapter_marks = AdapterMarks(
        context_width=0,
        module_names="^lora_unet_(double|single)_blocks_|_to_qkv_mlp_proj$|_to_(added_)?qkv$",
        architecture="Flux.2-klein",
        base_version="flux_2_klein",
    )
    original_names = True
    transformer_depths: Sequence[int] = (8, 24)
    kohya_v2 = False
    trains_fully = False
    prompt_modules = ""
    text_encoders: Sequence[TextEncoderSpec] = (
        TextEncoderSpec(
            name="text_encoder",
            short_name="qwen3",
            file_prefixes=("text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_8b.transformer."),
            adapter_prefix="lora_te_",
            hidden_act="silu",
            pads_with_end=False,
            layer=_LAYERS[-1],
            normed=False,
            is_language_model=True,
            max_tokens=512,
        ),
    )

    def architecture(self, prediction: Prediction) -> str:
        """One name for all."""
        return "Flux.2-klein"

    def base_version(self, prediction: Prediction) -> str:
        """One name for all."""
        return "flux_2_klein"

    def claims(self, denoiser_config: Mapping[str, Any]) -> bool:
        """A transformer without a guidance input, which FLUX.2 dev has."""
        return "num_single_layers" in denoiser_config and not denoiser_config.get("guidance_embeds", True)

    def complete(self, denoiser_config: Mapping[str, Any]) -> dict[str, Any]:
        """Heads of four axes, and what all FLUX.2 have in common."""
        common = {"axes_dims_rope": (AXIS,) * AXES, "rope_theta": THETA, "mlp_ratio": MLP_RATIO}
        return {**denoiser_config, **common, "attention_head_dim": AXIS * AXES}

    def detect(self, denoiser: Mapping[str, Tensor]) -> Prediction:
        """Flow matching alone."""
        return Prediction("flow")

    def base_of_distilled(self, title: str) -> str | None:
        """By name: distilled models have the shapes of the base models."""
        match = re.search(r"klein[-_. ]?(\d+b)?", title.lower())
        is_distilled = match is not None and "base" not in title.lower()
        return f"FLUX.2 klein base {(match[1] or '4b').upper()}" if is_distilled and match else None

    def build(self, weights: BaseWeights) -> DiffusionModel:
        """Build the networks around the tensors, without a copy."""
        return Flux2Model(self, weights)


FAMILY = Flux2Klein()
