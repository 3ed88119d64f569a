"""Shared code of models with a language model, their own or the host's, as text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import WeightsError
from ..objective import Objective
from ..stored_weights import keep_as_stored
from .base import (
    BaseWeights,
    Conditioning,
    Family,
    LearnedWord,
    build_around,
    on_meta,
    token_ids_key,
)
from .qwen3 import Qwen3TextEncoder


class LanguageModelConditioned:
    """A built model, except for its denoiser's prediction; see `DiffusionModel`.

    Attributes:
        text_layers: The layers of the language model after which hidden states are used.
        template: The template in which a prompt is encoded, with "{}" for the prompt.
        unread_start: The beginning of the template, whose embedding the denoiser does not use.
        sizes: Which text encoder belongs to which model, as an instruction.
    """

    text_layers: Sequence[int]
    template: str
    unread_start = ""
    sizes: str

    def __init__(
        self, family: Family, weights: BaseWeights, denoiser: nn.Module, vae: type[nn.Module], objective: Objective
    ) -> None:
        """Build the networks around the tensors, without a copy.

        Args:
            family: The family.
            weights: The base model.
            denoiser: The network on the meta device.
            vae: Class of the autoencoder.
            objective: The objective.

        Raises:
            UnsupportedModelError: The installed diffusers or transformers are too old.
            WeightsError: Something is missing, unknown or of another shape.
        """
        self.family = family
        self.denoiser: Any = build_around(denoiser, weights.denoiser)
        lent = weights.denoiser
        keep_as_stored(self.denoiser, lent.scales, lent.packed, lent.file_names)
        self.vae: Any = build_around(on_meta(vae, weights.vae.config), weights.vae)
        self.objective = objective
        self._host_encoder = weights.prompt_encoder
        self._encoders: dict[str, Qwen3TextEncoder] = {}
        self.text_encoders: dict[str, nn.Module] = {}
        for spec, component, tokenizer in zip(family.text_encoders, weights.text_encoders, weights.tokenizers):
            width = len(self.text_layers) * int(component.config["hidden_size"])
            if width != self.context_width:
                raise WeightsError(
                    f"The text encoder does not match the transformer: its hidden states have {width} dimensions, but "
                    f"the transformer expects {self.context_width}.",
                    self.sizes,
                )
            encoder = Qwen3TextEncoder(component, tokenizer, spec, self.text_layers, self.template, self.unread_start)
            self._encoders[spec.name] = encoder
            self.text_encoders[spec.name] = encoder.network
            del encoder.network  # only the dictionary holds it, so that its memory can be freed
        self.text_dtype = torch.float32
        for text_encoder in self.text_encoders.values():
            stored = next(text_encoder.parameters())
            self.text_dtype = stored.dtype if stored.element_size() > 1 else torch.bfloat16  # none computes in eight
        self.words: Sequence[LearnedWord] = ()
        self.learn(weights.words)

    @property
    def context_width(self) -> int:
        """Width of the denoiser's text input for each token of a prompt."""
        return self.family.layout.context_width(self.denoiser.config)

    def learn(self, words: Sequence[LearnedWord]) -> None:
        """Not supported: its text encoder can't learn words.

        Raises:
            ValueError: There are words.
        """
        if words:
            raise ValueError("a language model can't learn words")

    def token_embeddings(self, encoder: str, text: str) -> Tensor:
        """Input embeddings of a text's own tokens: (tokens, width)."""
        network: Any = self.text_encoders[encoder]
        embeddings: Tensor = network.embed_tokens(torch.tensor(self._encoders[encoder].tokens(text)))
        return embeddings

    def overlong(self, prompt: str) -> bool:
        """Whether a text encoder would truncate the prompt."""
        if self._host_encoder is not None:
            return self._host_encoder.overlong(prompt)
        return any(encoder.overlong(prompt) for encoder in self._encoders.values())

    def tokenize(self, prompts: Sequence[str]) -> Conditioning:
        """Tokens of the prompts, padded; none where a host encodes."""
        return {token_ids_key(name): encoder.tokenize(prompts) for name, encoder in self._encoders.items()}

    def max_tokens(self, encoder: str) -> int:
        """The maximum number of tokens of the text encoder."""
        return self._encoders[encoder].max_tokens

    def encode_tokens(self, encoder: str, ids: Tensor) -> Conditioning:
        """The embedding of tokens."""
        return self._encoders[encoder].encode(self.text_encoders[encoder], ids)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with the text encoder, or the host's."""
        if self._host_encoder is not None:
            return self._host_encoder.encode(prompts)
        [name] = self._encoders
        return self.encode_tokens(name, self.tokenize(prompts)[token_ids_key(name)])

    def zero_conditioning(self) -> Conditioning:
        """Zeros in place of one prompt's encoding, as long as the longest."""
        [spec] = self.family.text_encoders
        own = (encoder.max_tokens - encoder.unread_tokens for encoder in self._encoders.values())
        tokens = next(own, spec.max_tokens)
        zeros = {"text": torch.zeros(1, tokens, self.context_width)}
        return zeros if spec.reads_padding else {**zeros, "lengths": torch.tensor([tokens])}

    def facts(self) -> dict[str, Any]:
        """The parts of the configurations that affect what the networks compute, besides denoiser and autoencoder."""
        return {
            **self.objective.facts(),
            "text": self._host_encoder.fingerprint if self._host_encoder else self.text_layers,
        }
