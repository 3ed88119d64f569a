"""Opening base models: a host's tensors, a single file, or a diffusers folder, all with `open_base`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch import Tensor

from ..core.errors import SettingsError, UnsupportedModelError, WeightsError, suggest
from ..core.tensor_files import is_quantization_name
from ..settings.model import PredictionType
from .anima_names import CONDITIONER, CONDITIONER_IN_DIFFUSERS
from .families import FAMILIES, identify, joined_titles, layout_of, layouts, refuse_foreign_class, refuse_foreign_keys
from .families.base import (
    CHOSEN,
    BaseWeights,
    Component,
    Family,
    Layout,
    Prediction,
    PromptEncoder,
    TextEncoderSpec,
)
from .families.ldm import UNET_PREFIX, VAE_PREFIX, UnetLayout, with_prefix
from .libraries import import_libraries
from .state_dicts import (
    network_config,
    read_component,
    read_json,
    read_single_file,
    with_current_attention_names,
)
from .stored_weights import PackedWeight, placeholders, without_scales
from .tokenizer import find_language_tokenizer, find_target_tokenizer, find_tokenizer, load_tokenizer

logger = logging.getLogger("dreambooth_lora")

_NET_PREFIX = "net."  # of NVIDIA's code
_BROKEN = "Use a complete, unchanged model; if it was downloaded, download it again and compare its size."


class _Config(BaseModel):
    """What a configuration from outside must hold for its family to be known; the network's class checks the rest."""

    model_config = ConfigDict(strict=True, extra="allow")


class _UnetConfig(_Config):
    in_channels: int = 4
    block_out_channels: list[int]
    layers_per_block: int
    cross_attention_dim: int | list[int]
    addition_embed_type: str | None = None
    class_embed_type: str | None = None
    use_linear_projection: bool = False


class _Flux2Config(_Config):
    in_channels: int
    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    joint_attention_dim: int
    guidance_embeds: bool = True


class _ZImageConfig(_Config):
    in_channels: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    cap_feat_dim: int
    siglip_feat_dim: int | None = None


class _Krea2Config(_Config):
    in_channels: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    text_hidden_dim: int
    num_text_layers: int


class _CosmosConfig(_Config):
    in_channels: int
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    adaln_lora_dim: int


class _ConditionerConfig(_Config):
    source_dim: int
    target_dim: int


class _VaeConfig(_Config):
    block_out_channels: list[int]
    scaling_factor: float = 0.18215
    shift_factor: float | None = None


class _WanVaeConfig(_Config):
    base_dim: int
    z_dim: int
    temperal_downsample: list[bool]
    latents_mean: list[float]
    latents_std: list[float]


class _TextConfig(_Config):
    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    max_position_embeddings: int


class _SeeingTextConfig(_Config):
    text_config: _TextConfig


class _SchedulerConfig(_Config):
    prediction_type: str = "epsilon"
    shift: Annotated[float, Field(gt=0)] | None = None
    rescale_betas_zero_snr: bool | None = False


_DENOISER_CONFIGS: Mapping[str, TypeAdapter[Any]] = {
    "UNet2DConditionModel": TypeAdapter(_UnetConfig),
    "Flux2Transformer2DModel": TypeAdapter(_Flux2Config),
    "ZImageTransformer2DModel": TypeAdapter(_ZImageConfig),
    "Krea2Transformer2DModel": TypeAdapter(_Krea2Config),
    "CosmosTransformer3DModel": TypeAdapter(_CosmosConfig),
}
_CONDITIONER_CONFIG = TypeAdapter(_ConditionerConfig)
_VAE_CONFIG = TypeAdapter(_VaeConfig)
_WAN_VAE_CONFIG = TypeAdapter(_WanVaeConfig)
_TEXT_CONFIG = TypeAdapter(_TextConfig)
_SEEING_TEXT_CONFIG = TypeAdapter(_SeeingTextConfig)
_SCHEDULER_CONFIG = TypeAdapter(_SchedulerConfig)


