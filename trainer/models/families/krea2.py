"""Krea 2: rectified flow, a transformer over the tokens of prompt and picture together, Qwen 3 VL 4B.

Sources: krea-ai/krea-2; diffusers' Krea2Pipeline and its training example.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.devices import sent
from ..flow import FlowObjective, LinearMu
from ..latents import LatentFormat, NormalizedLatents
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
from .krea2_network import NEEDED, PATCH, Krea2Layout, make_transformer
from .language_model import LanguageModelConditioned

_LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)  # of Qwen 3 VL 4B, after which hidden states are read
_SYSTEM = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
_ATTENTION = r"blocks\.\d+\.attn\.(to_q|to_k|to_v|to_gate|to_out\.0)"
_MLP = r"blocks\.\d+\.ff\.(gate|up|down)"


class Krea2Model(LanguageModelConditioned):
    """A built model; see `DiffusionModel`."""

    text_layers = _LAYERS
    unread_start = _SYSTEM
    template = _SYSTEM + "{}<|im_end|>\n<|im_start|>assistant\n"
    sizes = "Use Qwen 3 VL 4B."

    def __init__(self, family: Family, weights: BaseWeights) -> None:
        """Build the networks around the tensors, without a copy; raises as `LanguageModelConditioned`."""
        mu = LinearMu(last_tokens=6400)  # the largest pictures of the base model's training are of 1280² pixels
        super().__init__(
            family,
            weights,
            on_meta(make_transformer, weights.denoiser.config),
            newer_class("AutoencoderKLQwenImage", **NEEDED),
            FlowObjective(training_mu=mu, sampling_mu=lambda tokens, steps: mu(tokens), patch=PATCH),
        )

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer over the tokens of prompt and picture; text behind a prompt's end is not read."""
        height, width = latents.shape[-2:]
        latents = F.pad(latents, (0, -width % PATCH, 0, -height % PATCH), mode="circular")  # as ComfyUI does
        rows, columns = latents.shape[-2] // PATCH, latents.shape[-1] // PATCH
        text, mask = _read_text(conditioning)
        tapped = int(self.denoiser.config.num_text_layers)
        output: Tensor = self.denoiser(
            hidden_states=F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2),
            encoder_hidden_states=text.to(latents.dtype).reshape(*text.shape[:2], tapped, -1),
            timestep=timesteps.to(latents.device, torch.float32) / self.objective.timesteps,
            position_ids=sent(_places(text.shape[1], rows, columns), latents.device),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        squares = output.transpose(1, 2).reshape(len(latents), -1, rows, columns)
        return F.pixel_shuffle(squares, PATCH)[:, :, :height, :width]

    def facts(self) -> dict[str, Any]:
        """The parts of the configurations that affect what the networks compute."""
        transformer = ("rope_theta", "axes_dims_rope", "norm_eps", "text_num_attention_heads")
        return {
            **super().facts(),
            "transformer": [self.denoiser.config[name] for name in transformer],
            "vae": [self.vae.config[name] for name in ("latents_mean", "latents_std")],
        }


def _read_text(conditioning: Conditioning) -> tuple[Tensor, Tensor | None]:
    """The prompts' embeddings up to the end of the longest, and which tokens are read; None: all of them."""
    text, lengths = conditioning["text"], conditioning["lengths"]
    if lengths.is_meta:  # without numbers, the longest
        return text, None
    longest = int(lengths.max())
    mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
    return text[:, :longest], None if mask.all() else sent(mask, text.device)


def _places(text_tokens: int, rows: int, columns: int) -> Tensor:
    """The places of tokens along picture, rows and columns, (tokens, 3): all of the prompt at the origin."""
    picture = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
    return torch.cat([torch.zeros(text_tokens, 3), picture])


class Krea2:
    """The family: the base model RAW, and by shape the distilled Turbo, which generates but is not trained."""

    name = "krea2"
    title = "Krea 2"
    short_title = "Krea 2"
    scaling_factor = 1.0
    latents: LatentFormat = NormalizedLatents()
    layout: Layout = Krea2Layout()
    targets: Mapping[str, str] = {
        "attention": _ATTENTION,
        "attention-mlp": rf"{_ATTENTION}|{_MLP}",
        "all": r"(?!txtfusion\.projector$).*",  # which has one output, and so no rank above 1
    }
    text_targets: Mapping[str, str] = {}
    adapter_marks = AdapterMarks(
        context_width=0,
        module_names=r"^lora_unet_(txtfusion|txtmlp|tmlp|tproj)_|^lora_unet_blocks_\d+_(attn_(w[qkvo]|gate|to_)|(ff|mlp)_(gate|up|down))",
        architecture="Krea-2",
        base_version="krea2",
    )
    original_names = True
    transformer_depths: Sequence[int] = (28,)
    kohya_v2 = False
    trains_fully = False
    prompt_modules = ""
    text_encoders: Sequence[TextEncoderSpec] = (
        TextEncoderSpec(
            name="text_encoder",
            short_name="qwen3vl",
            file_prefixes=("text_encoders.qwen3vl_4b.transformer.",),
            adapter_prefix="lora_te_",
            hidden_act="silu",
            pads_with_end=False,
            layer=_LAYERS[-1],
            normed=False,
            is_language_model=True,
            max_tokens=512,
            reads_padding=False,
            unread_tokens=34,
        ),
    )

    def architecture(self, prediction: Prediction) -> str:
        """One name for all."""
        return "Krea-2"

    def base_version(self, prediction: Prediction) -> str:
        """One name for all."""
        return "krea2"

    def claims(self, denoiser_config: Mapping[str, Any]) -> bool:
        """A transformer that joins several hidden states of a text encoder."""
        return "num_text_layers" in denoiser_config

    def complete(self, denoiser_config: Mapping[str, Any]) -> dict[str, Any]:
        """Heads of one size, with channels divided among three axes."""
        return {**denoiser_config, "attention_head_dim": 128, "axes_dims_rope": (32, 48, 48), "rope_theta": 1000.0}

    def detect(self, denoiser: Mapping[str, Tensor]) -> Prediction:
        """Flow matching alone."""
        return Prediction("flow")

    def base_of_distilled(self, title: str) -> str | None:
        """By name: Turbo has the shapes of the base model."""
        joined = re.sub(r"[-_. ]", "", title.lower())
        words = set(re.split(r"[^a-z0-9]+", title.lower()))
        is_base = "deturbo" in joined or not words.isdisjoint({"raw", "base"})
        return "Krea 2 RAW" if "krea2" in joined and "turbo" in joined and not is_base else None

    def build(self, weights: BaseWeights) -> DiffusionModel:
        """Build the networks around the tensors, without a copy."""
        return Krea2Model(self, weights)


FAMILY = Krea2()
