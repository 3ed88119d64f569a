"""Types and configurations of CLIP, DINO and DINOv2 models, inferred from their weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import WeightsError

MODEL_CLASSES = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "dinov2": "Dinov2Model",
    "vit": "ViTModel",
}
_HEAD_CHANNELS = 64  # of an attention head
_VISION_HEAD_CHANNELS = {1280: 80, 1408: 88, 1664: 104}  # of OpenCLIP's ViT-H, ViT-g and ViT-bigG, by width
_OPENAI_VISION_WIDTHS = (768, 1024)  # of ViT-B and ViT-L
_OPENAI_TEXT_WIDTHS = (512, 768)
SUPPORTED_MODELS = (
    "Use a CLIP, a CLIP vision tower with its projection, a DINO ViT or a DINOv2 with transformers' tensor names (for "
    "CLIP, also OpenCLIP's). Others, such as SigLIP, DINOv3 and DINOv2 with registers, are not supported."
)


@dataclass(frozen=True)
class FeatureWeights:
    """The weights of one file, or of one folder of transformers.

    Attributes:
        name: For messages and results.
        path: The file, or the folder.
        tensors: By transformers' names.
        config: The configuration in the weights' folder, a transformers object; None without one.
    """

    name: str
    path: Path
    tensors: Mapping[str, Tensor]
    config: Any = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        """The folder for its tokenizer and preprocessor_config.json."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def has_vision_tower(self) -> bool:
        """Whether it contains a CLIP vision tower."""
        return "vision_model.embeddings.class_embedding" in self.tensors

    @property
    def has_text_tower(self) -> bool:
        """Whether it contains a CLIP text tower."""
        return "text_model.embeddings.token_embedding.weight" in self.tensors

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor that the configuration is inferred from.

        Raises:
            WeightsError: It is missing, or has a different number of dimensions.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise WeightsError(f"{self.name} lacks the tensor {name}.", f"Use a complete file. {SUPPORTED_MODELS}")
        if tensor.ndim != dimensions:
            raise WeightsError(
                f"{self.name} has a tensor of the wrong shape: {name} {tuple(tensor.shape)}.", SUPPORTED_MODELS
            )
        return tuple(tensor.shape)

    def count_layers(self, prefix: str) -> int:
        """The number of layers with a prefix."""
        pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
        numbers = [int(match[1]) for match in map(pattern.match, self.tensors) if match]
        return max(numbers, default=-1) + 1

    def declared(self, tower: str, published: Mapping[str, Any]) -> dict[str, Any]:
        """Values that shapes don't show: from the configuration, else the published models'.

        Args:
            tower: "vision" or "text", if the configuration has several towers.
            published: Name → value of the published models.
        """
        config = getattr(self.config, f"{tower}_config", self.config)
        return {name: getattr(config, name, value) for name, value in published.items()}


def inferred_config(weights: FeatureWeights) -> tuple[str, dict[str, Any]]:
    """The type of a model and its configuration.

    Values that shapes don't show come from the configuration file, else from the published models: 64 channels per
    attention head (80 in CLIP's ViT-H, 88 in ViT-g, 104 in ViT-bigG); quick_gelu in CLIP towers of OpenAI's widths,
    gelu in all others.

    Args:
        weights: They may be on the meta device.

    Returns:
        One of `MODEL_CLASSES`, and keyword arguments for transformers' configuration.

    Raises:
        WeightsError: The type is unknown, or a tensor is missing.
    """
    if weights.has_vision_tower and weights.has_text_tower:
        return "clip", clip_config(weights, weights)
    if weights.has_vision_tower:
        return "clip_vision_model", _vision_config(weights)
    if weights.has_text_tower:
        raise WeightsError(
            f"{weights.name} contains only a text tower.",
            'Combine it with its vision tower: "vision file + text file".',
        )
    if "embeddings.cls_token" in weights.tensors:
        has_layer_scale = any(name.endswith(".layer_scale1.lambda1") for name in weights.tensors)
        return ("dinov2", _dinov2_config(weights)) if has_layer_scale else ("vit", _vit_config(weights))
    first_names = ", ".join(sorted(weights.tensors)[:3]) or "none"
    raise WeightsError(
        f"{weights.name} is not a known feature model (its first tensors: {first_names}).", SUPPORTED_MODELS
    )


def clip_config(vision: FeatureWeights, text: FeatureWeights) -> dict[str, Any]:
    """Keyword arguments for a `CLIPConfig`, except those that the tokenizer determines.

    Args:
        vision: Contains a vision tower.
        text: Contains a text tower; may be the same.

    Raises:
        WeightsError: A tensor is missing, or their feature widths differ.
    """
    vision_config = _vision_config(vision)
    text_config = _text_config(text)
    vision_width = vision_config["projection_dim"]
    text_width = text_config["projection_dim"]
    if vision_width != text_width:
        raise WeightsError(
            f"The towers do not belong together: {vision.name} has feature width {vision_width}, {text.name} has "
            f"{text_width}.",
            "Combine towers of the same CLIP: clip_l with a ViT-L (768), clip_h with a ViT-H (1024), clip_g with a "
            "ViT-bigG (1280).",
        )
    return {"vision_config": vision_config, "text_config": text_config, "projection_dim": vision_width}


