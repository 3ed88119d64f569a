"""What feature models are, told from their weights alone: names, kinds and configurations of CLIP, DINO and DINOv2."""

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

KINDS = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "dinov2": "Dinov2Model",
    "vit": "ViTModel",
}
_HEAD = 64  # channels of an attention head
_VISION_HEADS = {1280: 80, 1408: 88, 1664: 104}  # of OpenCLIP's ViT-H, ViT-g and ViT-bigG, by width
_OPENAI_VISION, _OPENAI_TEXT = (768, 1024), (512, 768)  # widths of ViT-B and ViT-L
READ = (
    "Give a CLIP, a CLIP vision tower with its projection, a DINO ViT or a DINOv2 in the names of transformers (CLIP "
    "also in OpenCLIP's). Others, such as SigLIP, DINOv3 and DINOv2 with registers, are not read."
)


@dataclass(frozen=True)
class Part:
    """The weights of one file, or folder of transformers.

    Attributes:
        name: For messages and results.
        place: The file, or the folder.
        tensors: Under transformers' names.
        declared: The configuration that lies beside it; None without one.
    """

    name: str
    place: Path
    tensors: Mapping[str, Tensor]
    declared: Any = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        """Where its tokenizer and its preprocessor_config.json would lie."""
        return self.place if self.place.is_dir() else self.place.parent

    @property
    def sees(self) -> bool:
        """Whether it holds a CLIP's vision tower."""
        return "vision_model.embeddings.class_embedding" in self.tensors

    @property
    def reads(self) -> bool:
        """Whether it holds a CLIP's text tower."""
        return "text_model.embeddings.token_embedding.weight" in self.tensors

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor that the configuration is inferred from."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise WeightsError(f"{self.name} lacks the tensor {name}.", f"Take a complete file. {READ}")
        if tensor.ndim != dimensions:
            raise WeightsError(f"{self.name} has a tensor of another shape: {name} {tuple(tensor.shape)}.", READ)
        return tuple(tensor.shape)

    def layers(self, prefix: str) -> int:
        """How many layers there are under a prefix."""
        numbers = [int(found[1]) for name in self.tensors if (found := re.match(rf"{re.escape(prefix)}(\d+)\.", name))]
        return max(numbers, default=-1) + 1

    def unseen(self, tower: str, inferred: Mapping[str, Any]) -> dict[str, Any]:
        """The values that no shape shows, as the configuration beside the file says; else the published ones."""
        declared = getattr(self.declared, f"{tower}_config", self.declared)
        return {name: getattr(declared, name, value) for name, value in inferred.items()}


def inferred_config(part: Part) -> tuple[str, dict[str, Any]]:
    """The kind of a model and its configuration.

    What shapes don't show is declared, or that of the published models: 64 channels in a head of attention (80 in
    CLIP's ViT-H, 88 in ViT-g, 104 in ViT-bigG); quick_gelu in CLIP's towers of OpenAI's widths, gelu in all others.

    Args:
        part: Its weights; they may be on the meta device.

    Returns:
        One of `KINDS`, and keyword arguments for transformers' configuration.

    Raises:
        WeightsError: It is of no known kind, or lacks a tensor.
    """
    if part.sees and part.reads:
        return "clip", clip_config(part, part)
    if part.sees:
        return "clip_vision_model", _vision_config(part)
    if part.reads:
        raise WeightsError(
            f"{part.name} holds a text tower alone.", 'Join it with its vision tower: "vision file + text file".'
        )
    if "embeddings.cls_token" in part.tensors:
        scaled = any(name.endswith(".layer_scale1.lambda1") for name in part.tensors)
        return ("dinov2", _dinov2_config(part)) if scaled else ("vit", _vit_config(part))
    found = ", ".join(sorted(part.tensors)[:3]) or "none"
    raise WeightsError(f"{part.name} is no feature model that is known (its first tensors: {found}).", READ)


def clip_config(vision: Part, text: Part) -> dict[str, Any]:
    """Keyword arguments for a `CLIPConfig`, without what a tokenizer says.

    Args:
        vision: Holds a vision tower.
        text: Holds a text tower; may be the same.

    Raises:
        WeightsError: A tensor is missing, or they give features of different widths.
    """
    config: dict[str, Any] = {"vision_config": _vision_config(vision), "text_config": _text_config(text)}
    seen, read = (config[f"{tower}_config"]["projection_dim"] for tower in ("vision", "text"))
    if seen != read:
        raise WeightsError(
            f"The towers don't belong together: {vision.name} gives features of width {seen}, {text.name} of {read}.",
            "Join towers of one CLIP: clip_l with a ViT-L (768), clip_h with a ViT-H (1024), clip_g with a ViT-bigG "
            "(1280).",
        )
    return config | {"projection_dim": seen}


