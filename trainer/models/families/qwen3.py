"""Qwen 3 as a text encoder: configuration from shapes, prompts in a template, hidden states side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedModelError, WeightsError
from .base import Component, Conditioning, TextEncoderSpec, build_around, on_meta

_HEAD = 128  # numbers of an attention head in every Qwen 3
_PREFIXES = ("model.language_model.", "language_model.", "model.")
# of the language model in files that also hold its head, or what looks at pictures
_VISUAL = ("visual.", "model.visual.")
_UNREAD = ("lm_head.", "model.lm_head.", *_VISUAL)
_ROPE_THETA = 1e6
_VL_ROPE_THETA = 5e6  # of Qwen 3 VL
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "rms_norm_eps", "hidden_act"),
)
_INCOMPLETE = "Use a complete text encoder; if it was downloaded, download it again and compare its size."


def qwen3_component(
    tensors: Mapping[str, Tensor],
    spec: TextEncoderSpec,
    config: Mapping[str, Any] | None = None,
    *,
    sees: bool = False,
) -> Component:
    """Infer a transformers `Qwen3Config` from a text encoder's tensors, without the unused layers.

    For text alone, a Qwen 3 VL is a Qwen 3.

    Args:
        tensors: With or without the leading "model."; the head of the language model and the vision part are
            left out. None is copied.
        spec: Which encoder of the family it is; layers behind its `layer` are left out.
        config: Its configuration where it is known, as in a folder of diffusers.
        sees: Whether it is a Qwen 3 VL.

    Raises:
        WeightsError: A tensor that the configuration depends on is missing, or it is the other type of Qwen 3.
    """
    _require_kind(tensors, config, sees=sees)
    named = {_without_prefix(name): tensor for name, tensor in tensors.items() if not name.startswith(_UNREAD)}
    numbers = {int(match[1]) for name in named if (match := re.match(r"layers\.(\d+)\.", name))}
    if len(numbers) < spec.layer:
        raise WeightsError(
            f"The text encoder has {len(numbers)} layers, but the hidden states of layer {spec.layer} are needed.",
            "Use this model family's text encoder (Qwen 3).",
        )
    read = {
        name: tensor
        for name, tensor in named.items()
        if not (match := re.match(r"layers\.(\d+)\.", name)) or int(match[1]) < spec.layer
    }
    if not spec.normed:
        read.pop("norm.weight", None)  # of the last layer's output, which is not read
    if config is not None:
        return Component(read, {**_of_text(config), "num_hidden_layers": spec.layer})
    try:
        embedding = read["embed_tokens.weight"]
        shapes = {
            "vocab_size": embedding.shape[0],
            "hidden_size": embedding.shape[1],
            "intermediate_size": read["layers.0.mlp.gate_proj.weight"].shape[0],
            "num_hidden_layers": spec.layer,
            "head_dim": read["layers.0.self_attn.q_norm.weight"].shape[0],
            "num_attention_heads": read["layers.0.self_attn.q_proj.weight"].shape[0] // _HEAD,
            "num_key_value_heads": read["layers.0.self_attn.k_proj.weight"].shape[0] // _HEAD,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": _VL_ROPE_THETA if sees else _ROPE_THETA,
        }
    except KeyError as error:
        raise WeightsError(f"The text encoder lacks the tensor {error.args[0]}.", _INCOMPLETE) from None
    return Component(read, shapes)


def _require_kind(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, *, sees: bool) -> None:
    """Tell Qwen 3 from Qwen 3 VL, of the same sizes but for its rotary frequencies, by what looks at pictures.

    Raises:
        WeightsError: It is the other one.
    """
    given = any(name.startswith(_VISUAL) for name in tensors) or "text_config" in (config or {})
    if given != sees and tensors:
        names = ("Qwen 3", "Qwen 3 VL")
        raise WeightsError(
            f"The text encoder is {names[given]}, but the model needs {names[sees]}.",
            f"Use a complete {names[sees]} file.",
        )


def _without_prefix(name: str) -> str:
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def _of_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the language model alone; that of a Qwen 3 VL holds those of both its networks.

    Its rotary frequencies belong to three axes of places, which are alike for text.
    """
    text = config.get("text_config")
    if text is None:
        return {name: value for name, value in config.items() if name != "layer_types"}  # one for each layer
    known = {name: text[name] for name in _SIZES if name in text}
    rotary = text.get("rope_parameters") or {}
    return {**known, "rope_theta": text.get("rope_theta") or rotary.get("rope_theta") or _VL_ROPE_THETA}


