"""CLIP, DINO and DINOv2 from single weight files, as they lie in ComfyUI's models/clip_vision and models/text_encoders.

Such a file has no configuration: it is inferred from the tensors' shapes, and what they don't show is that of the
published models. A file that lies as model.safetensors beside a config.json is taken by that instead.
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
from .feature_configs import KINDS, READ, Part, clip_config, inferred_config

JOIN = " + "
_VISION = ("vision_model.", "visual_projection.")
_TEXT = ("text_model.", "text_projection.")
_OPENAI_MEAN, _OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_BILINEAR, _BICUBIC = 2, 3  # Pillow's numbers


@dataclass(frozen=True)
class OpenedFiles:
    """A feature model that was opened from files.

    Attributes:
        name: For results: the files' names without ending.
        kind: One of `KINDS`.
        network: The transformers model, in float32, on the CPU.
        preprocessing: What a preprocessor_config.json says.
        tokenizer: Prompts → tokens; None without a text tower.
    """

    name: str
    kind: str
    network: Any
    preprocessing: Mapping[str, Any]
    tokenizer: Any = None


def are_files(source: str | Path) -> bool:
    """Whether a feature model is given by a file, or by two that are joined with " + "."""
    name = str(source)
    return not os.path.isdir(name) and (os.path.isfile(name) or name.endswith(".safetensors") or JOIN in name)


def network_class(kind: str) -> Any:
    """The transformers class of one of `KINDS`."""
    import transformers

    return getattr(transformers, KINDS[kind])


def open_feature_files(source: str | Path, tokenizer: Path | None = None) -> OpenedFiles:
    """Open a feature model from one file, or a CLIP from "vision file + text file".

    Configuration and preprocessing are the published ones: see `inferred_config` and `published_preprocessing`. LAION's
    ViT-B and ViT-L have OpenAI's shapes and another activation: give their folder, or the model.safetensors in it.

    Args:
        source: A file in transformers' or OpenCLIP's names; or two joined with " + ", in either order, of which each
            may also be a folder of transformers.
        tokenizer: Folder of the CLIP tokenizer for a text tower, if none lies beside its file.

    Raises:
        WeightsError: It is not there, incomplete, of no known kind, the parts don't belong together, or there is no
            tokenizer for it.
    """
    name = str(source)
    parts = [_read_part(name)] if os.path.isfile(name) else [_read_part(one.strip()) for one in name.split(JOIN)]
    if len(parts) > 2:
        raise WeightsError(f"{source} names {len(parts)} files.", 'Give one file, or "vision file + text file".')
    if len(parts) == 2:
        return _open_clip(*_towers(*parts), tokenizer)
    [part] = parts
    if part.sees and part.reads:
        return _open_clip(part, part, tokenizer)
    kind, config = inferred_config(part)
    network = _build(kind, config, part.tensors, part.name)
    return OpenedFiles(part.name, kind, network, _preprocessing(kind, config, part))


def published_preprocessing(kind: str, image_size: int) -> dict[str, Any]:
    """How the published models of a kind take pictures, as a preprocessor_config.json says it.

    CLIP as in openai/clip-vit-large-patch14: the shorter side to the image size, bicubic, and the centre of that.
    DINOv2 as in facebook/dinov2-base: the shorter side to 256, bicubic, and the centre of 224. DINO as in
    facebook/dino-vits16: both sides to 224, bilinear. DINO and DINOv2 are normalised by ImageNet's mean and deviation.

    Args:
        kind: One of `KINDS`.
        image_size: Side of the pictures that the model was trained with, in pixels; DINOv2 does not go by it.
    """
    clip = kind.startswith("clip")
    mean, std = (_OPENAI_MEAN, _OPENAI_STD) if clip else (_IMAGENET_MEAN, _IMAGENET_STD)
    common: dict[str, Any] = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255}
    common |= {"do_normalize": True, "image_mean": mean, "image_std": std}
    if kind == "vit":
        return common | {"size": {"height": image_size, "width": image_size}, "resample": _BILINEAR}
    shorter, crop = (image_size, image_size) if clip else (256, 224)
    return common | {
        "size": {"shortest_edge": shorter},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "do_convert_rgb": True,
    }


def _read_part(source: str) -> Part:
    place = Path(source)
    if not os.path.exists(source):
        raise WeightsError(
            f"The feature model file {source} is not there.",
            "Check its name. Files are given by their path; in ComfyUI also by their name in models/clip_vision or "
            "models/text_encoders.",
        )
    single = place.is_file()
    folder = place.parent if single else place
    described = (folder / "config.json").is_file() and (not single or place.name == "model.safetensors")
    tensors = read_single_file(place) if single else read_component(place, "model")
    name = folder.resolve().name if described or not single else place.stem
    return Part(name, place, in_transformers_names(tensors), _declared(folder) if described else None)


def _declared(folder: Path) -> Any:
    """The configuration in a folder of transformers."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / 'config.json'} can't be read: {error}.", "Copy it again.") from error