def _vision_config(part: Part) -> dict[str, Any]:
    width, channels, _, patch = part.shape("vision_model.embeddings.patch_embedding.weight", 4)
    positions = part.shape("vision_model.embeddings.position_embedding.weight", 2)[0]
    published = {
        "num_attention_heads": _heads(part, width, _VISION_HEADS.get(width, _HEAD)),
        "hidden_act": "quick_gelu" if width in _OPENAI_VISION else "gelu",
        "layer_norm_eps": 1e-5,
    }
    return part.unseen("vision", published) | {
        "hidden_size": width,
        "intermediate_size": part.shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": part.layers("vision_model.encoder.layers."),
        "num_channels": channels,
        "patch_size": patch,
        "image_size": _image_size(part, patch, positions),
        "projection_dim": part.shape("visual_projection.weight", 2)[0],
    }


def _text_config(part: Part) -> dict[str, Any]:
    vocabulary, width = part.shape("text_model.embeddings.token_embedding.weight", 2)
    published = {
        "num_attention_heads": _heads(part, width),
        "hidden_act": "quick_gelu" if width in _OPENAI_TEXT else "gelu",
        "layer_norm_eps": 1e-5,
    }
    return part.unseen("text", published) | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": part.shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": part.layers("text_model.encoder.layers."),
        "max_position_embeddings": part.shape("text_model.embeddings.position_embedding.weight", 2)[0],
        "projection_dim": _text_projection(part),
    }


def _text_projection(part: Part) -> int:
    """The width of prompts' features; many files of text towers don't have what makes them."""
    projection = part.tensors.get("text_projection.weight")
    if projection is not None and not _is_identity(projection):
        return part.shape("text_projection.weight", 2)[0]
    what = "has no" if projection is None else "has the identity as its"
    raise WeightsError(
        f"The text tower {part.name} {what} text_projection.weight, so prompts can't be compared with pictures.",
        "Give a file that has a trained one, such as the whole CLIP: model.safetensors of "
        "openai/clip-vit-large-patch14.",
    )


def _is_identity(matrix: Tensor) -> bool:
    """Whether it is what programs write that have no projection."""
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] and not matrix.is_meta
    return square and torch.equal(matrix.float(), torch.eye(len(matrix)))


def _dinov2_config(part: Part) -> dict[str, Any]:
    gated = "encoder.layer.0.mlp.weights_in.weight" in part.tensors
    config = _vit_facts(part, 1e-6)
    width = config["hidden_size"]
    ratio = 4 if gated else part.shape("encoder.layer.0.mlp.fc1.weight", 2)[0] // width
    masked = "embeddings.mask_token" in part.tensors
    return config | {"mlp_ratio": ratio, "use_swiglu_ffn": gated, "use_mask_token": masked}


def _vit_config(part: Part) -> dict[str, Any]:
    if "pooler.dense.weight" in part.tensors and part.declared is None:
        raise WeightsError(
            f"{part.name} is a ViT with a pooler, which DINO has not; its preprocessing is not known.",
            "Give its folder, with config.json and preprocessor_config.json.",
        )
    return _vit_facts(part, 1e-12) | {
        "intermediate_size": part.shape("encoder.layer.0.intermediate.dense.weight", 2)[0]
    }


def _vit_facts(part: Part, eps: float) -> dict[str, Any]:
    """What the configurations of DINO and DINOv2 have in common."""
    width, channels, _, patch = part.shape("embeddings.patch_embeddings.projection.weight", 4)
    positions = part.shape("embeddings.position_embeddings", 3)[1]
    published = {"num_attention_heads": _heads(part, width), "hidden_act": "gelu", "layer_norm_eps": eps}
    return part.unseen("vision", published) | {
        "hidden_size": width,
        "num_hidden_layers": part.layers("encoder.layer."),
        "num_channels": channels,
        "patch_size": patch,
        "image_size": _image_size(part, patch, positions),
        "qkv_bias": "encoder.layer.0.attention.attention.query.bias" in part.tensors,
    }


def _heads(part: Part, width: int, channels: int = _HEAD) -> int:
    """How many heads of attention there are; a narrow toy has one."""
    if width > channels and width % channels and part.declared is None:
        raise WeightsError(
            f"{part.name} is {width} channels wide, which is no multiple of {channels}, the width of a head.",
            "Give its folder, with config.json.",
        )
    return max(1, width // channels)


def _image_size(part: Part, patch: int, positions: int) -> int:
    """Side of the pictures: one position is the class token's, the others are a square of patches."""
    side = math.isqrt(max(positions - 1, 0))
    if side * side != positions - 1 or side == 0:
        raise WeightsError(f"{part.name} has {positions} positions, which are no square of patches and one more.", READ)
    return patch * side
