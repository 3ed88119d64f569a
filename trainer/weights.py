"""Where base weights come from: a host's tensors, a single file, a diffusers folder. One door: `open_base`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import WeightsError
from .families import identify, refuse_foreign_class, refuse_foreign_keys
from .families.base import BaseWeights, Component, DiffusionModel
from .families.ldm import (
    UNET_PREFIX,
    VAE_PREFIX,
    unet_component,
    unet_config,
    vae_component,
    with_prefix,
)

logger = logging.getLogger("dreambooth_lora")

_BROKEN = "The file is damaged or incomplete: download or copy it again and compare its size with the source's."


@dataclass(frozen=True)
class HostTensors:
    """Networks that a host has loaded, in the original layout, lent without a copy.

    Attributes:
        unet: Original names without prefix.
        vae: Original names without prefix.
        text_encoders: Each text encoder's tensors as a single file names them, without prefix, in the family's order.
        tokenizers: Each text encoder's Hugging Face tokenizer.
        title: Name for people.
    """

    unet: Mapping[str, Tensor]
    vae: Mapping[str, Tensor]
    text_encoders: Sequence[Mapping[str, Tensor]]
    tokenizers: Sequence[Any]
    title: str


def open_base(source: Path | HostTensors, tokenizer: Path | None = None) -> BaseWeights:
    """Open a base model without copying or building anything.

    Args:
        source: A host's tensors, a `.safetensors` or `.ckpt` file, or a folder in diffusers' layout.
        tokenizer: Folder of the CLIP tokenizer, for single files; looked for near the file if None.

    Raises:
        UnsupportedModelError: A model of a family that can't be trained; the message names it.
        WeightsError: Not found, damaged, incomplete, or not a base model.
    """
    if isinstance(source, HostTensors):
        return _from_original(source)
    if os.path.isdir(source):  # unlike Path.is_dir, False for a path that the system does not take
        return _from_folder(source)
    if not os.path.isfile(source):
        raise WeightsError(f"The base model {source} does not exist.", "Check the path for a typing error.")
    tensors = _read_single_file(source)
    refuse_foreign_keys(tensors)
    unet = with_prefix(tensors, UNET_PREFIX)
    if not unet:
        raise WeightsError(
            f"{source.name} holds no Stable Diffusion UNet.",
            "Give a full checkpoint (UNet, VAE and text encoder in one file).",
        )
    family = identify(unet_config(unet))  # a wrong family is named before a missing tokenizer or text encoder is
    texts = [with_prefix(tensors, prefix) for prefix in family.text_prefixes]
    if not all(texts):
        raise WeightsError(
            f"{source.name} lacks a text encoder of {family.title}.", "Give a full checkpoint, not a UNet alone."
        )
    tokenizers = [find_tokenizer(source, tokenizer)] * len(texts)
    return _from_original(HostTensors(unet, with_prefix(tensors, VAE_PREFIX), texts, tokenizers, source.stem))


def _from_original(source: HostTensors) -> BaseWeights:
    refuse_foreign_keys(source.unet)
    if "input_blocks.0.0.weight" not in source.unet:
        raise WeightsError("The model holds no Stable Diffusion UNet.", "Connect a Stable Diffusion checkpoint.")
    config = unet_config(source.unet)
    family = identify(config)
    for part in (source.unet, source.vae, *source.text_encoders):
        _require_plain_floats(part)
    return _checked(
        BaseWeights(
            family=family,
            unet=unet_component(source.unet, family.complete(config)),
            vae=vae_component(source.vae, family.scaling_factor),
            text_encoders=family.text_components(source.text_encoders),
            tokenizers=source.tokenizers,
            scheduler={},
            prediction_type="epsilon",
            title=source.title,
            fingerprint="",
        )
    )


def _checked(weights: BaseWeights) -> BaseWeights:
    """Build the model once, which costs milliseconds and no memory, to see that it is whole; add the fingerprint.

    Raises:
        WeightsError: A tensor is missing, unknown or of another shape.
    """
    model = weights.family.build(weights)
    parts = [weights.unet, weights.vae, *weights.text_encoders]
    digest = fingerprint(_computing_facts(weights, model), *(part.tensors for part in parts))
    return replace(weights, fingerprint=digest)


def _computing_facts(weights: BaseWeights, model: DiffusionModel) -> str:
    """What else than the tensors decides what the model computes; the same however the model was opened."""
    unet, vae = model.unet.config, model.vae.config
    text = [getattr(encoder, "config") for encoder in model.text_encoders.values()]  # noqa: B009
    facts = {
        "prediction": model.objective.prediction_type,
        "schedule": [f"{value:.5e}" for value in model.objective.alphas_cumprod[::37].tolist()],
        "unet": [unet[name] for name in ("attention_head_dim", "norm_num_groups", "norm_eps", "act_fn", "freq_shift")],
        "vae": [vae[name] for name in ("scaling_factor", "norm_num_groups", "act_fn")],
        "text": [[one.num_attention_heads, one.hidden_act, one.layer_norm_eps] for one in text],
    }
    return json.dumps(facts, sort_keys=True)


def _require_plain_floats(tensors: Mapping[str, Tensor]) -> None:
    """Refuse quantised weights, which can't be read as numbers without their scales."""
    for name, tensor in tensors.items():
        if name.endswith((".scale_weight", ".weight_scale", ".comfy_quant")) or tensor.dtype in (
            torch.uint8,
            torch.int8,
        ):
            raise WeightsError(
                f"The base model is quantised ({name}: {tensor.dtype}).",
                "Use an fp16, bf16 or fp32 version of the model for training; the adapter fits the quantised one too.",
            )