@dataclass(frozen=True)
class HostTensors:
    """Networks that a host has loaded, in the original layout, lent without a copy.

    Attributes:
        denoiser: Original names without prefix.
        vae: Original names without prefix.
        text_encoders: Short name ("clip_l", "clip_h", "clip_g") → tensors, in Hugging Face's or OpenCLIP's layout.
        tokenizers: Short name → Hugging Face tokenizer; `TextEncoderSpec.target_tokenizer` → the other one.
        title: Display name.
        prediction: What the model predicts according to the host; None: to be detected.
        clip_skip: The text encoder layer that the host uses, counted from the end; 0: the default.
        prompt_encoder: Encodes prompts in the host where its text encoders are not borrowed; None: they are.
        packed: Name of a denoiser weight in a host-specific format → the weight; it is in no other tensor.
    """

    denoiser: Mapping[str, Tensor]
    vae: Mapping[str, Tensor]
    text_encoders: Mapping[str, Mapping[str, Tensor]]
    tokenizers: Mapping[str, Any]
    title: str
    prediction: Prediction | None = None
    clip_skip: int = 0
    prompt_encoder: PromptEncoder | None = None
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)


def open_base(
    source: Path | HostTensors,
    tokenizer: Path | None = None,
    *,
    vae: Path | None = None,
    text_encoder: Path | None = None,
    prediction_type: PredictionType = "auto",
    clip_skip: int = 0,
) -> BaseWeights:
    """Open a base model without copying or building anything.

    Args:
        source: A host's tensors, a `.safetensors` or `.ckpt` file, or a folder in diffusers format.
        tokenizer: Folder of the tokenizer, for single files; None: searched near the file.
        vae: File or diffusers folder of an autoencoder that replaces the model's.
        text_encoder: File or folder of the text encoder, for a file that contains only the denoiser.
        prediction_type: What the model predicts; "auto": as declared by the model or detected in its weights.
        clip_skip: The text encoder layer that is used, counted from the end; 0: the default.

    Raises:
        UnsupportedModelError: A model of an unsupported family; the message names it.
        WeightsError: Not found, damaged, incomplete, or not a base model.
        SettingsError: The text encoders have no such layer.
    """
    import_libraries()
    with contextlib.nullcontext() if isinstance(source, HostTensors) else _explained_damage(source):
        if isinstance(source, HostTensors):
            weights = _from_original(source)
        else:
            weights = _open_path(source, tokenizer, vae, text_encoder)
        if vae is not None:
            with _explained_damage(vae):
                weights = replace(weights, vae=_open_vae(vae, weights.family))
        if prediction_type != "auto" and weights.prediction.type == "flow":
            raise SettingsError(
                f"{suggest('prediction_type')} is for models with a discrete noise schedule; "
                f"{weights.family.title} was trained with flow matching.",
                f"Set {suggest('prediction_type', 'auto')}.",
            )
        if prediction_type != "auto":
            rescaled = weights.prediction.zero_terminal_snr and prediction_type == "v_prediction"
            weights = replace(weights, prediction=Prediction(prediction_type, rescaled, CHOSEN))
        if clip_skip and not weights.family.text_targets:
            raise SettingsError(
                f"{suggest('clip_skip')} selects a layer of CLIP, but {weights.family.title} has no CLIP.",
                f"Set {suggest('clip_skip', 0)}.",
            )
        skip = clip_skip or weights.clip_skip
        is_usual = all(skip == spec.layer + spec.unused_layers for spec in weights.family.text_encoders)
        return checked(replace(weights, clip_skip=0 if is_usual else skip))


def _open_path(source: Path, tokenizer: Path | None, vae: Path | None, text_encoder: Path | None) -> BaseWeights:
    is_folder = os.path.isdir(source)  # unlike Path.is_dir, False for a path that the system does not accept
    tensors = read_single_file(source) if os.path.isfile(source) else {}
    refuse_foreign_keys(tensors)
    denoiser = _denoiser_alone(tensors)
    if text_encoder is not None and denoiser is None and (is_folder or tensors):
        raise SettingsError(
            f"{suggest('text_encoder')} is only for a file that contains just the transformer of FLUX.2 klein, "
            f"Z-Image, Krea 2 or Anima, which {source.name} is not.",
            f"Leave {suggest('text_encoder')} out.",
        )
    if is_folder:
        return _from_folder(source)
    if denoiser is not None:
        return _from_parts(denoiser, source, tokenizer, vae, text_encoder)
    if os.path.isfile(source):
        return _from_original(_from_file(tensors, source, tokenizer))
    raise WeightsError(f"The base model {source} does not exist.", "Check the path for typos.")