def _towers(one: Part, other: Part) -> tuple[Part, Part]:
    """Which of two parts gives the vision tower, and which the text tower."""
    for vision, text in ((one, other), (other, one)):
        if vision.sees and text.reads:
            return vision, text
    held = [
        " and ".join(word for word, there in (("a vision tower", part.sees), ("a text tower", part.reads)) if there)
        for part in (one, other)
    ]
    raise WeightsError(
        f"{one.name} and {other.name} are no CLIP together: the first holds {held[0] or 'no tower of a CLIP'}, "
        f"the second {held[1] or 'no tower of a CLIP'}.",
        'Give "vision file + text file".',
    )


def _open_clip(vision: Part, text: Part, given: Path | None) -> OpenedFiles:
    name = vision.name if vision is text else f"{vision.name}{JOIN}{text.name}"
    config = clip_config(vision, text)
    tokenizer = _tokenizer(text, given, config["text_config"])
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config["text_config"] |= ends  # the pooled feature is the one at the end token
    tensors = {key: tensor for key, tensor in vision.tensors.items() if not key.startswith(_TEXT)}
    tensors |= {key: tensor for key, tensor in text.tensors.items() if not key.startswith(_VISION)}
    tensors.setdefault("logit_scale", torch.zeros(()))  # no feature depends on it
    network = _build("clip", config, tensors, name)
    return OpenedFiles(name, "clip", network, _preprocessing("clip", config["vision_config"], vision), tokenizer)


def _build(kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> Any:
    """The network with all of the tensors and no others; transformers gives them the names of its version."""
    import transformers

    more = {"add_pooling_layer": "pooler.dense.weight" in tensors} if kind == "vit" else {}
    try:
        network, report = network_class(kind).from_pretrained(
            None,
            config=transformers.AutoConfig.for_model(kind, **config),
            state_dict=dict(tensors),
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
            **more,
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(f"{name} can't be built as a {kind}: {error}.", READ) from error
    faults = {
        "lacks": report["missing_keys"],
        "has a tensor of another shape:": [fault[0] for fault in report["mismatched_keys"]],
        "has a tensor that is not known:": set(report["unexpected_keys"]) - {"logit_scale"},
    }
    for words, names in faults.items():
        if names:
            first, *others = sorted(names)
            shown = f"{first} (and {len(others)} more)" if others else first
            raise WeightsError(f"{name}, opened as a {kind}, {words} {shown}.", f"Take a complete file. {READ}")
    return network


def _preprocessing(kind: str, config: Mapping[str, Any], part: Part) -> Mapping[str, Any]:
    """What is declared beside a file that has its configuration there; else as published."""
    if part.declared is not None:
        for file in ("preprocessor_config.json", "processor_config.json"):
            if (part.folder / file).is_file():
                found = read_json(part.folder / file)
                return dict(found.get("image_processor", found))
    return published_preprocessing(kind, config["image_size"])


def _tokenizer(part: Part, given: Path | None, text_config: Mapping[str, Any]) -> Any:
    """The text tower's tokenizer: from beside its file, or the one that is given, or one that is found."""
    beside = any((part.folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    try:
        tokenizer = load_tokenizer(part.folder) if beside else find_tokenizer(part.place, given)
    except WeightsError as error:
        if beside or given is not None:
            raise
        raise WeightsError(
            f"No CLIP tokenizer was found for the text tower {part.name}.",
            "Put one beside the file: vocab.json and merges.txt, or tokenizer.json, as in ComfyUI/comfy/sd1_tokenizer.",
        ) from error
    last = text_config["vocab_size"] - 1
    if tokenizer.eos_token_id != last:
        raise WeightsError(
            f"The tokenizer does not belong to the text tower {part.name}: its end token is "
            f"{tokenizer.eos_token_id} instead of {last}.",
            f"Give that CLIP's tokenizer{f'; there is another in {part.folder}' if beside else ''}.",
        )
    tokenizer.model_max_length = text_config["max_position_embeddings"]
    return tokenizer
