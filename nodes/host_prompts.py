"""The bridge to ComfyUI, continued: prompts that the CLIP on the wire encodes, where it is a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class ClipPrompts:
    """A CLIP that encodes prompts for a training; the engine's `PromptEncoder`.

    It is loaded when new prompts are encoded and leaves the device after that: a language model is several gigabytes.

    Attributes:
        fingerprint: Hexadecimal digest of its weights.
    """

    def __init__(self, clip: Any, tensors: Mapping[str, Any], max_tokens: int) -> None:
        """Take the CLIP.

        Args:
            clip: A CLIP.
            tensors: Its weights with the LoRAs that are applied to it, for the fingerprint.
            max_tokens: How many tokens the model reads of a prompt.
        """
        from ..trainer.models.open import fingerprint

        self.fingerprint = fingerprint(type(clip.cond_stage_model).__name__, tensors)
        self._clip = clip
        self._max_tokens = max_tokens
        self._known: dict[str, Any] = {}

    def encode(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What ComfyUI would feed to the model: "text", (prompts, tokens, width), float32, on the CPU."""
        import comfy.model_management
        import torch

        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            try:
                with torch.inference_mode():
                    for prompt in new:
                        embedded = self._clip.encode_from_tokens(self._clip.tokenize(prompt))
                        self._known[prompt] = embedded[:, : self._max_tokens].float().cpu()
            finally:
                comfy.model_management.unload_all_models()
        with torch.inference_mode(False):
            return {"text": torch.cat([self._known[prompt].clone() for prompt in prompts])}

    def overlong(self, prompt: str) -> bool:
        """Whether the model reads only the beginning of the prompt; ComfyUI pads shorter ones."""
        tokens = self._clip.tokenize(prompt)
        return any(len(row) > self._max_tokens for rows in tokens.values() for row in rows)