@contextlib.contextmanager
def _explained_damage(path: Path) -> Iterator[None]:
    """Turn what a model of impossible shapes raises somewhere on its way into a `WeightsError`."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if "out of memory" in str(error).lower():
            raise
        raise WeightsError(
            f"{path} is not a model that can be loaded ({type(error).__name__}: {error}).", _BROKEN
        ) from error


def open_tensors(tensors: Mapping[str, Tensor], path: Path) -> BaseWeights:
    """Open the tensors of a single file where no tokenizer is needed; the result's tensors are views of them.

    Args:
        tensors: From `read_single_file`.
        path: The file, for messages.

    Raises:
        UnsupportedModelError: A model of an unsupported family.
        WeightsError: It is incomplete, or not a base model.
    """
    import_libraries()
    with _explained_damage(path):
        return checked(_from_original(_networks_in_file(tensors, path)))


def _denoiser_alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The denoiser of a file that holds nothing else, of a family whose text encoder is a language model; else None."""
    denoiser = denoiser_tensors(tensors)
    layout = layout_of(denoiser)
    if layout is None or len(denoiser) < len(tensors):
        return None
    family = identify(layout.denoiser_config(denoiser))
    return denoiser if any(spec.is_language_model for spec in family.text_encoders) else None


def denoiser_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's tensors in a file, by the prefixes of original files; all of them where there are none."""
    return with_prefix(tensors, UNET_PREFIX) or with_prefix(tensors, _NET_PREFIX) or dict(tensors)


def _from_parts(
    denoiser: Mapping[str, Tensor], path: Path, tokenizer: Path | None, vae: Path | None, text_encoder: Path | None
) -> BaseWeights:
    """A model in several files, as ComfyUI's loaders take them.

    Raises:
        WeightsError: A part is not given, or does not belong to the model.
    """
    layout = _layout(denoiser)
    family = identify(layout.denoiser_config(denoiser))
    [spec] = family.text_encoders
    if vae is None or text_encoder is None:
        lacking = [suggest(name) for name, part in (("vae", vae), ("text_encoder", text_encoder)) if part is None]
        raise WeightsError(
            f"{path.name} contains only the transformer of {family.title}.",
            f"Set {' and '.join(lacking)} to its other files, or use a folder in diffusers format. In ComfyUI, connect "
            "Load Diffusion Model, Load CLIP and Load VAE.",
        )
    with _explained_damage(vae):
        autoencoder = _open_vae(vae, family)
    with _explained_damage(text_encoder):
        text = layout.text_encoder(_text_encoder_tensors(text_encoder), spec, None)
    plain, scales = without_scales(denoiser)
    _require_plain_floats(plain)
    return BaseWeights(
        family=family,
        denoiser=_as_stored(layout.denoiser(plain, family.complete(layout.denoiser_config(plain))), scales, {}),
        vae=autoencoder,
        text_encoders=[text],
        tokenizers=_tokenizers(spec, text_encoder, path, tokenizer),
        scheduler={},
        prediction=family.detect(plain),
        clip_skip=0,
        title=path.stem,
        fingerprint="",
    )


def _tokenizers(spec: TextEncoderSpec, text_encoder: Path, base: Path, given: Path | None) -> list[Any]:
    """The tokenizer of a language model, and the other one by which the model reads a prompt, if there is one."""
    found = [find_language_tokenizer(text_encoder, base, given)]
    if spec.target_tokenizer:
        found.append(find_target_tokenizer(spec.target_tokenizer, text_encoder, base, given))
    return found


