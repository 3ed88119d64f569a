"""Models lent as a host lends them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from checkpoints import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    SDXL_CLIP_PREFIX,
    SDXL_OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
)
from checkpoints_folders import hugging_face_names
from helpers import DEMO
from pack.trainer.models.families.base import Prediction
from pack.trainer.models.open import HostTensors
from torch import Tensor
from transformers import CLIPTokenizer

TOKENIZER = DEMO / "base" / "tokenizer"


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def lent(tensors: Mapping[str, Tensor], prediction: Prediction | None = None, converted: bool = False) -> HostTensors:
    """A checkpoint's tensors as a host lends them; `converted`: OpenCLIP under Hugging Face's names, as in ComfyUI."""
    found = {
        "clip_l": below(tensors, CLIP_PREFIX) or below(tensors, SDXL_CLIP_PREFIX),
        "clip_h": below(tensors, OPEN_CLIP_PREFIX),
        "clip_g": below(tensors, SDXL_OPEN_CLIP_PREFIX),
    }
    texts = {name: part for name, part in found.items() if part}
    if converted:
        for name in texts.keys() & {"clip_h", "clip_g"}:
            texts[name] = hugging_face_names(texts[name]) | {"logit_scale": torch.tensor(4.6)}
        if "clip_l" in texts:  # ComfyUI gives every CLIP a projection, here the identity
            width = texts["clip_l"]["text_model.final_layer_norm.weight"].shape[0]
            texts["clip_l"] = texts["clip_l"] | {"text_projection.weight": torch.eye(width)}
    tokenizers = {name: CLIPTokenizer.from_pretrained(TOKENIZER) for name in texts}
    return HostTensors(
        below(tensors, UNET_PREFIX), below(tensors, VAE_PREFIX), texts, tokenizers, "lent", prediction=prediction
    )
