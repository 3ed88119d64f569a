"""Anima: rectified flow, Cosmos Predict 2's transformer of 2 B, prompts encoded by Qwen 3 0.6B and by T5's tokenizer.

Sources: kohya-ss/sd-scripts, anima_train_network.py; diffusers' AnimaModularPipeline; ComfyUI's code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.devices import to_device
from ..flow import ConstantMu, FlowObjective
from ..latents import LatentFormat, NormalizedLatents
from .anima_network import MASK_CHANNELS, NEEDED, PATCH, AnimaLayout, completed, make_transformer, with_frequencies
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
from .language_model import LanguageModelConditioned

_LAYERS = 28
_MAX_TOKENS = 512
_BETWEEN = -2  # a token that stands between those of the two tokenizers
_SAMPLING_SHIFT = 3.0
_SELF_ATTENTION = r"blocks\.\d+\.attn1\.to_(q|k|v|out\.0)"
_CROSS_ATTENTION = r"blocks\.\d+\.attn2\.to_(q|k|v|out\.0)"
_MLP = r"blocks\.\d+\.ff\.net\.(0\.proj|2)"


class AnimaModel(LanguageModelConditioned):
    """A built model; see `DiffusionModel`.

    The conditioner, a part of the denoiser, takes the language model's hidden states and the prompt's T5 tokens. It
    runs when prompts are encoded, on whatever device the denoiser is on.
    """

    text_layers = (_LAYERS,)
    template = "{}"
    sizes = "Use Qwen 3 0.6B."

    def __init__(self, family: Family, weights: BaseWeights) -> None:
        """Build the networks around the tensors, without a copy; raises as `LanguageModelConditioned`."""
        super().__init__(
            family,
            weights,
            on_meta(make_transformer, weights.denoiser.config),
            newer_class("AutoencoderKLQwenImage", **NEEDED),
            # kohya's: logit-normal without a shift
            FlowObjective(ConstantMu(0.0), ConstantMu(math.log(_SAMPLING_SHIFT)), patch=PATCH),
        )
        with_frequencies(self.denoiser)
        _cast_to_one_type(self.denoiser.llm_adapter)
        self._target_tokenizer = weights.tokenizers[1] if len(weights.tokenizers) > 1 else None

    @property
    def context_width(self) -> int:
        """Width of the conditioner's input for each token of a prompt."""
        return int(self.denoiser.llm_adapter.config.source_dim)

    def tokenize(self, prompts: Sequence[str]) -> Conditioning:
        """Tokens of the prompts, (prompts, tokens): Qwen's, -2, T5's, and -1 behind them; none where a host encodes."""
        rows = [
            torch.tensor([*encoder.tokens(prompt)[: encoder.max_tokens], _BETWEEN, *self._target_tokens(prompt)])
            for encoder in self._encoders.values()
            for prompt in prompts
        ]
        if not rows:
            return {}
        return {"ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)}

    def _target_tokens(self, prompt: str) -> list[int]:
        tokenizer = self._target_tokenizer
        return list(tokenizer(prompt, truncation=True, max_length=_MAX_TOKENS).input_ids) if tokenizer else []

    def encode_tokens(self, encoder: str, ids: Tensor) -> Conditioning:
        """The transformer's text input for tokens: {"text": (prompts, 512, width)}, padded with zeros."""
        both: list[list[Tensor]] = [[], []]
        for row in ids:
            end = int((row == _BETWEEN).nonzero()[0])
            both[0].append(row[:end])
            both[1].append(row[end + 1 :])
        sources, targets = (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1) for rows in both)
        return self._read({**super().encode_tokens(encoder, sources), "targets": targets})

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """As `encode_tokens`, or by the host's language model."""
        if self._host_encoder is None:
            return super().encode_prompts(prompts)
        return self._read(self._host_encoder.encode(prompts))

    def _read(self, encoded: Conditioning) -> Conditioning:
        """What the transformer reads of prompts that the language model has encoded."""
        return {"text": torch.cat([self._conditioned(encoded, row) for row in range(len(encoded["text"]))])}

    def _conditioned(self, encoded: Conditioning, row: int) -> Tensor:
        """What the conditioner makes of one prompt, (1, 512, width): of each alone, without another's padding."""
        conditioner = self.denoiser.llm_adapter
        norm = conditioner.norm.weight
        source = encoded["text"][row : row + 1, : int(encoded["lengths"][row])].to(norm.device, norm.dtype)
        tokens = encoded["targets"][row]
        tokens = tokens[tokens >= 0][None, :_MAX_TOKENS].to(norm.device)
        text = conditioner(source, tokens).float()
        if "target_weights" in encoded:
            weights = encoded["target_weights"][row : row + 1, : tokens.shape[1], None].to(text)
            text = text * F.pad(weights, (0, 0, 0, text.shape[1] - weights.shape[1]))
        made: Tensor = text
        return made

    def overlong(self, prompt: str) -> bool:
        """Whether the prompt has too many tokens for either tokenizer."""
        if self._target_tokenizer is None:
            return super().overlong(prompt)
        targets = self._target_tokenizer(prompt, truncation=False, verbose=False).input_ids
        return super().overlong(prompt) or len(targets) > _MAX_TOKENS

    def zero_conditioning(self) -> Conditioning:
        """Zeros in place of one prompt's encoding."""
        return {"text": torch.zeros(1, _MAX_TOKENS, int(self.denoiser.config.text_embed_dim))}

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer over the tokens of a picture, a video of one frame, without padding."""
        height, width = latents.shape[-2:]
        latents = F.pad(latents, (0, -width % PATCH, 0, -height % PATCH), mode="circular")  # as ComfyUI does
        output: Tensor = self.denoiser(
            hidden_states=F.pad(latents, (0, 0, 0, 0, 0, MASK_CHANNELS))[:, :, None],
            timestep=timesteps.to(latents.device, torch.float32) / self.objective.timesteps,
            encoder_hidden_states=conditioning["text"].to(latents.dtype),
            return_dict=False,
        )[0]
        return output[:, :, 0, :height, :width]

    def facts(self) -> dict[str, Any]:
        """The parts of the configurations that affect what the networks compute."""
        return {
            **super().facts(),
            "transformer": [list(self.denoiser.config[name]) for name in ("max_size", "patch_size", "rope_scale")],
            "vae": [self.vae.config[name] for name in ("latents_mean", "latents_std")],
        }


def _cast_to_one_type(conditioner: nn.Module) -> None:
    """Cast the conditioner to bf16, which copies it, if its tensors are of several types or in float8."""
    types = {parameter.dtype for parameter in conditioner.parameters()}
    if len(types) > 1 or any(dtype.itemsize == 1 for dtype in types):
        to_device(conditioner, next(conditioner.parameters()).device, torch.bfloat16)


class Anima:
    """The family: the base model."""

    name = "anima"
    title = "Anima"
    short_title = "Anima"
    scaling_factor = 1.0
    latents: LatentFormat = NormalizedLatents()
    layout: Layout = AnimaLayout()
    targets: Mapping[str, str] = {
        "attention": rf"{_SELF_ATTENTION}|{_CROSS_ATTENTION}",
        "attention-mlp": rf"{_SELF_ATTENTION}|{_CROSS_ATTENTION}|{_MLP}",
        "all": r"(?!llm_adapter\.).*",  # what reads prompts has done so before the first step
    }
    text_targets: Mapping[str, str] = {}
    adapter_marks = AdapterMarks(
        context_width=0,
        module_names=(
            r"^lora_unet_(llm_adapter_|blocks_\d+_((self|cross)_attn_(q|k|v|output)_proj|mlp_layer[12]|"
            r"adaln_modulation_|attn[12]_to_|ff_net_|norm[123]_linear))"
        ),
        architecture="anima",
        base_version="anima",
        shared_names=("lora_unet_final_layer_linear",),
    )
    original_names = True
    transformer_depths: Sequence[int] = (28,)
    kohya_v2 = False
    trains_fully = False
    prompt_modules = r"llm_adapter\."
    text_encoders: Sequence[TextEncoderSpec] = (
        TextEncoderSpec(
            name="text_encoder",
            short_name="qwen3",
            file_prefixes=("text_encoders.qwen3_06b.transformer.",),
            adapter_prefix="lora_te_",
            hidden_act="silu",
            pads_with_end=False,
            layer=_LAYERS,
            normed=True,
            is_language_model=True,
            max_tokens=_MAX_TOKENS,
            reads_padding=False,
            target_tokenizer="t5_tokenizer",
        ),
    )

    def architecture(self, prediction: Prediction) -> str:
        """As kohya's scripts call it."""
        return "anima-preview"

    def base_version(self, prediction: Prediction) -> str:
        """One name for all."""
        return "anima"

    def claims(self, denoiser_config: Mapping[str, Any]) -> bool:
        """A transformer with a conditioner."""
        return "conditioner" in denoiser_config

    def complete(self, denoiser_config: Mapping[str, Any]) -> dict[str, Any]:
        """The positions of picture tokens."""
        return completed(denoiser_config)

    def detect(self, denoiser: Mapping[str, Tensor]) -> Prediction:
        """Flow matching alone."""
        return Prediction("flow")

    def base_of_distilled(self, title: str) -> str | None:
        """Known only by name."""
        lowered = title.lower()
        return "Anima's base model" if "anima" in lowered and ("turbo" in lowered or "lightning" in lowered) else None

    def build(self, weights: BaseWeights) -> DiffusionModel:
        """Build the networks around the tensors, without a copy."""
        return AnimaModel(self, weights)


FAMILY = Anima()
