"""What Stable Diffusion 1, 2 and XL share: a UNet, an autoencoder, CLIP text encoders, presets of modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..objective import Objective, make_objective
from ..stored_weights import keep_as_stored
from .base import BaseWeights, Conditioning, Family, LearnedWord, build_around, on_meta, token_ids_key
from .clip import ClipTextEncoder

# The presets of modules: diffusers trains the attention's projections, kohya every layer of the transformers, and LoCon
# also the convolutions of residual layers and resamplers.
_ATTENTION = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)"
_TRANSFORMERS = rf".*\.attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\.({_ATTENTION}|ff\.net\.(0\.proj|2)))"
_CONVOLUTIONS = r".*\.resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)|.*\.(downsamplers|upsamplers)\.\d+\.conv"
TARGETS: Mapping[str, str] = {
    "attention": rf".*\.{_ATTENTION}",
    "attention-mlp": _TRANSFORMERS,
    "all": rf"{_TRANSFORMERS}|{_CONVOLUTIONS}",
}
_SELF_ATTENTION = r".*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"
TEXT_TARGETS: Mapping[str, str] = {
    "attention": _SELF_ATTENTION,
    "attention-mlp": rf"{_SELF_ATTENTION}|.*\.mlp\.(fc1|fc2)",
}


_UNET_FACTS = ("attention_head_dim", "norm_num_groups", "norm_eps", "act_fn", "freq_shift")


def reads_text_alone(unet_config: Mapping[str, Any]) -> bool:
    """Whether a denoiser takes four latent channels and no conditioning besides the text."""
    return (
        unet_config.get("in_channels", 4) == 4
        and unet_config.get("addition_embed_type") is None
        and unet_config.get("class_embed_type") is None
    )


class UnetFamily(Family, Protocol):
    """A family whose denoiser is a UNet."""

    def added_conditions(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        """Inputs of the denoiser besides the text, as diffusers' `added_cond_kwargs`; None if it has none."""


class StableDiffusionModel:
    """A built model; see `DiffusionModel`."""

    text_dtype = torch.float32

    def __init__(self, family: UnetFamily, weights: BaseWeights) -> None:
        """Build the networks around the tensors, without a copy.

        Raises:
            WeightsError: Something is missing, unknown or of another shape.
        """
        from diffusers import AutoencoderKL, UNet2DConditionModel

        self.family: Family = family
        self._added_conditions = family.added_conditions
        self._clip_skip = weights.clip_skip
        self.denoiser = build_around(on_meta(UNet2DConditionModel, weights.denoiser.config), weights.denoiser)
        lent = weights.denoiser
        keep_as_stored(self.denoiser, lent.scales, lent.packed, lent.file_names)
        self.vae = build_around(on_meta(AutoencoderKL, weights.vae.config), weights.vae)
        self._encoders = {
            spec.name: ClipTextEncoder(spec, component, tokenizer, weights.clip_skip)
            for spec, component, tokenizer in zip(
                family.text_encoders, weights.text_encoders, weights.tokenizers, strict=True
            )
        }
        self.text_encoders: dict[str, nn.Module] = {}
        for name, encoder in self._encoders.items():
            self.text_encoders[name] = encoder.network
            del encoder.network  # only the dictionary holds it, so that its memory can be freed
        self.objective: Objective = make_objective(
            weights.prediction.type, weights.scheduler, zero_terminal_snr=weights.prediction.zero_terminal_snr
        )

        self.words: Sequence[LearnedWord] = ()
        self.learn(weights.words)

    def learn(self, words: Sequence[LearnedWord]) -> None:
        """Set the learned words: from now on these words, and no others, are encoded as their vectors."""
        self.words = tuple(words)
        for name, encoder in self._encoders.items():
            encoder.learn({word.word: word.vectors[name] for word in words if name in word.vectors})

    def token_embeddings(self, encoder: str, text: str) -> Tensor:
        """Input embeddings of a text's own tokens in a text encoder, given by its component's name: (tokens, width)."""
        return self._encoders[encoder].token_embeddings(self.text_encoders[encoder], text)

    def overlong(self, prompt: str) -> bool:
        """Whether a text encoder would truncate the prompt."""
        return any(encoder.overlong(prompt) for encoder in self._encoders.values())

    def tokenize(self, prompts: Sequence[str]) -> Conditioning:
        """Tokens of the prompts for every text encoder."""
        return {token_ids_key(name): encoder.tokenize(prompts) for name, encoder in self._encoders.items()}

    def max_tokens(self, encoder: str) -> int:
        """The maximum number of tokens of a text encoder, given by its component's name."""
        return self._encoders[encoder].max_tokens

    def encode_tokens(self, encoder: str, ids: Tensor) -> Conditioning:
        """Embeddings of tokens by one text encoder, given by its component's name."""
        return self._encoders[encoder].encode(self.text_encoders[encoder], ids)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with all text encoders."""
        ids = self.tokenize(prompts)
        encoded: Conditioning = {}
        for name in self._encoders:
            encoded |= self.encode_tokens(name, ids[token_ids_key(name)])
        return encoded

    def zero_conditioning(self) -> Conditioning:
        """Nothing: the shapes follow from encoding."""
        return {}

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the UNet; the text encoders' hidden states are concatenated along the width."""
        hidden = [conditioning[f"text{spec.number}"] for spec in self.family.text_encoders]
        text = torch.cat(hidden, dim=-1).to(latents.dtype) if len(hidden) > 1 else hidden[0].to(latents.dtype)
        added = self._added_conditions(conditioning)
        output: Tensor = self.denoiser(latents, timesteps, text, added_cond_kwargs=added, return_dict=False)[0]
        return output

    def facts(self) -> dict[str, Any]:
        """The parts of the configurations and settings that affect what the networks compute."""
        unet: Any = self.denoiser.config
        vae: Any = self.vae.config
        text = [getattr(encoder, "config") for encoder in self.text_encoders.values()]  # noqa: B009
        return {
            **self.objective.facts(),
            "unet": [unet[name] for name in _UNET_FACTS],
            "vae": [vae[name] for name in ("scaling_factor", "norm_num_groups", "act_fn")],
            "text": [[config.num_attention_heads, config.hidden_act, config.layer_norm_eps] for config in text],
            "clip_skip": self._clip_skip,
        }
