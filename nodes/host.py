"""The bridge to ComfyUI: everything that this pack asks of its host is asked here.

The host's modules are imported inside the functions, so that loading the pack costs nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..trainer.core.errors import AdapterError, CancelledError, PicturesError, SettingsError, WeightsError
from .host_embeddings import embeddings_folder, with_words
from .host_prompts import ClipPrompts

if TYPE_CHECKING:
    from ..trainer.training.runs.folder import RunPaths

logger = logging.getLogger("dreambooth_lora")
NO_FOLDER = "(connected images)"  # instead of a folder's name
# by family, what Load CLIP calls its text encoder
_CLIP_TYPES = {"flux2": "flux2", "zimage": "lumina2", "krea2": "krea2", "anima": "stable_diffusion"}
_LARGEST_SIGMA = 1000.0  # Stable Diffusion's own schedule ends at 14.6, one with zero terminal SNR at 4518


def subject_folders() -> list[str]:
    """`NO_FOLDER`, then folders (also nested ones) and zip files in ComfyUI's input folder, with forward slashes."""
    import folder_paths

    root = Path(folder_paths.get_input_directory())
    folders = [path for pattern in ("*", "*/*") for path in root.glob(pattern) if path.is_dir()]
    shown = [path for path in (*folders, *root.glob("*.zip")) if not path.name.startswith(".")]
    names = {path.relative_to(root).as_posix() for path in shown}
    return [NO_FOLDER, *sorted(names - {NO_FOLDER})]


def input_path(name: str) -> Path:
    """The path of a folder or zip file in ComfyUI's input folder.

    Raises:
        WeightsError: The name points outside.
    """
    import folder_paths

    root = Path(folder_paths.get_input_directory()).resolve()
    path = (root / name).absolute()
    if ".." in Path(name).parts or not path.is_relative_to(root):
        raise WeightsError(f"{name} is outside ComfyUI's input folder.", "Choose a folder from the list.")
    return path


def folder_stamp(path: Path) -> str:
    """A text that changes with the zip file, or with the files of the folder and of all its folders."""
    from ..trainer.data.tree import opened_tree

    files = {path.name: path}
    if path.is_dir():
        with contextlib.suppress(PicturesError), opened_tree(path) as tree:
            files = {name: file.path for name, file in tree.files.items() if file.path}
    stamps = []
    for name, file in files.items():
        with contextlib.suppress(OSError):  # a link that leads nowhere
            status = file.stat()
            stamps.append((name, status.st_size, status.st_mtime_ns))
    return repr(stamps)


def keep_workflow(run: Any, workflow: Mapping[str, Any]) -> None:
    """Put the graph into a run's folder; the newest graph of a run counts.

    Raises:
        StorageError: It can't be written.
    """
    from ..trainer.core.files import write_atomic

    write_atomic(run.workflow_path, json.dumps(workflow, ensure_ascii=False).encode())


def loras_folder() -> Path:
    """Where adapter files are written: the first of ComfyUI's LoRA folders."""
    import folder_paths

    return Path(folder_paths.get_folder_paths("loras")[0])


def checkpoints_folder() -> Path:
    """Where checkpoint files are written: the first of ComfyUI's checkpoint folders."""
    import folder_paths

    return Path(folder_paths.get_folder_paths("checkpoints")[0])


def load_checkpoint(path: Path) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a checkpoint file, as Load Checkpoint gives them."""
    import comfy.sd
    import folder_paths

    embeddings = folder_paths.get_folder_paths("embeddings")
    return comfy.sd.load_checkpoint_guess_config(str(path), embedding_directory=embeddings)[:3]  # type: ignore[no-any-return]


def lora_names() -> list[str]:
    """The adapter files that ComfyUI knows."""
    import folder_paths

    return list(folder_paths.get_filename_list("loras"))


def lora_path(name: str) -> Path:
    """The path of one of `lora_names`."""
    import folder_paths

    return Path(folder_paths.get_full_path_or_raise("loras", name))


def work_folder() -> Path:
    """Where this pack writes runs, class pictures, generated pictures and scores."""
    import folder_paths

    return Path(folder_paths.get_output_directory()) / "dreambooth"


def runs_folder() -> Path:
    """The folder with a folder for each run."""
    return work_folder() / "runs"


def shown_folder(path: Path) -> str:
    """A folder in ComfyUI's output folder as pages show it, such as output/dreambooth/runs/dog."""
    import folder_paths

    return path.relative_to(Path(folder_paths.get_output_directory()).parent).as_posix()


