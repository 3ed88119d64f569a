"""CLIP text encoders: configuration from shapes, tokens, and the outputs that a denoiser uses."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import SettingsError, WeightsError, suggest
from ..clip_names import TEXT_TOWER, in_transformers_names, names_as_in
from .base import Component, Conditioning, TextEncoderSpec, build_around, on_meta

HEAD = 64  # channels of an attention head in every CLIP
_TENSORS = tuple(TEXT_TOWER + part for part in ("embeddings.", "encoder.", "final_layer_norm."))


def text_component(
    tensors: Mapping[str, Tensor], spec: TextEncoderSpec, config: Mapping[str, Any] | None = None
) -> Component:
    """Infer a transformers `CLIPTextConfig` from a text encoder's tensors and give them transformers' names.

    Args:
        tensors: In Hugging Face's layout (with or without the leading "text_model.") or in OpenCLIP's; without the
            file's prefix. Other tensors are ignored. None is copied.
        spec: Which encoder of the family it is.
        config: Its configuration where it is known, as in a folder of diffusers; then no layer is left out.

    Raises:
        WeightsError: A tensor that the configuration depends on is missing.
    """
    named = {
        name: tensor
        for name, tensor in in_transformers_names(tensors).items()
        if name.startswith(_TENSORS) or (spec.pooled and name == "text_projection.weight")
    }
    embedding = named.get("text_model.embeddings.token_embedding.weight")
    if embedding is None:
        raise WeightsError(
            f"The checkpoint contains no CLIP text encoder ({spec.short_name}).",
            "Use a full checkpoint (UNet, VAE and text encoder).",
        )
    if config is not None:
        return Component(named, config)
    numbers = {int(match[1]) for name in named if (match := re.match(r"text_model\.encoder\.layers\.(\d+)\.", name))}
    layers = len(numbers)
    if layers + spec.unused_layers != spec.published_layers:  # else diffusers' script has left them out already
        layers -= spec.unused_layers
    unused = tuple(f"text_model.encoder.layers.{number}." for number in range(layers, len(numbers)))
    named = {name: tensor for name, tensor in named.items() if not name.startswith(unused)}
    try:
        config = {
            "vocab_size": embedding.shape[0],
            "hidden_size": embedding.shape[1],
            "intermediate_size": named["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": layers,
            "num_attention_heads": max(1, embedding.shape[1] // HEAD),
            "max_position_embeddings": named["text_model.embeddings.position_embedding.weight"].shape[0],
            "hidden_act": spec.hidden_act,
            "projection_dim": named["text_projection.weight"].shape[0] if spec.pooled else embedding.shape[1],
        }
    except KeyError as error:
        raise WeightsError(
            f"The base model's text encoder {spec.short_name} lacks the tensor {error.args[0]}.",
            "Use a complete checkpoint; if it was downloaded, download it again and compare its size.",
        ) from None
    return Component(named, config)


class ClipTextEncoder:
    """A built text encoder with its tokenizer."""

    def __init__(self, spec: TextEncoderSpec, component: Component, tokenizer: Any, clip_skip: int) -> None:
        """Build around the component's tensors; `clip_skip` as in `BaseWeights`.

        Raises:
            WeightsError: They don't fit together.
            SettingsError: There is no such layer.
        """
        self.spec = spec
        self._tokenizer = tokenizer
        self._words: list[_Word] = []  # those of most tokens first
        self._vectors: list[Tensor] = []
        self.max_tokens: int = component.config["max_position_embeddings"]
        self.network = _build(spec, component, tokenizer)
        layers = int(component.config["num_hidden_layers"])
        self._layer = (clip_skip or spec.layer + spec.unused_layers) - spec.unused_layers
        if not 1 <= self._layer <= layers:
            raise SettingsError(
                f"clip_skip {clip_skip} is out of range for {spec.short_name}.",
                f"Use {suggest('clip_skip', 0)}, the family's default layer, or a value from {1 + spec.unused_layers} "
                f"to {layers + spec.unused_layers}, counted from the last.",
            )

    def learn(self, words: Mapping[str, Tensor]) -> None:
        """Set the learned words and their vectors, (vectors, width) each; see `DiffusionModel.learn`."""
        self._words = []
        self._vectors = list(words.values())
        row = 0
        for word, vectors in words.items():
            places = [-1 - place for place in range(row, row + len(vectors))]
            self._words.append(_Word(self._own_tokens(word)[1:-1], places))
            row += len(vectors)
        self._words.sort(key=lambda word: -len(word.tokens))

    def _own_tokens(self, prompt: str) -> list[int]:
        return list(self._tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def tokens(self, prompt: str) -> list[int]:
        """All tokens of a prompt, with the start and end token; negative for a learned word."""
        tokens = self._own_tokens(prompt)
        if not self._words:
            return tokens
        replaced: list[int] = []
        place = 0
        while place < len(tokens):
            word = next((word for word in self._words if word.stands_at(tokens, place)), None)
            replaced += word.places if word else [tokens[place]]
            place += len(word.tokens) if word else 1
        return replaced

    def token_embeddings(self, network: nn.Module, text: str) -> Tensor:
        """The network's embeddings of a text's own tokens, without the start and end token: (tokens, width)."""
        weight: Tensor = _token_embedding(network).weight
        return weight[self._own_tokens(text)[1:-1]].detach()

    def overlong(self, prompt: str) -> bool:
        """Whether the prompt has too many tokens for the encoder."""
        return len(self.tokens(prompt)) > self.max_tokens

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Tokens of prompts, truncated or padded to the encoder's length: (prompts, tokens), int64."""
        end = self._tokenizer.eos_token_id
        padding = end if self.spec.pads_with_end else 0
        rows = []
        for prompt in prompts:
            ids = self.tokens(prompt)
            if len(ids) > self.max_tokens:
                ids = [*ids[: self.max_tokens - 1], end]
            rows.append(ids + [padding] * (self.max_tokens - len(ids)))
        return torch.tensor(rows)

    def encode(self, network: nn.Module, ids: Tensor) -> Conditioning:
        """Hidden states (prompts, tokens, width), and the projected embedding (prompts, width) where it is used."""
        clip: Any = network
        ids = ids.to(next(network.parameters()).device)
        with self._vectors_for(network, ids):
            output = clip(ids.clamp(min=0) if self._words else ids, output_hidden_states=True)
        hidden = output.hidden_states[-self._layer]
        if self.spec.normed:
            hidden = getattr(clip, "text_model", clip).final_layer_norm(hidden)
        encoded = {f"text{self.spec.number}": hidden}
        if self.spec.pooled:
            encoded[f"pooled{self.spec.number}"] = output.text_embeds
        return encoded

    @contextlib.contextmanager
    def _vectors_for(self, network: nn.Module, ids: Tensor) -> Iterator[None]:
        """Inside the block the network's embedding gives the learned vectors where tokens (prompts, …) are negative."""
        if not self._words:
            yield
            return

        def with_vectors(module: nn.Module, inputs: object, embedded: Tensor) -> Tensor:
            vectors = torch.cat([vectors.to(embedded.device, embedded.dtype) for vectors in self._vectors])
            return torch.where((ids < 0)[..., None], vectors[(-1 - ids).clamp(min=0)], embedded)

        hook = _token_embedding(network).register_forward_hook(with_vectors)
        try:
            yield
        finally:
            hook.remove()


@dataclass(frozen=True)
class _Word:
    """A learned word: its own tokens, and those that stand for its vectors."""

    tokens: Sequence[int]
    places: Sequence[int]

    def stands_at(self, tokens: Sequence[int], place: int) -> bool:
        """Whether a prompt's own tokens are the word's from that place on."""
        return bool(self.tokens) and list(tokens[place : place + len(self.tokens)]) == list(self.tokens)


def _token_embedding(network: nn.Module) -> Any:
    clip: Any = network
    return getattr(clip, "text_model", clip).embeddings.token_embedding


def _build(spec: TextEncoderSpec, component: Component, tokenizer: Any) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = dict(component.config)
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            config[name] = token
    model = CLIPTextModelWithProjection if spec.pooled else CLIPTextModel
    encoder = on_meta(lambda **values: model(CLIPTextConfig(**values)), config)
    tensors = names_as_in(encoder.state_dict(), component.tensors)
    return build_around(encoder, replace(component, tensors=tensors))
