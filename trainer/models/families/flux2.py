"""FLUX.2 klein, 4B and 9B: rectified flow, a transformer over the tokens of picture and prompt, Qwen 3.

Sources: black-forest-labs/flux2; diffusers' Flux2KleinPipeline and its training example.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import WeightsError
from ..flow import FlowObjective, LinearMu, flux2_sampling_mu
from ..fp8 import keep_in_eight_bits
from ..latents import LatentFormat, PatchedLatents
from ..objective import Objective
from .base import (
    AdapterMarks,
    BaseWeights,
    Conditioning,
    DiffusionModel,
    Family,
    Layout,
    LearnedWord,
    Prediction,
    TextEncoderSpec,
    build_around,
    on_meta,
    token_ids_key,
)
from .flux2_network import AXES, AXIS, MLP_RATIO, THETA, Flux2Layout, diffusers_class, make_transformer
from .qwen3 import Qwen3TextEncoder

_LAYERS = (9, 18, 27)  # of Qwen 3, after which hidden states are read
_ATTENTION = r"transformer_blocks\.\d+\.attn\.(to_qkv|to_added_qkv|to_out\.0|to_add_out)"
_SINGLE = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
_MLP = r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)"


class Flux2Model:
    """A built model; see `DiffusionModel`."""

    def __init__(self, family: Family, weights: BaseWeights) -> None:
        """Build the networks around the tensors, without a copy.

        Raises:
            UnsupportedModelError: The installed diffusers or transformers are too old.
            WeightsError: Something is missing, unknown or of another shape.
        """
        self.family = family
        transformer: Any = build_around(on_meta(make_transformer, weights.denoiser.config), weights.denoiser)
        transformer.time_guidance_embed.time_proj.register_forward_pre_hook(self._with_exact_timesteps)
        keep_in_eight_bits(transformer, weights.denoiser.scales, weights.denoiser.file_names)
        self.denoiser = transformer
        autoencoder = diffusers_class("AutoencoderKLFlux2")
        self.vae: Any = build_around(on_meta(autoencoder, weights.vae.config), weights.vae)
        self._host_encoder = weights.prompt_encoder
        self._encoders: dict[str, Qwen3TextEncoder] = {}
        self.text_encoders: dict[str, nn.Module] = {}
        for spec, component, tokenizer in zip(family.text_encoders, weights.text_encoders, weights.tokenizers):
            width = len(_LAYERS) * int(component.config["hidden_size"])
            if width != int(weights.denoiser.config["joint_attention_dim"]):
                raise WeightsError(
                    f"The text encoder is of another size than the transformer: its hidden states have {width} "
                    f"numbers, and the transformer reads {weights.denoiser.config['joint_attention_dim']}.",
                    "Use Qwen 3 4B with FLUX.2 klein 4B, and Qwen 3 8B with 9B.",
                )
            encoder = Qwen3TextEncoder(component, tokenizer, _LAYERS, spec.max_tokens)
            self._encoders[spec.name] = encoder
            self.text_encoders[spec.name] = encoder.network
            del encoder.network  # only the dictionary holds it, so that its memory can be freed
        self.text_dtype = torch.float32
        for text_encoder in self.text_encoders.values():
            stored = next(text_encoder.parameters())
            self.text_dtype = stored.dtype if stored.element_size() > 1 else torch.bfloat16  # none computes in eight
        self.objective: Objective = FlowObjective(training_mu=LinearMu(), sampling_mu=flux2_sampling_mu)
        self.words: Sequence[LearnedWord] = ()
        self.learn(weights.words)
        self._timesteps: Tensor | None = None

    def learn(self, words: Sequence[LearnedWord]) -> None:
        """There are none: its text encoder reads no vectors of one's own.

        Raises:
            ValueError: There are some.
        """
        if words:
            raise ValueError("no words can be learned by Qwen 3")

    def token_embeddings(self, encoder: str, text: str) -> Tensor:
        """What the text encoder reads for a text's own tokens: (tokens, width)."""
        network: Any = self.text_encoders[encoder]
        embeddings: Tensor = network.embed_tokens(torch.tensor(self._encoders[encoder].tokens(text)))
        return embeddings

    def overlong(self, prompt: str) -> bool:
        """Whether a text encoder would truncate the prompt."""
        if self._host_encoder is not None:
            return self._host_encoder.overlong(prompt)
        return any(encoder.overlong(prompt) for encoder in self._encoders.values())

    def tokenize(self, prompts: Sequence[str]) -> Conditioning:
        """Tokens of the prompts, padded to the number that is read; none where a host encodes."""
        return {token_ids_key(name): encoder.tokenize(prompts) for name, encoder in self._encoders.items()}

    def max_tokens(self, encoder: str) -> int:
        """The number of tokens that the text encoder reads of every prompt."""
        return self._encoders[encoder].max_tokens

    def encode_tokens(self, encoder: str, ids: Tensor) -> Conditioning:
        """The embedding of tokens."""
        return self._encoders[encoder].encode(self.text_encoders[encoder], ids)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts by the text encoder, or by the host's."""
        if self._host_encoder is not None:
            return self._host_encoder.encode(prompts)
        [name] = self._encoders
        return self.encode_tokens(name, self.tokenize(prompts)[token_ids_key(name)])

    def zero_conditioning(self) -> Conditioning:
        """Zeros in place of one prompt's encoding."""
        tokens = self.family.text_encoders[0].max_tokens
        return {"text": torch.zeros(1, tokens, int(self.denoiser.config.joint_attention_dim))}

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer over the tokens of picture and prompt; every number of the latents' grid is a token."""
        _, _, height, width = latents.shape
        text = conditioning["text"].to(latents.dtype)
        self._timesteps = timesteps.to(latents.device, torch.float32)
        output: Tensor = self.denoiser(
            hidden_states=latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            timestep=timesteps / self.objective.timesteps,
            img_ids=_places(1, height, width, 1).to(latents.device),
            txt_ids=_places(1, 1, 1, text.shape[1]).to(latents.device),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).reshape(latents.shape)

    def _with_exact_timesteps(self, module: nn.Module, inputs: object) -> Tensor:
        """The timesteps in float32: rounded to bfloat16, as diffusers does, they are off by up to 2 of 1000."""
        assert self._timesteps is not None
        return self._timesteps

    def facts(self) -> dict[str, Any]:
        """What of configurations decides what the networks compute."""
        return {
            **self.objective.facts(),
            "transformer": [self.denoiser.config[name] for name in ("rope_theta", "axes_dims_rope", "eps")],
            "vae": [self.vae.config[name] for name in ("batch_norm_eps", "norm_num_groups", "act_fn")],
            "text": self._host_encoder.fingerprint if self._host_encoder else _LAYERS,
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
        """A transformer without guidance among its inputs, which FLUX.2 dev has."""
        return "num_single_layers" in denoiser_config and not denoiser_config.get("guidance_embeds", True)

    def complete(self, denoiser_config: Mapping[str, Any]) -> dict[str, Any]:
        """Heads of four axes, and what all FLUX.2 have in common."""
        common = {"axes_dims_rope": (AXIS,) * AXES, "rope_theta": THETA, "mlp_ratio": MLP_RATIO}
        return {**denoiser_config, **common, "attention_head_dim": AXIS * AXES}

    def detect(self, denoiser: Mapping[str, Tensor]) -> Prediction:
        """Flow matching alone."""
        return Prediction("flow")

    def base_of_distilled(self, title: str) -> str | None:
        """Distilled models have the shapes of the base models; their names tell."""
        match = re.search(r"klein[-_. ]?(\d+b)?", title.lower())
        is_distilled = match is not None and "base" not in title.lower()
        return f"FLUX.2 klein base {(match[1] or '4b').upper()}" if is_distilled and match else None

    def build(self, weights: BaseWeights) -> DiffusionModel:
        """Build the networks around the tensors, without a copy."""
        return Flux2Model(self, weights)


FAMILY = Flux2Klein()