def run_paths() -> RunPaths:
    """Where a run writes: ComfyUI's own folders for models, and its output folder for the rest."""
    from ..trainer.training.runs.folder import RunPaths

    return RunPaths(loras_folder(), runs_folder(), checkpoints=checkpoints_folder(), embeddings=embeddings_folder())


def run_path(run: str) -> Path:
    """The folder of a run, given by its whole path or its name.

    Raises:
        SettingsError: None is named, or one outside of `runs_folder`.
    """
    root = runs_folder().resolve()
    path = (root / run.strip()).resolve()
    if not run.strip() or path.parent != root:
        raise SettingsError(
            f"'{run}' is not a run in {root}.", "Connect the output 'run' of Train LoRA, or enter a folder name."
        )
    return path


def device_name() -> str:
    """ComfyUI's compute device, as the engine's setting `device`."""
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    if device.type not in ("cuda", "mps", "cpu"):
        logger.warning("Training on the CPU, which is slow: the device %s is not supported.", device)
        return "cpu"
    return str(device)


def algebra_device() -> str:
    """The device to compute singular values on: ComfyUI's if it is CUDA, else the CPU."""
    name = device_name()
    return name if name.startswith("cuda") else "cpu"


@contextlib.contextmanager
def training_mode() -> Iterator[None]:
    """Leave inference mode, free the device before and after, and turn a cancel into ComfyUI's own interrupt."""
    import comfy.model_management
    import torch

    from ..trainer.core.garbage import quick_collections

    comfy.model_management.unload_all_models()  # also takes patches out of the shared weights
    comfy.model_management.free_memory(1e30, torch.device("cpu"))  # and out of those that compute on the CPU
    comfy.model_management.soft_empty_cache()
    try:
        with quick_collections(), interruptible(), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        comfy.model_management.soft_empty_cache()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn a cancel into ComfyUI's own interrupt."""
    import comfy.model_management

    try:
        yield
    except CancelledError:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise comfy.model_management.InterruptProcessingException from None


def borrow_base(model: Any, clip: Any, vae: Any) -> Any:
    """Open the base model that ComfyUI holds, with the LoRAs applied to it; returns `BaseWeights`.

    What the graph sets on the model counts: the prediction type of a ModelSamplingDiscrete node, and the layer of a
    CLIP Set Last Layer node. No tensor is copied but those that a LoRA patches.

    Raises:
        UnsupportedModelError: Its family can't be trained; named.
        WeightsError: A part is missing, or the model predicts neither epsilon nor velocity.
    """
    from ..trainer.models.families import FAMILIES
    from ..trainer.models.open import HostTensors, open_base
    from ..trainer.models.stored_weights import placeholders

    denoiser = _patched_tensors(model.model.diffusion_model, model.patches, "diffusion_model.")
    packed = _packed_weights(model.model.diffusion_model, denoiser)
    modules = vars(clip.cond_stage_model)["_modules"]
    prompted = _prompted_by_language_model({**denoiser, **placeholders(packed)})
    known = {encoder.short_name for family in FAMILIES for encoder in family.text_encoders}
    encoders = {name: modules[name] for name in modules if name in known}
    tensors = HostTensors(
        denoiser=denoiser,
        vae=dict(vae.first_stage_model.state_dict()),
        text_encoders={
            name: _patched_tensors(encoder.transformer, clip.patcher.patches, f"{name}.transformer.")
            for name, encoder in encoders.items()
        },
        tokenizers={name: getattr(getattr(clip.tokenizer, name, None), "tokenizer", None) for name in encoders},
        title=_title(model),
        prediction=_prediction(model),
        clip_skip=0 if prompted else -(getattr(clip, "layer_idx", None) or 0),
        prompt_encoder=_clip_prompts(clip, *prompted) if prompted else None,
        packed=packed,
    )
    if getattr(model, "injections", None):
        logger.warning("Adapters applied in bypass mode are ignored in training; apply them the normal way.")
    return open_base(tensors)


def _prompted_by_language_model(denoiser: Mapping[str, Any]) -> tuple[Any, int] | None:
    """The engine's `Family` of a denoiser and how many numbers it reads of a token; None if CLIP encodes prompts."""
    from ..trainer.models.families import identify, layout_of, refuse_foreign_keys

    refuse_foreign_keys(denoiser)
    layout = layout_of(denoiser)
    if layout is None:
        return None
    config = layout.denoiser_config(denoiser)
    family = identify(config)
    if not any(encoder.is_language_model for encoder in family.text_encoders):
        return None
    return family, layout.context_width(config)