def _text_encoder_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a text encoder in a file or a folder of transformers.

    Raises:
        WeightsError: It does not exist, or can't be read.
    """
    if os.path.isdir(path):
        return _read_plain(path / "text_encoder" if (path / "text_encoder").is_dir() else path, "model")
    if not os.path.isfile(path):
        raise WeightsError(f"The text encoder {path} does not exist.", "Check the path for typos.")
    tensors = read_single_file(path)
    _require_plain_floats(tensors, f"The text encoder {path.name}")
    return tensors


def _from_file(tensors: Mapping[str, Tensor], path: Path, tokenizer: Path | None) -> HostTensors:
    networks = _networks_in_file(tensors, path)
    specs = [spec for family in FAMILIES for spec in family.text_encoders if spec.short_name in networks.text_encoders]
    if any(spec.is_language_model for spec in specs):
        found = find_language_tokenizer(path, path, tokenizer)
    else:
        found = find_tokenizer(path, tokenizer)
    others = networks.tokenizers.keys() - networks.text_encoders.keys()
    return replace(
        networks,
        tokenizers=dict.fromkeys(networks.text_encoders, found)
        | {name: find_target_tokenizer(name, path, path, tokenizer) for name in others},
    )


def _networks_in_file(tensors: Mapping[str, Tensor], path: Path) -> HostTensors:
    """The networks of a single file, without tokenizers."""
    refuse_foreign_keys(tensors)
    alone = layout_of(tensors) or layout_of(with_prefix(tensors, _NET_PREFIX))
    if alone is not None:
        raise WeightsError(
            f"{path.name} contains only a model's denoiser ({alone.network_class}).",
            "Use a full checkpoint (denoiser, VAE and text encoder in one file) or a folder in diffusers format; in "
            "ComfyUI, connect Load Diffusion Model, Load CLIP and Load VAE.",
        )
    if any(
        name.startswith(("double_stream_modulation_img.linear.", "all_x_embedder.", "text_fusion.")) for name in tensors
    ):
        raise WeightsError(
            f"{path.name} is only the transformer of a model in diffusers format.",
            "Use the whole folder (model_index.json, transformer, vae, text_encoder, tokenizer).",
        )
    denoiser = with_prefix(tensors, UNET_PREFIX)
    if not denoiser:
        raise WeightsError(
            f"{path.name} contains no Stable Diffusion UNet.",
            "Use a full checkpoint (UNet, VAE and text encoder in one file).",
        )
    layout = _layout(denoiser)
    family = identify(layout.denoiser_config(denoiser))  # it is reported before a missing tokenizer or text encoder
    text_encoders: dict[str, dict[str, Tensor]] = {}
    for spec in family.text_encoders:
        candidates = (with_prefix(tensors, prefix) for prefix in spec.file_prefixes)
        text_encoder = next((candidate for candidate in candidates if candidate), None)
        if text_encoder is None:
            raise WeightsError(
                f"{path.name} lacks {family.title}'s text encoder ({spec.short_name}).",
                "Use a full checkpoint, not just a UNet.",
            )
        text_encoders[spec.short_name] = text_encoder
    return HostTensors(
        denoiser=denoiser,
        vae=with_prefix(tensors, VAE_PREFIX) or with_prefix(tensors, "vae."),
        text_encoders=text_encoders,
        tokenizers=dict.fromkeys(name for spec in family.text_encoders for name in _tokenizer_names(spec)),
        title=path.stem,
        prediction=_declared_prediction(tensors),
    )


def _tokenizer_names(spec: TextEncoderSpec) -> list[str]:
    """What a host's tokenizers of a text encoder are called: its own, and that of what is read beside it."""
    return [name for name in (spec.short_name, spec.target_tokenizer) if name]


def _declared_prediction(tensors: Mapping[str, Tensor]) -> Prediction | None:
    """What a checkpoint states by the keys `v_pred` and `ztsnr`, as ComfyUI reads them; None without them."""
    if "edm_mean" in tensors or "edm_vpred.sigma_max" in tensors:
        raise UnsupportedModelError(
            "The base model uses the EDM formulation (such as Playground 2.5), which is not supported.",
            "Use a model that predicts epsilon or velocity.",
        )
    if "v_pred" not in tensors:
        return None
    return Prediction("v_prediction", "ztsnr" in tensors, "the checkpoint's key v_pred")


def _layout(denoiser: Mapping[str, Tensor]) -> Layout:
    """The layout of a denoiser; a UNet's if it is none that is known, for a message that names what is missing."""
    return layout_of(denoiser) or UnetLayout()


def _from_original(source: HostTensors) -> BaseWeights:
    denoiser = {**source.denoiser, **placeholders(source.packed)}
    refuse_foreign_keys(denoiser)
    layout = layout_of(denoiser)
    if layout is None:
        raise WeightsError(
            "The model contains no Stable Diffusion UNet.",
            f"Connect one of these models: {joined_titles(FAMILIES)}.",
        )
    config = layout.denoiser_config(denoiser)
    family = identify(config)
    plain, scales = without_scales(denoiser)
    for part in (plain, source.vae, *source.text_encoders.values()):
        _require_plain_floats(part)
    own_encoders = () if source.prompt_encoder else family.text_encoders
    return BaseWeights(
        family=family,
        denoiser=_as_stored(layout.denoiser(plain, family.complete(config)), scales, source.packed),
        vae=layout.vae(source.vae, family.scaling_factor),
        text_encoders=[
            layout.text_encoder(source.text_encoders.get(spec.short_name, {}), spec) for spec in own_encoders
        ],
        tokenizers=[source.tokenizers[name] for spec in own_encoders for name in _tokenizer_names(spec)],
        scheduler={},
        prediction=source.prediction or family.detect(denoiser),
        clip_skip=source.clip_skip,
        title=source.title,
        fingerprint="",
        prompt_encoder=source.prompt_encoder,
    )