def _vision_config(weights: FeatureWeights) -> dict[str, Any]:
    width, channels, _, patch_size = weights.shape("vision_model.embeddings.patch_embedding.weight", 4)
    positions = weights.shape("vision_model.embeddings.position_embedding.weight", 2)[0]
    published = {
        "num_attention_heads": _heads(weights, width, _VISION_HEAD_CHANNELS.get(width, _HEAD_CHANNELS)),
        "hidden_act": "quick_gelu" if width in _OPENAI_VISION_WIDTHS else "gelu",
        "layer_norm_eps": 1e-5,
    }
    return weights.declared("vision", published) | {
        "hidden_size": width,
        "intermediate_size": weights.shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": weights.count_layers("vision_model.encoder.layers."),
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": _image_size(weights, patch_size, positions),
        "projection_dim": weights.shape("visual_projection.weight", 2)[0],
    }


def _text_config(weights: FeatureWeights) -> dict[str, Any]:
    vocabulary, width = weights.shape("text_model.embeddings.token_embedding.weight", 2)
    published = {
        "num_attention_heads": _heads(weights, width),
        "hidden_act": "quick_gelu" if width in _OPENAI_TEXT_WIDTHS else "gelu",
        "layer_norm_eps": 1e-5,
    }
    return weights.declared("text", published) | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": weights.count_layers("text_model.encoder.layers."),
        "max_position_embeddings": weights.shape("text_model.embeddings.position_embedding.weight", 2)[0],
        "projection_dim": _text_projection(weights),
    }


def _text_projection(weights: FeatureWeights) -> int:
    """The width of prompts' features.

    Raises:
        WeightsError: There is no projection, as in many files of text towers, or it is the identity.
    """
    projection = weights.tensors.get("text_projection.weight")
    if projection is not None and not _is_identity(projection):
        return weights.shape("text_projection.weight", 2)[0]
    fault = "has no" if projection is None else "has the identity as its"
    raise WeightsError(
        f"The text tower {weights.name} {fault} text_projection.weight, so prompts can't be compared with pictures.",
        "Use a file that has a trained one, such as the whole CLIP: model.safetensors of "
        "openai/clip-vit-large-patch14.",
    )


def _is_identity(matrix: Tensor) -> bool:
    """Whether it is what programs write in place of a projection that they don't have."""
    is_square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    return is_square and not matrix.is_meta and torch.equal(matrix.float(), torch.eye(len(matrix)))


def _dinov2_config(weights: FeatureWeights) -> dict[str, Any]:
    config = _common_vit_config(weights, layer_norm_eps=1e-6)
    is_gated = "encoder.layer.0.mlp.weights_in.weight" in weights.tensors
    mlp_ratio = 4
    if not is_gated:
        mlp_ratio = weights.shape("encoder.layer.0.mlp.fc1.weight", 2)[0] // config["hidden_size"]
    return config | {
        "mlp_ratio": mlp_ratio,
        "use_swiglu_ffn": is_gated,
        "use_mask_token": "embeddings.mask_token" in weights.tensors,
    }


def _vit_config(weights: FeatureWeights) -> dict[str, Any]:
    if "pooler.dense.weight" in weights.tensors and weights.config is None:
        raise WeightsError(
            f"{weights.name} is a ViT with a pooler, so it is not a DINO and its preprocessing is unknown.",
            "Use its folder, with config.json and preprocessor_config.json.",
        )
    return _common_vit_config(weights, layer_norm_eps=1e-12) | {
        "intermediate_size": weights.shape("encoder.layer.0.intermediate.dense.weight", 2)[0]
    }


def _common_vit_config(weights: FeatureWeights, layer_norm_eps: float) -> dict[str, Any]:
    """What the configurations of DINO and DINOv2 have in common."""
    width, channels, _, patch_size = weights.shape("embeddings.patch_embeddings.projection.weight", 4)
    positions = weights.shape("embeddings.position_embeddings", 3)[1]
    published = {
        "num_attention_heads": _heads(weights, width),
        "hidden_act": "gelu",
        "layer_norm_eps": layer_norm_eps,
    }
    return weights.declared("vision", published) | {
        "hidden_size": width,
        "num_hidden_layers": weights.count_layers("encoder.layer."),
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": _image_size(weights, patch_size, positions),
        "qkv_bias": "encoder.layer.0.attention.attention.query.bias" in weights.tensors,
    }


def _heads(weights: FeatureWeights, width: int, channels: int = _HEAD_CHANNELS) -> int:
    """How many heads of attention there are; a model narrower than a head has one."""
    if width > channels and width % channels and weights.config is None:
        raise WeightsError(
            f"{weights.name} is {width} channels wide, which is not a multiple of the head width {channels}.",
            "Use its folder, with config.json.",
        )
    return max(1, width // channels)


def _image_size(weights: FeatureWeights, patch_size: int, positions: int) -> int:
    """Side of the images in pixels: one position is the class token's, the others are a square of patches."""
    side = math.isqrt(max(positions - 1, 0))
    if side * side != positions - 1 or side == 0:
        raise WeightsError(
            f"{weights.name} has {positions} positions, which is not a square number of patches plus one.",
            SUPPORTED_MODELS,
        )
    return patch_size * side