class Qwen3TextEncoder:
    """A built text encoder with its tokenizer.

    Attributes:
        max_tokens: Maximum number of tokens, within the network's positions.
        unread_tokens: Number of them, at the beginning, that the denoiser does not use.
        network: The network; its last norm is left out where the hidden states before it are used.
    """

    def __init__(
        self,
        component: Component,
        tokenizer: Any,
        spec: TextEncoderSpec,
        layers: Sequence[int],
        template: str,
        unread_start: str,
    ) -> None:
        """Build around the component's tensors.

        Args:
            component: From `qwen3_component`.
            tokenizer: Hugging Face's.
            spec: Which encoder of the family it is.
            layers: After how many layers hidden states are read; side by side they are the prompt's embedding.
            template: What a prompt stands in, with "{}" for the prompt.
            unread_start: The beginning of the template whose embedding the denoiser does not read.

        Raises:
            UnsupportedModelError: The installed transformers is too old.
            WeightsError: Tensors don't fit together.
        """
        self._tokenizer = tokenizer
        self.unread_tokens = len(self._tokens_of(unread_start)) if unread_start else 0
        self.max_tokens = min(spec.max_tokens + self.unread_tokens, int(component.config["max_position_embeddings"]))
        self._layers = tuple(layers)
        self._template = template
        self._reads_padding = spec.reads_padding
        self._normed = spec.normed
        network: Any = build_around(on_meta(_make, {**component.config, "normed": spec.normed}), component)
        network.rotary_emb = _rotary_embedding(network)
        self.network: nn.Module = network

    def tokens(self, prompt: str) -> list[int]:
        """All tokens of a prompt in its template; for an empty one, a single padding token, as in ComfyUI."""
        return self._tokens_of(self._template.format(prompt)) or [int(self._tokenizer.pad_token_id)]

    def _tokens_of(self, text: str) -> list[int]:
        return list(self._tokenizer(text, truncation=False, verbose=False).input_ids)

    def overlong(self, prompt: str) -> bool:
        """Whether the prompt would be truncated."""
        return len(self.tokens(prompt)) > self.max_tokens

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Tokens of the prompts, (prompts, tokens), on the CPU; -1 after each prompt's end.

        Padded to the maximum or, where padding is not used, to the longest of these prompts.
        """
        rows = [self.tokens(prompt)[: self.max_tokens] for prompt in prompts]
        count = self.max_tokens if self._reads_padding else max(map(len, rows))
        return torch.tensor([row + [-1] * (count - len(row)) for row in rows])

    def encode(self, network: nn.Module, ids: Tensor) -> Conditioning:
        """The prompts' embedding, (prompts, tokens, layers · width); padded with zeros where lengths are given."""
        language_model: Any = network
        ids = ids.to(next(network.parameters()).device)
        padding = self._tokenizer.pad_token_id
        output = language_model(
            input_ids=torch.where(ids < 0, padding, ids),
            attention_mask=(ids >= 0).long(),
            output_hidden_states=True,
            use_cache=False,
        )
        states = [output.last_hidden_state] if self._normed else [output.hidden_states[layer] for layer in self._layers]
        text = torch.cat([state[:, self.unread_tokens :] for state in states], dim=-1)
        if self._reads_padding:
            return {"text": text}
        is_read = ids[:, self.unread_tokens :] >= 0
        return {"text": text.where(is_read[..., None], 0), "lengths": is_read.sum(dim=1)}


def _rotary_embedding(network: Any) -> nn.Module:
    """The network's rotary embedding; its frequencies are in no file, and stay in float32 when the network is cast."""
    embedding: Any = type(network.rotary_emb)(config=network.config)
    frequencies = embedding.inv_freq.clone()  # a plain tensor, which is not cast with the buffers
    for name in [name for name, _ in embedding.named_buffers()]:
        delattr(embedding, name)
    embedding.inv_freq = frequencies
    made: nn.Module = embedding
    return made


def _make(*, normed: bool, **config: Any) -> nn.Module:
    """Transformers' `Qwen3Model`; without its last norm, unless what is read is `normed`.

    Raises:
        UnsupportedModelError: The installed transformers has none.
    """
    try:
        from transformers import Qwen3Config, Qwen3Model
    except ImportError as error:
        import transformers

        raise UnsupportedModelError(
            f"The text encoder Qwen 3 needs transformers 4.51 or newer; {transformers.__version__} is installed.",
            "Update transformers.",
        ) from error
    network = Qwen3Model(Qwen3Config(**config))
    if not normed:
        network.norm = nn.Identity()
    made: nn.Module = network
    return made
