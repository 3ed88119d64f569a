"""CLIP, DINO and DINOv2 from single weight files, as in ComfyUI's models/clip_vision and models/text_encoders.

Such a file has no configuration: it is inferred from the tensors' shapes, and from the published models where shapes
don't show it. A model.safetensors with a config.json in its folder has that configuration instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import WeightsError
from ..models.clip_names import in_transformers_names
from ..models.state_dicts import read_component, read_json, read_single_file
from ..models.tokenizer import find_tokenizer, load_tokenizer
from .feature_configs import MODEL_CLASSES, SUPPORTED_MODELS, FeatureWeights, clip_config, inferred_config

TOWER_SEPARATOR = " + "
_VISION_NAMES = ("vision_model.", "visual_projection.")
_TEXT_NAMES = ("text_model.", "text_projection.")
_OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
_OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]
_IMAGENET_MEAN = [0.485, 0.456, 0.406]
_IMAGENET_STD = [0.229, 0.224, 0.225]
_BILINEAR = 2  # Pillow's numbers
_BICUBIC = 3


@dataclass(frozen=True)
class OpenedFeatureModel:
    """A feature model that was opened from files.

    Attributes:
        name: For results: the files' names without ending.
        kind: One of `MODEL_CLASSES`.
        network: The transformers model, in float32, on the CPU.
        preprocessing: The content of a preprocessor_config.json.
        tokenizer: Prompts → tokens; None without a text tower.
    """

    name: str
    kind: str
    network: Any
    preprocessing: Mapping[str, Any]
    tokenizer: Any = None


def are_files(source: str | Path) -> bool:
    """Whether a feature model is given as a file, or as two joined with " + "."""
    name = str(source)
    return not os.path.isdir(name) and (
        os.path.isfile(name) or name.endswith(".safetensors") or TOWER_SEPARATOR in name
    )


def network_class(kind: str) -> Any:
    """The transformers class of one of `MODEL_CLASSES`."""
    import transformers

    return getattr(transformers, MODEL_CLASSES[kind])


def open_feature_files(source: str | Path, tokenizer: Path | None = None) -> OpenedFeatureModel:
    """Open a feature model from one file, or a CLIP from "vision file + text file".

    Configuration and preprocessing are the published ones: see `inferred_config` and `published_preprocessing`. LAION's
    ViT-B and ViT-L have OpenAI's shapes but a different activation: use their folder, or the model.safetensors in it.

    Args:
        source: A file with transformers' or OpenCLIP's tensor names; or two joined with " + ", in either order, each of
            which may also be a folder of transformers.
        tokenizer: Folder of the CLIP tokenizer for a text tower, if there is none in its file's folder.

    Raises:
        WeightsError: It does not exist, is incomplete or of an unknown type, the parts don't belong together, or it has
            no tokenizer.
    """
    name = str(source)
    paths = [name] if os.path.isfile(name) else [path.strip() for path in name.split(TOWER_SEPARATOR)]
    loaded = [_read_weights(path) for path in paths]
    if len(loaded) > 2:
        raise WeightsError(f"{source} names {len(loaded)} files.", 'Use one file, or "vision file + text file".')
    if len(loaded) == 2:
        vision, text = _vision_and_text(*loaded)
        return _open_clip(vision, text, tokenizer)
    [weights] = loaded
    if weights.has_vision_tower and weights.has_text_tower:
        return _open_clip(weights, weights, tokenizer)
    kind, config = inferred_config(weights)
    network = _build(kind, config, weights.tensors, weights.name)
    return OpenedFeatureModel(weights.name, kind, network, _preprocessing(kind, config, weights))


def published_preprocessing(kind: str, image_size: int) -> dict[str, Any]:
    """The preprocessing of a type's published models, as in a preprocessor_config.json.

    CLIP as in openai/clip-vit-large-patch14: the shorter side to the image size, bicubic, then a centre crop.
    DINOv2 as in facebook/dinov2-base: the shorter side to 256, bicubic, then a centre crop of 224. DINO as in
    facebook/dino-vits16: both sides to 224, bilinear. DINO and DINOv2 are normalised by ImageNet's mean and deviation.

    Args:
        kind: One of `MODEL_CLASSES`.
        image_size: Side of the images that the model was trained with, in pixels; not used for DINOv2.
    """
    is_clip = kind.startswith("clip")
    common: dict[str, Any] = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _OPENAI_MEAN if is_clip else _IMAGENET_MEAN,
        "image_std": _OPENAI_STD if is_clip else _IMAGENET_STD,
    }
    if kind == "vit":
        return common | {"size": {"height": image_size, "width": image_size}, "resample": _BILINEAR}
    shortest_edge = image_size if is_clip else 256
    crop = image_size if is_clip else 224
    return common | {
        "size": {"shortest_edge": shortest_edge},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "do_convert_rgb": True,
    }


def _read_weights(source: str) -> FeatureWeights:
    """The weights of a file or of a folder of transformers.

    Raises:
        WeightsError: It does not exist, or can't be read.
    """
    path = Path(source)
    if not os.path.exists(source):
        raise WeightsError(
            f"The feature model file {source} does not exist.",
            "Check its name. Use the file's path or, in ComfyUI, its name in models/clip_vision or "
            "models/text_encoders.",
        )
    if not path.is_file():
        tensors = read_component(path, "model")
        folder = path
        has_config = (folder / "config.json").is_file()
        name = folder.resolve().name
    else:
        tensors = read_single_file(path)
        folder = path.parent
        has_config = path.name == "model.safetensors" and (folder / "config.json").is_file()
        name = folder.resolve().name if has_config else path.stem
    config = _read_config(folder) if has_config else None
    return FeatureWeights(name, path, in_transformers_names(tensors), config)


def _read_config(folder: Path) -> Any:
    """The configuration in a folder of transformers.

    Raises:
        WeightsError: It can't be read.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / 'config.json'} can't be read: {error}.", "Copy it again.") from error


