"""Stable Diffusion 1.x: one CLIP-L text encoder, 1×1 convolutions around the attention, epsilon prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..objective import Objective, epsilon_objective
from .base import BaseWeights, Component, Conditioning, DiffusionModel, Family, build_around, on_meta
from .ldm import clip_component


class StableDiffusion1:
    """The family: SD 1.1 to 1.5, their fine-tunes, and slim relatives with fewer blocks."""

    title = "Stable Diffusion 1.x"
    architecture = "stable-diffusion-v1"
    base_version = "sd_v1"
    scaling_factor = 0.18215
    text_prefixes: Sequence[str] = ("cond_stage_model.transformer.",)
    text_folders: Sequence[tuple[str, str]] = (("text_encoder", "tokenizer"),)
    targets: Mapping[str, str] = {
        "attention": r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
        "attention-mlp": r".*\.attentions\.\d+\.(proj_in|proj_out"
        r"|transformer_blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)))",
    }

    def claims(self, unet_config: Mapping[str, Any]) -> bool:
        """Four latent channels, convolutional projections and no conditioning beside the text."""
        return (
            unet_config.get("in_channels", 4) == 4
            and not unet_config.get("use_linear_projection")
            and unet_config.get("addition_embed_type") is None
            and unet_config.get("class_embed_type") is None
        )

    def complete(self, unet_config: Mapping[str, Any]) -> dict[str, Any]:
        """Eight heads at every width, which diffusers calls attention_head_dim."""
        return {**unet_config, "attention_head_dim": 8}

    def text_components(self, tensors: Sequence[Mapping[str, Tensor]]) -> list[Component]:
        """One CLIP-L."""
        return [clip_component(tensors[0])]

    def build(self, weights: BaseWeights) -> DiffusionModel:
        """Build the networks around the tensors, without a copy."""
        return StableDiffusion1Model(self, weights)


FAMILY = StableDiffusion1()


class StableDiffusion1Model:
    """A built Stable Diffusion 1.x model; see `DiffusionModel`."""

    def __init__(self, family: StableDiffusion1, weights: BaseWeights) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel

        self.family: Family = family
        self.unet = build_around(on_meta(UNet2DConditionModel, weights.unet.config), weights.unet)
        self.vae = build_around(on_meta(AutoencoderKL, weights.vae.config), weights.vae)
        self.text_encoders: dict[str, nn.Module] = {"text_encoder": _build_text_encoder(weights.text_encoders[0])}
        self.objective = _objective(weights.scheduler)
        self._tokenizer = weights.tokenizers[0]
        self._max_tokens: int = weights.text_encoders[0].config["max_position_embeddings"]

    def _tokens(self, prompt: str) -> list[int]:
        return list(self._tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def overlong(self, prompt: str) -> bool:
        """Whether the text encoder would cut the prompt."""
        return len(self._tokens(prompt)) > self._max_tokens

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts as the last hidden state of CLIP: {"text": (prompts, tokens, width)}, float32."""
        rows = []
        for prompt in prompts:
            ids = self._tokens(prompt)
            end = self._tokenizer.eos_token_id
            if len(ids) > self._max_tokens:
                ids = [*ids[: self._max_tokens - 1], end]
            rows.append(ids + [end] * (self._max_tokens - len(ids)))
        encoder = self.text_encoders["text_encoder"]
        device = next(encoder.parameters()).device
        states = encoder(torch.tensor(rows, device=device)).last_hidden_state
        return {"text": states}

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the UNet."""
        output: Tensor = self.unet(latents, timesteps, conditioning["text"], return_dict=False)[0]
        return output


def _build_text_encoder(component: Component) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = on_meta(lambda **config: CLIPTextModel(CLIPTextConfig(**config)), component.config)
    if not any(name.startswith("text_model.") for name in encoder.state_dict()):  # transformers 5
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in component.tensors.items()}
        component = Component(tensors, component.config)
    return build_around(encoder, component)


def _objective(scheduler: Mapping[str, Any]) -> Objective:
    """Epsilon prediction on the model's own noise schedule; Stable Diffusion's where none is given."""
    if not scheduler:
        return epsilon_objective()
    from diffusers import DDPMScheduler

    return epsilon_objective(DDPMScheduler.from_config(dict(scheduler)).alphas_cumprod)