def _as_stored(component: Component, scales: Mapping[str, Tensor], packed: Mapping[str, PackedWeight]) -> Component:
    """The component with what its weights are stored in, which is given by the names in the file.

    Of a weight of the file that is several in the network, each has its rows.
    """
    file_names = {name: component.file_names.get(name, name) for name in component.tensors}
    names: dict[str, list[str]] = {}
    for name, file in file_names.items():
        if file in packed:
            names.setdefault(file, []).append(name)
    return replace(
        component,
        scales={name: scales[file] for name, file in file_names.items() if file in scales},
        packed={
            name: packed[file].part(number, len(parts))
            for file, parts in names.items()
            for number, name in enumerate(parts)
        },
    )


def checked(weights: BaseWeights) -> BaseWeights:
    """Build the model once, which costs milliseconds and no memory, to check that it is complete; add the fingerprint.

    Raises:
        WeightsError: A tensor is missing, unknown or of another shape.
    """
    model = weights.family.build(weights)
    parts = [weights.vae, *weights.text_encoders]
    words = [{f"{word.word}.{encoder}": vectors for encoder, vectors in word.vectors.items()} for word in weights.words]
    scales = [weights.denoiser.scales] if weights.denoiser.scales else []
    denoiser = {
        name: tensor for name, tensor in weights.denoiser.tensors.items() if name not in weights.denoiser.packed
    }
    for name, packed in weights.denoiser.packed.items():
        denoiser |= {f"{name}.{number}": tensor for number, tensor in enumerate(packed.stored)}
    tensors = [denoiser, *(part.tensors for part in parts), *scales, *words]
    digest = fingerprint(json.dumps(model.facts(), sort_keys=True), *tensors)
    return replace(weights, fingerprint=digest)


def _require_plain_floats(tensors: Mapping[str, Tensor], what: str = "The base model") -> None:
    """Refuse quantised weights, whose values can't be read without their scales, and numbers of other kinds.

    Args:
        tensors: Name → tensor.
        what: What they are of, for messages.
    """
    for name, tensor in tensors.items():
        if is_quantization_name(name) or tensor.dtype in (torch.uint8, torch.int8):
            raise WeightsError(
                f"{what} is quantised ({name}: {tensor.dtype}).",
                "Train on an fp16, bf16 or fp32 version of the model; the adapter also works with the quantised one.",
            )
        if not tensor.is_floating_point() and not name.endswith(("position_ids", "num_batches_tracked")):
            raise WeightsError(f"{what} has weights of the unsupported type {tensor.dtype}: {name}.", _BROKEN)


def _from_folder(folder: Path) -> BaseWeights:
    index = read_json(folder / _index_name(folder))
    layout = _folder_layout(index)
    settings = network_config(folder / layout.folder / "config.json")
    refuse_foreign_class(str(settings.pop("_class_name", layout.network_class)))
    network_config(folder / layout.folder / "config.json", _DENOISER_CONFIGS[layout.network_class])
    denoiser = _read_plain(folder / layout.folder, "diffusion_pytorch_model")
    if CONDITIONER_IN_DIFFUSERS in index:
        own = network_config(folder / CONDITIONER_IN_DIFFUSERS / "config.json", _CONDITIONER_CONFIG)
        settings["conditioner"] = {name: value for name, value in own.items() if name != "_class_name"}
        conditioner = _read_plain(folder / CONDITIONER_IN_DIFFUSERS, "diffusion_pytorch_model")
        denoiser |= {f"{CONDITIONER}.{name}": tensor for name, tensor in conditioner.items()}
    family = identify(settings)
    scheduler = network_config(folder / "scheduler" / "scheduler_config.json", _SCHEDULER_CONFIG)
    return BaseWeights(
        family=family,
        denoiser=layout.denoiser_of_folder(denoiser, settings),
        vae=_vae_folder(folder / "vae"),
        text_encoders=[
            layout.text_encoder(
                _read_plain(folder / spec.name, "model"),
                spec,
                _text_config(folder / spec.name / "config.json"),
            )
            for spec in family.text_encoders
        ],
        tokenizers=[
            load_tokenizer(folder / name, clip=not spec.is_language_model)
            for spec in family.text_encoders
            for name in (spec.tokenizer, spec.target_tokenizer)
            if name
        ],
        scheduler=scheduler,
        prediction=_scheduled_prediction(scheduler, family),
        clip_skip=0,
        title=_title_of_folder(folder.resolve()),
        fingerprint="",
        is_distilled=index["is_distilled"] if isinstance(index.get("is_distilled"), bool) else None,
    )