def _read_single_file(path: Path) -> dict[str, Tensor]:
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
            raise WeightsError(
                f"{path.name} is damaged, or holds more than plain weights, such as code, and was not loaded.",
                "Use the .safetensors version of the model.",
            ) from error
        content = content.get("state_dict", content) if isinstance(content, dict) else {}
        if not isinstance(content, dict):
            content = {}
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    return read_safetensors(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a safetensors file.

    Raises:
        WeightsError: It is damaged or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path.name} is no readable safetensors file: {error}.", _BROKEN) from error


def _from_folder(folder: Path) -> BaseWeights:
    index = _read_json(folder / "model_index.json")
    if "unet" not in index:
        refuse_foreign_class(str(index.get("_class_name", "unknown")))
    unet_settings = _network_config(folder / "unet" / "config.json")
    refuse_foreign_class(unet_settings.pop("_class_name", "UNet2DConditionModel"))
    family = identify(unet_settings)
    vae_settings = _network_config(folder / "vae" / "config.json")
    vae_settings.pop("_class_name", None)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    if scheduler.get("prediction_type", "epsilon") != "epsilon":
        raise WeightsError(
            f"The model predicts {scheduler['prediction_type']}, not epsilon.",
            "Use a Stable Diffusion 1.x model that predicts epsilon.",
        )
    unet = Component(_read_component(folder / "unet", "diffusion_pytorch_model"), unet_settings)
    vae = Component(
        _with_current_attention_names(_read_component(folder / "vae", "diffusion_pytorch_model")), vae_settings
    )
    texts = family.text_components([_read_component(folder / name, "model") for name, _ in family.text_folders])
    configs = [_network_config(folder / name / "config.json") for name, _ in family.text_folders]
    return _checked(
        BaseWeights(
            family=family,
            unet=unet,
            vae=vae,
            text_encoders=[replace(text, config=config) for text, config in zip(texts, configs, strict=True)],
            tokenizers=[load_tokenizer(folder / name) for _, name in family.text_folders],
            scheduler=scheduler,
            prediction_type="epsilon",
            title=folder.resolve().name,
            fingerprint="",
        )
    )