def _clip_prompts(clip: Any, family: Any, width: int) -> ClipPrompts:
    """The CLIP as what encodes prompts.

    Args:
        clip: A CLIP.
        family: The model's.
        width: Numbers that the model reads of each token.

    Raises:
        WeightsError: It is another kind of CLIP.
    """
    [language_model] = family.text_encoders
    remedy = f"Connect this model's CLIP; in Load CLIP, choose its file and the type {_CLIP_TYPES[family.name]}."
    modules = vars(clip.cond_stage_model)["_modules"]
    names = [name for name in modules if name.partition("_")[0] == language_model.short_name]
    if len(names) != 1:
        found = ", ".join(name for name in modules if hasattr(modules[name], "transformer")) or "nothing"
        raise WeightsError(
            f"The CLIP does not match the model: it contains {found}, not {language_model.short_name}.", remedy
        )
    [name] = names
    tensors = _patched_tensors(modules[name].transformer, clip.patcher.patches, f"{name}.transformer.")
    return ClipPrompts(clip, tensors, language_model, width, remedy)


def _prediction(model: Any) -> Any:
    """What ComfyUI takes the model to predict, as the engine's `Prediction`; None for models without a UNet.

    Raises:
        WeightsError: Neither epsilon nor velocity.
    """
    import comfy.model_sampling as samplings

    from ..trainer.models.families.base import Prediction

    sampling = model.get_model_object("model_sampling")
    source = "the model's sampling in the graph"
    discrete = isinstance(sampling, samplings.ModelSamplingDiscrete)
    if discrete and isinstance(sampling, samplings.V_PREDICTION) and not isinstance(sampling, samplings.EDM):
        rescaled = bool(sampling.sigmas[-1] > _LARGEST_SIGMA)
        return Prediction("v_prediction", rescaled, source)
    if discrete and type(sampling).calculate_denoised is samplings.EPS.calculate_denoised:
        return Prediction("epsilon", source=source)
    if hasattr(model.model.diffusion_model, "input_blocks"):
        name = " with ".join(base.__name__ for base in type(sampling).__bases__)
        raise WeightsError(
            f"The model's sampling is {name}, which is not supported in training.",
            "Connect a Stable Diffusion model that predicts epsilon or velocity, without a node that changes its "
            "sampling to another type.",
        )
    return None