def _vision_and_text(first: FeatureWeights, second: FeatureWeights) -> tuple[FeatureWeights, FeatureWeights]:
    """Which of two gives the vision tower, and which the text tower.

    Raises:
        WeightsError: A tower is missing.
    """
    for vision, text in ((first, second), (second, first)):
        if vision.has_vision_tower and text.has_text_tower:
            return vision, text
    raise WeightsError(
        f"{first.name} and {second.name} do not form a CLIP: the first contains {_held_towers(first)}, the second "
        f"{_held_towers(second)}.",
        'Use "vision file + text file".',
    )


def _held_towers(weights: FeatureWeights) -> str:
    towers = []
    if weights.has_vision_tower:
        towers.append("a vision tower")
    if weights.has_text_tower:
        towers.append("a text tower")
    return " and ".join(towers) or "no CLIP tower"


def _open_clip(vision: FeatureWeights, text: FeatureWeights, tokenizer_folder: Path | None) -> OpenedFeatureModel:
    """A CLIP of two towers, which may come from the same file."""
    name = vision.name if vision is text else f"{vision.name}{TOWER_SEPARATOR}{text.name}"
    config = clip_config(vision, text)
    tokenizer = _open_tokenizer(text, tokenizer_folder, config["text_config"])
    config["text_config"] |= {  # the pooled feature is the one at the end token
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    tensors = {key: tensor for key, tensor in vision.tensors.items() if not key.startswith(_TEXT_NAMES)}
    tensors |= {key: tensor for key, tensor in text.tensors.items() if not key.startswith(_VISION_NAMES)}
    tensors.setdefault("logit_scale", torch.zeros(()))  # no feature depends on it
    network = _build("clip", config, tensors, name)
    preprocessing = _preprocessing("clip", config["vision_config"], vision)
    return OpenedFeatureModel(name, "clip", network, preprocessing, tokenizer)


def _build(kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> Any:
    """The network with exactly these tensors; transformers gives them the names of its version.

    Raises:
        WeightsError: A tensor is missing, unknown, or of another shape.
    """
    import transformers

    options = {"add_pooling_layer": "pooler.dense.weight" in tensors} if kind == "vit" else {}
    try:
        network, loading_info = network_class(kind).from_pretrained(
            None,
            config=transformers.AutoConfig.for_model(kind, **config),
            state_dict=dict(tensors),
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
            **options,
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(f"{name} can't be loaded as a {kind}: {error}.", SUPPORTED_MODELS) from error
    faults = {
        "lacks": loading_info["missing_keys"],
        "has a tensor of the wrong shape:": [fault[0] for fault in loading_info["mismatched_keys"]],
        "has an unknown tensor:": set(loading_info["unexpected_keys"]) - {"logit_scale"},
    }
    for fault, names in faults.items():
        if names:
            first, *others = sorted(names)
            shown = f"{first} (and {len(others)} more)" if others else first
            raise WeightsError(
                f"{name}, loaded as a {kind}, {fault} {shown}.", f"Use a complete file. {SUPPORTED_MODELS}"
            )
    return network


def _preprocessing(kind: str, config: Mapping[str, Any], weights: FeatureWeights) -> Mapping[str, Any]:
    """As declared beside the weights if their configuration is there, too; else as published."""
    if weights.config is not None:
        for file_name in ("preprocessor_config.json", "processor_config.json"):
            if (weights.folder / file_name).is_file():
                declared = read_json(weights.folder / file_name)
                return dict(declared.get("image_processor", declared))
    return published_preprocessing(kind, config["image_size"])


def _open_tokenizer(weights: FeatureWeights, given: Path | None, text_config: Mapping[str, Any]) -> Any:
    """The text tower's tokenizer: from beside its file, or from the folder given, or from one that is found.

    Raises:
        WeightsError: There is none, or it belongs to another text tower.
    """
    is_beside = any((weights.folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    try:
        tokenizer = load_tokenizer(weights.folder) if is_beside else find_tokenizer(weights.path, given)
    except WeightsError as error:
        if is_beside or given is not None:
            raise
        raise WeightsError(
            f"No CLIP tokenizer was found for the text tower {weights.name}.",
            "Put one next to the file: vocab.json and merges.txt, or tokenizer.json, as in "
            "ComfyUI/comfy/sd1_tokenizer.",
        ) from error
    end_token = text_config["vocab_size"] - 1
    if tokenizer.eos_token_id != end_token:
        raise WeightsError(
            f"The tokenizer does not belong to the text tower {weights.name}: its end token is "
            f"{tokenizer.eos_token_id} instead of {end_token}.",
            f"Use that CLIP's tokenizer{f'; there is another in {weights.folder}' if is_beside else ''}.",
        )
    tokenizer.model_max_length = text_config["max_position_embeddings"]
    return tokenizer