def _with_current_attention_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a VAE's attention the names of today's diffusers (old folders: query, key, value, proj_attn)."""
    names = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor[:, :, 0, 0] if ".to_" in name and tensor.ndim == 4 else tensor
    return renamed


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path} can't be read: {error}.",
            "Give a folder in diffusers' layout (model_index.json, unet, vae, text_encoder, tokenizer, scheduler) "
            "or a single checkpoint file.",
        ) from error
    return content if isinstance(content, dict) else {}


def _network_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    hidden = (
        "_diffusers_version",
        "_name_or_path",
        "architectures",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "model_type",
    )
    return {name: value for name, value in config.items() if name not in hidden}


def _read_component(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of one folder of a diffusers model: one file, or shards with an index."""
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return read_safetensors(folder / name)
    shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    if shards:
        return {name: tensor for shard in shards for name, tensor in read_safetensors(shard).items()}
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _read_single_file(folder / name)
    raise WeightsError(f"{folder} holds no weights ({stem}.safetensors).", _BROKEN)


def _holds_tokenizer(folder: Path) -> bool:
    old = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return old or (folder / "tokenizer.json").is_file()  # all that transformers 5 writes


def load_tokenizer(folder: Path) -> Any:
    """Load a CLIP tokenizer from a folder, never from the network.

    Raises:
        WeightsError: The folder holds none.
    """
    from transformers import CLIPTokenizer, CLIPTokenizerFast

    if not _holds_tokenizer(folder):
        raise WeightsError(
            f"{folder} holds no CLIP tokenizer (vocab.json and merges.txt, or tokenizer.json).",
            "Give a folder that does.",
        )
    kind = CLIPTokenizer if (folder / "vocab.json").is_file() else CLIPTokenizerFast
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"The tokenizer in {folder} can't be read: {error}.", "Copy it again.") from error


def _tokenizer_places(checkpoint: Path) -> Iterator[Path]:
    """Where a CLIP tokenizer may lie: beside the checkpoint, in a ComfyUI above it or this pack, in the hub's cache."""
    yield checkpoint.parent / "tokenizer"
    for start in (checkpoint.resolve(), Path(__file__).resolve()):
        for parent in start.parents:
            yield parent / "comfy" / "sd1_tokenizer"
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return
    for repository, inner in (
        ("openai/clip-vit-large-patch14", ""),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ):
        found = try_to_load_from_cache(repository, f"{inner}vocab.json")
        if isinstance(found, str):
            yield Path(found).parent


def find_tokenizer(checkpoint: Path, given: Path | None) -> Any:
    """The CLIP tokenizer for a single-file checkpoint, which holds none itself.

    Raises:
        WeightsError: None was found; says where one can be taken from.
    """
    if given is not None:
        return load_tokenizer(given)
    for place in _tokenizer_places(checkpoint):
        if _holds_tokenizer(place):
            return load_tokenizer(place)
    raise WeightsError(
        f"No CLIP tokenizer was found for {checkpoint.name}; a single-file checkpoint holds none.",
        "Give --tokenizer FOLDER, such as ComfyUI/comfy/sd1_tokenizer or the tokenizer folder of a diffusers model.",
    )


def fingerprint(facts: str, *parts: Mapping[str, Tensor]) -> str:
    """A digest of networks that notices any retraining or merging, in a fraction of a second.

    Of every tensor it takes name, shape and 256 evenly spaced values, as float32: the same model gives the
    same digest whether it comes from a file or from a host that loaded it at the same precision or a higher one.

    Args:
        facts: What else than the tensors belongs to the model.
        parts: Name → tensor of each network.
    """
    digest = hashlib.sha256(facts.encode())
    for part in parts:
        for name in sorted(part):
            flat = part[name].detach().flatten()
            places = torch.linspace(0, flat.numel() - 1, min(256, flat.numel()), dtype=torch.float64).long()
            values = flat[places.to(flat.device)].to("cpu", torch.float32)
            digest.update(f"{name} {tuple(part[name].shape)}".encode())
            digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()