def _patched_tensors(network: Any, patches: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The network's tensors by name: patched copies of those with patches, all others themselves.

    What is quantised and patched is no longer quantised.
    """
    import comfy.lora
    import torch

    tensors = dict(network.state_dict())
    with torch.no_grad():
        for key, patch in patches.items():
            name = key.removeprefix(prefix)
            if name == key or name not in tensors:
                continue
            weight = tensors[name]
            module = name.removesuffix(".weight")
            if f"{module}.comfy_quant" in tensors:
                weight = network.get_submodule(module).weight.dequantize()
                for part in ("weight_scale", "weight_scale_2", "comfy_quant", "input_scale"):
                    tensors.pop(f"{module}.{part}", None)
            patched = comfy.lora.calculate_weight(patch, weight.to(torch.float32, copy=True), key)
            tensors[name] = patched.to(weight.dtype)
    return tensors


def _packed_weights(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The weights that ComfyUI holds in other formats than float8, as the engine's `PackedWeight`.

    Args:
        network: A network.
        tensors: Those of its state; what such weights consist of is taken out.
    """
    from ..trainer.models.stored_weights import PackedWeight

    found = {}
    for key in [name for name in tensors if name.endswith(".comfy_quant")]:
        module = key.removesuffix(".comfy_quant")
        kind = str(json.loads(bytes(tensors[key].tolist()))["format"])
        if kind.startswith("float8"):
            continue
        weight = network.get_submodule(module).weight
        scales = [part.name for part in fields(weight.params) if hasattr(getattr(weight.params, part.name), "device")]
        stored = (weight._qdata, *(getattr(weight.params, name) for name in scales))
        found[f"{module}.weight"] = PackedWeight(tuple(weight.shape), stored, _Unpacking(weight, scales))
        for name in [name for name in tensors if name.startswith(f"{module}.") and name != f"{module}.bias"]:
            del tensors[name]
    return found


class _Unpacking:
    """Has ComfyUI dequantise a weight, or some of its rows, on whatever device they are."""

    def __init__(self, weight: Any, scales: Sequence[str]) -> None:
        """Remember how.

        Args:
            weight: A QuantizedTensor; its own tensors are not kept.
            scales: Names of the tensors among its parameters.
        """
        self._class = type(weight)
        self._layout = weight._layout_cls
        self._scales = scales
        self._make = type(weight.params)
        names = [part.name for part in fields(weight.params) if part.name not in (*scales, "orig_shape", "orig_dtype")]
        self._others = {name: getattr(weight.params, name) for name in names}

    def __call__(self, stored: Sequence[Any], shape: tuple[int, int], dtype: Any) -> Any:
        """The matrix, of these numbers and scales."""
        import torch

        tensors = dict(zip(self._scales, stored[1:], strict=True))
        parameters = self._make(**tensors, **self._others, orig_shape=shape, orig_dtype=dtype)
        with torch.no_grad():
            return self._class(stored[0], self._layout, parameters).dequantize().to(dtype)


def _title(model: Any) -> str:
    """The name of the model's checkpoint file, or of its class."""
    source = getattr(model, "cached_patcher_init", None)
    with contextlib.suppress(Exception):
        return Path(source[1][0]).stem  # the checkpoint's path, where ComfyUI remembers it
    return type(model.model).__name__


def apply_adapter(
    model: Any, clip: Any, tensors: Mapping[str, Any], strength_model: float, strength_clip: float
) -> tuple[Any, Any]:
    """Apply an adapter as ComfyUI's Load LoRA does; `model` or `clip` may be None.

    With one correction: ComfyUI 0.28 divides a DoRA by the norms of the weight's rows before the change instead of
    after it. Here the model computes what was trained. And prompts of the CLIP may call the words that the adapter
    bundles, as embedding:WORD.

    Args:
        model: A MODEL.
        clip: A CLIP.
        tensors: The adapter's, in the naming of any program that this pack reads.
        strength_model: Strength on the UNet.
        strength_clip: Strength on the text encoders.

    Raises:
        AdapterError: A module of it has another shape in the model, or all of a network's modules are missing there.
    """
    import comfy.sd

    from ..trainer.adapters.file_keys import in_file
    from ..trainer.adapters.kohya import parse_adapter

    adapter = parse_adapter(tensors)
    weights = _Weights(model, clip)
    left_out = _left_out(weights, model, clip, adapter)
    named = replace(adapter, embeddings={}).state_dict()
    kept = {key: tensor for key, tensor in named.items() if key.split(".")[0] not in left_out}
    kept |= _corrected_dora_scales(weights, kept)
    patched_model, patched_clip = comfy.sd.load_lora_for_models(
        model, clip, in_file(kept), strength_model, strength_clip
    )
    if adapter.embeddings and clip is not None:
        patched_clip = with_words(patched_clip, adapter.embeddings)
    return patched_model, patched_clip


def lent_weights(model: Any, clip: Any) -> Mapping[str, Any]:
    """The weights of a MODEL and a CLIP, of which either may be None, by the modules' kohya names; read on access."""
    return _LentWeights(_Weights(model, clip))


class _LentWeights(Mapping[str, Any]):
    def __init__(self, weights: _Weights) -> None:
        from ..trainer.adapters.module_paths import own_name
        from ..trainer.adapters.names import family_by_names, name_in_family
        from ..trainer.adapters.projections import is_split_here
        from ..trainer.models.families import FAMILIES

        self._weights = weights
        layers = [name for name in weights.names() if len(weights.shape(name) or ()) > 1]
        family = family_by_names(layers) or FAMILIES[0]
        self._aliases = {
            name_in_family(own_name(name, layers), family): name for name in layers if not is_split_here(name)
        }

    def __getitem__(self, name: str) -> Any:
        return self._weights.patched(self._aliases[name])

    def __contains__(self, name: object) -> bool:
        return name in self._aliases  # without reading the weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._aliases)

    def __len__(self) -> int:
        return len(self._aliases)


def _key_patches(patcher: Any) -> dict[str, Any]:
    """Key → (weight without patches, …), patches …, of a ModelPatcher.

    ComfyUI 0.28 looks for an attribute of each key, but what describes a quantised weight is none; it is left out here.
    """
    from ..trainer.core.tensor_files import is_quantization_name

    keys = list(patcher.model_state_dict())
    weights = {key: None for key in keys if not is_quantization_name(key)}
    if len(weights) == len(keys):
        return dict(patcher.get_key_patches())
    without_descriptions = patcher.clone()
    without_descriptions.model_state_dict = lambda *_: weights
    return dict(without_descriptions.get_key_patches())


class _Weights:
    """The weights of a MODEL and a CLIP under the names that adapter files give them."""

    def __init__(self, model: Any, clip: Any) -> None:
        import comfy.lora

        from ..trainer.adapters.file_keys import kohya_key

        self._weights: dict[str, Any] = {}  # key → (weight without patches, …), patches …
        self._keys: dict[str, Any] = {}  # name → key, or (key, (axis, first, count)) for a part of a weight
        if model is not None:
            self._weights |= _key_patches(model)
            keys = comfy.lora.model_lora_keys_unet(model.model, {})
            self._keys |= {kohya_key(name): key for name, key in keys.items()} | keys
        if clip is not None:
            self._weights |= _key_patches(clip.patcher)
            self._keys |= comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})

    def names(self) -> list[str]:
        """All names that a kohya file may give to a module of these."""
        from ..trainer.adapters.prefixes import is_kohya_name

        return [name for name in self._keys if is_kohya_name(name) and self.shape(name)]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a module's weight; None if there is no such module."""
        key, part = self._place(name)
        if key not in self._weights:
            return None
        shape = list(self._weights[key][0][0].shape)
        if part:
            shape[part[0]] = part[2]
        return tuple(shape)

    def _place(self, name: str) -> tuple[Any, Any]:
        """The key of a module's weight, and the part of it that is the module's: axis, first, count; None for all."""
        key = self._keys.get(name)
        return (key[0], key[1]) if isinstance(key, tuple) else (key, None)

    def patched(self, name: str) -> Any:
        """A copy of a module's weight in float32, with the patches of this MODEL or CLIP and of no other."""
        import comfy.lora
        import torch

        key, part = self._place(name)
        (weight, _), *patches = self._weights[key]
        if type(weight).__name__ == "QuantizedTensor":
            weight = weight.dequantize()
        patched = comfy.lora.calculate_weight(patches, weight.to(torch.float32, copy=True), key)
        return patched.narrow(*part) if part else patched


