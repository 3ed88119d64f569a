"""The bridge to ComfyUI, continued: prompts that the CLIP on the wire encodes, where it is a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..trainer.core.errors import WeightsError

_TARGETS = {"targets": "t5xxl_ids", "target_weights": "t5xxl_weights"}
"""What is read beside the embedding of a prompt → what ComfyUI calls it."""
_PADDING = {"targets": -1}


class ClipPrompts:
    """A CLIP that encodes prompts for a training; the engine's `PromptEncoder`.

    It is loaded when new prompts are encoded and leaves the device after that: a language model is several gigabytes.

    Attributes:
        fingerprint: Hexadecimal digest of its weights.
    """

    def __init__(self, clip: Any, tensors: Mapping[str, Any], spec: Any, width: int, remedy: str) -> None:
        """Take the CLIP.

        Args:
            clip: A CLIP.
            tensors: Its weights with the LoRAs that are applied to it, for the fingerprint.
            spec: The engine's `TextEncoderSpec`.
            width: Numbers that the model reads of each token.
            remedy: What to do if the CLIP gives others.
        """
        from ..trainer.models.open import fingerprint

        self.fingerprint = fingerprint(type(clip.cond_stage_model).__name__, tensors)
        self._clip = clip
        self._spec = spec
        self._width = width
        self._remedy = remedy
        self._known: dict[str, Any] = {}

    def encode(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What ComfyUI would feed to the model: "text", (prompts, tokens, width), float32, on the CPU.

        Where the model also reads the prompt by another tokenizer, "targets" has its tokens, (prompts, tokens), -1
        behind them, and "target_weights" what the prompt weighs each with.

        Where the model does not read the padding behind a prompt, ComfyUI makes none; then there are as many tokens as
        the longest of these prompts has, zeros behind the others, and "lengths" tells where these begin.

        Raises:
            WeightsError: The CLIP is of another model.
        """
        import comfy.model_management
        import torch

        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            try:
                with torch.inference_mode():
                    for prompt in new:
                        encoded = self._clip.encode_from_tokens(self._clip.tokenize(prompt), return_dict=True)
                        self._known[prompt] = self._read(encoded)
            finally:
                comfy.model_management.unload_all_models()
        with torch.inference_mode(False):
            known = [self._known[prompt] for prompt in prompts]
            if self._spec.reads_padding:
                return {"text": torch.stack([encoded["text"] for encoded in known])}
            padded = {
                name: torch.nn.utils.rnn.pad_sequence(
                    [encoded[name] for encoded in known], batch_first=True, padding_value=_PADDING.get(name, 0)
                )
                for name in known[0]
            }
            return {**padded, "lengths": torch.tensor([len(encoded["text"]) for encoded in known])}

    def _read(self, encoded: Mapping[str, Any]) -> dict[str, Any]:
        """What the model reads of ComfyUI's encoding of one prompt, on the CPU; "text" is (tokens, width), float32.

        Raises:
            WeightsError: The CLIP is of another model.
        """
        most = self._spec.max_tokens
        self._require_width(encoded["cond"].shape[-1])
        read = {"text": encoded["cond"][0, :most].float().cpu()}
        has_targets = _TARGETS["targets"] in encoded
        if self._spec.target_tokenizer and not has_targets:
            raise WeightsError("The CLIP does not match the model: it returns no T5 tokens.", self._remedy)
        if has_targets and not self._spec.target_tokenizer:
            raise WeightsError("The CLIP does not match the model: it returns T5 tokens.", self._remedy)
        if has_targets:
            read |= {name: encoded[key][:most].cpu() for name, key in _TARGETS.items()}
        return read

    def _require_width(self, width: int) -> None:
        if width != self._width:
            raise WeightsError(
                f"The CLIP does not match the model: its embeddings have {width} dimensions, but the model expects "
                f"{self._width}.",
                self._remedy,
            )

    def overlong(self, prompt: str) -> bool:
        """Whether the model reads only the beginning of the prompt; ComfyUI pads shorter ones."""
        tokens = self._clip.tokenize(prompt)
        most = self._spec.max_tokens + self._spec.unread_tokens
        return any(len(row) > most for rows in tokens.values() for row in rows)