def _index_name(folder: Path) -> str:
    """The file that lists what is in a folder: of some pipelines, diffusers writes one of another name."""
    names = ("model_index.json", "modular_model_index.json")
    return next((name for name in names if (folder / name).is_file()), names[0])


def _text_config(path: Path) -> dict[str, Any]:
    """A text encoder's configuration; of one that looks at pictures, too, that of its language model is in it."""
    sees = "text_config" in read_json(path)
    return network_config(path, _SEEING_TEXT_CONFIG if sees else _TEXT_CONFIG)


def _title_of_folder(folder: Path) -> str:
    """Its name; of a snapshot in the hub's cache, "models--ORGANISATION--NAME/snapshots/HASH", that of the model."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def _folder_layout(index: Mapping[str, Any]) -> Layout:
    """The layout of a folder, by its model_index.json.

    Raises:
        UnsupportedModelError: It holds a model of no family here; the message names it.
    """
    candidates = [layout for layout in layouts() if layout.folder in index]
    stated = index[candidates[0].folder] if candidates else None
    if isinstance(stated, list) and len(stated) in (2, 3) and isinstance(stated[1], str):
        refuse_foreign_class(stated[1])  # before anything is missed that other models don't have
        return next(layout for layout in layouts() if layout.network_class == stated[1])
    if not candidates or not isinstance(candidates[0], UnetLayout):
        refuse_foreign_class(str(index.get("_class_name", "unknown")))
    return UnetLayout()


def _scheduled_prediction(scheduler: Mapping[str, Any], family: Family) -> Prediction:
    usual = family.detect({})
    if usual.type == "flow":
        return usual
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise WeightsError(
            f"The model predicts {prediction_type}, which is not supported.",
            "Use a model that predicts epsilon or velocity (v_prediction).",
        )
    return Prediction(prediction_type, bool(scheduler.get("rescale_betas_zero_snr")), "the scheduler's configuration")


def _vae_folder(folder: Path) -> Component:
    is_wan = read_json(folder / "config.json").get("_class_name") == "AutoencoderKLQwenImage"
    settings = network_config(folder / "config.json", _WAN_VAE_CONFIG if is_wan else _VAE_CONFIG)
    settings.pop("_class_name", None)
    tensors = _read_plain(folder, "diffusion_pytorch_model")
    return Component(tensors if is_wan else with_current_attention_names(tensors), settings)


def _read_plain(folder: Path, stem: str) -> dict[str, Tensor]:
    """The weights in a folder, which are plain numbers; see `read_component`."""
    tensors = read_component(folder, stem)
    _require_plain_floats(tensors)
    return tensors


def _open_vae(path: Path, family: Family) -> Component:
    """An autoencoder: a folder of diffusers, or a file in diffusers' or the original layout.

    Raises:
        WeightsError: It does not exist, or can't be read.
    """
    if os.path.isdir(path):
        return _vae_folder(path / "vae" if (path / "vae").is_dir() else path)
    if not os.path.isfile(path):
        raise WeightsError(f"The VAE {path} does not exist.", "Check the path for typos.")
    tensors = read_single_file(path)
    _require_plain_floats(tensors)
    return family.layout.vae(with_prefix(tensors, VAE_PREFIX) or tensors, family.scaling_factor)


def fingerprint(facts: str, *parts: Mapping[str, Tensor]) -> str:
    """A digest of networks that any retraining or merging changes, computed in a fraction of a second.

    From every tensor it uses name, shape and 256 evenly spaced values, as float32: the same model gives the
    same digest whether it comes from a file or from a host that loaded it at the same precision or a higher one.

    Args:
        facts: Everything besides the tensors that identifies the model.
        parts: Name → tensor of each network.
    """
    digest = hashlib.sha256(facts.encode())
    for part in parts:
        for name in sorted(part):
            flat = part[name].detach().flatten()
            indices = torch.linspace(0, flat.numel() - 1, min(256, flat.numel()), dtype=torch.float64).long()
            values = flat[indices.to(flat.device)].to("cpu", torch.float32)
            digest.update(f"{name} {tuple(part[name].shape)}".encode())
            digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()