def _corrected_dora_scales(weights: _Weights, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The magnitudes of DoRA layers, such that ComfyUI's division by the wrong norms gives the right weight."""
    import torch

    from ..trainer.adapters.kohya import parse_adapter

    names = {key.rpartition(".")[0] for key in tensors if key.endswith(".dora_scale")}
    if not names:
        return {}
    dora_tensors = {key: tensor for key, tensor in tensors.items() if key.split(".")[0] in names}
    scales = {}
    for name, layer in parse_adapter(dora_tensors).layers.items():
        scale = tensors[f"{name}.dora_scale"]
        if scale.shape[0] != layer.shape[0] or weights.shape(name) is None:
            continue  # ComfyUI computes the older form, by inputs, as intended
        weight = weights.patched(name)
        delta = replace(layer, dora_scale=None).delta().to(weight.device).reshape(weight.shape)
        norm_before = torch.linalg.vector_norm(weight.flatten(1), dim=1)
        norm_after = torch.linalg.vector_norm((weight + delta).flatten(1), dim=1)
        correction = (norm_before / norm_after).to(scale.device)
        scales[f"{name}.dora_scale"] = scale.float() * correction.reshape(scale.shape)
    return scales


def _left_out(weights: _Weights, model: Any, clip: Any, adapter: Any) -> set[str]:
    """Names of the adapter's modules that the model does not have; they are logged.

    Raises:
        AdapterError: A module has another shape in the model; none of a network's modules is there; nothing is.
    """
    from ..trainer.adapters.keys import embedding_names
    from ..trainer.adapters.layers import fits
    from ..trainer.adapters.prefixes import UNET, component_of

    names = sorted({*adapter.layers, *(key.rpartition(".")[0] for key in adapter.vectors)})
    missing = {name for name in names if weights.shape(name) is None}
    for name, layer in adapter.layers.items():
        shape = weights.shape(name)
        if shape is not None and not fits(layer, shape):
            raise AdapterError(
                f"The adapter does not fit this model: {name} has shape {layer.shape} in the adapter and {shape} in "
                "the model.",
                "Use an adapter made for this model family.",
            )
    by_component: dict[str, list[str]] = {}
    for name in names:
        by_component.setdefault(component_of(name), []).append(name)
    for component, of_component in by_component.items():
        given = model if component == UNET else clip
        if given is not None and missing.issuperset(of_component):
            raise AdapterError(
                f"The adapter does not fit this model: none of its {len(of_component)} modules for the {component} "
                f"exists in it (e.g. {of_component[0]}).",
                "Use an adapter made for this model family.",
            )
    if len(missing) == len(names):
        raise AdapterError(
            f"The adapter changes nothing in what is connected; it changes e.g. {names[0]}.",
            "Connect the model, or the text encoder (clip), that the adapter changes.",
        )
    if missing:
        logger.warning(
            "%d of the adapter's %d modules do not exist in what is connected and are skipped, e.g. %s",
            len(missing),
            len(names),
            min(missing),
        )
    if adapter.embeddings and clip is None:
        logger.warning(
            "The adapter contains embeddings, which prompts can't use unless clip is connected: %s",
            ", ".join(embedding_names(adapter.embeddings)),
        )
    return missing
