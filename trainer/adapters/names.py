"""Where a module of an adapter file belongs, from its name alone; the same whatever program named it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor, nn

from ..core.errors import AdapterError
from ..models.families.base import DiffusionModel
from ..models.ldm_names import diffusers_name, original_names
from .kohya import PREFIXES, Adapter
from .layers import Layer, OftLayer, fits

_TEXT_PREFIXES = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
_WORDS = (  # parts of paths that hold underscores themselves, longer ones first
    "transformer_blocks|final_layer_norm|skip_connection|text_projection|time_embedding|"
    "output_blocks|add_embedding|conv_norm_out|conv_shortcut|time_emb_proj|input_blocks|"
    "middle_block|down_blocks|layer_norm1|layer_norm2|out_layers|emb_layers|time_embed|"
    "text_model|up_blocks|mid_block|in_layers|label_emb|self_attn|linear_1|linear_2|conv_out|"
    "proj_out|out_proj|conv_in|proj_in|to_out|q_proj|k_proj|v_proj|to_q|to_k|to_v"
)
_WORD = re.compile(rf"(?<![a-z0-9])({_WORDS})(?![a-z0-9])")
_CONVOLUTION = re.compile(r"(^|\.)(conv\d?|conv_in|conv_out)$")  # of paths in diffusers
_SDXL_UP_LEVELS_WITH_ATTENTION = ("0", "1")


@dataclass(frozen=True)
class ModulePath:
    """Where a module stands.

    Attributes:
        component: "unet", "text_encoder" or "text_encoder_2".
        path: Dotted path in diffusers or transformers.
    """

    component: str
    path: str

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"

    @property
    def block(self) -> str:
        """The block it belongs to: "down 0", "mid", "up 3", "text", "text 2"; "other" outside of blocks."""
        if self.component != "unet":
            return self.component.replace("_encoder", "").replace("_", " ")
        level = re.search(r"(?:(down|up)_blocks|mid_block)(?:\.(\d+))?", self.path)
        if level is None:
            return "other"
        return f"{level[1]} {level[2]}" if level[1] else "mid"


def module_path(name: str, layers_per_block: int = 2) -> ModulePath:
    """The place of a module by its kohya name, with the original code's or diffusers' paths."""
    for prefix, text in _TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return ModulePath(text, _dotted(name.removeprefix(prefix)))
    path = _dotted(name.removeprefix(PREFIXES["unet"]))
    return ModulePath("unet", diffusers_name(path, layers_per_block) or path)


def layers_per_block(names: Iterable[str]) -> int:
    """Residual layers per level of the UNet whose modules have these names: one in some smaller SDXLs, else two."""
    one = re.compile(r"^lora_unet_(input_blocks_(3_1|2_0_op|4_0_op)(_|$)|output_blocks_(1|3)_[12]_conv$)")
    return 1 if any(one.match(name) for name in names) else 2


def _dotted(underscored: str) -> str:
    """A path whose dots were written as underscores; the words of Stable Diffusion's networks are known."""
    kept = _WORD.sub(lambda match: match[1].replace("_", "\0"), underscored)
    return kept.replace("_", ".").replace("\0", "_")


def kohya_name(place: ModulePath, *, sdxl: bool) -> str:
    """The name that kohya's files give a module.

    Args:
        place: Where it stands.
        sdxl: Whether the model is an SDXL, whose UNet is named as in the original code and whose text encoders are
            numbered.
    """
    if place.component != "unet":
        prefix = next(prefix for prefix, text in _TEXT_PREFIXES.items() if text == place.component)
        return ("lora_te1_" if sdxl and prefix == "lora_te_" else prefix) + place.path.replace(".", "_")
    path = place.path
    if sdxl:
        marks = [f"up_blocks.{level}.attentions.0" for level in _SDXL_UP_LEVELS_WITH_ATTENTION]
        path = original_names([path, *marks], layers_per_block=2).get(path, path)
    return PREFIXES["unet"] + path.replace(".", "_")


def family_of(adapter: Adapter) -> str | None:
    """The family that an adapter was made for, "SD 1", "SD 2", "SDXL", "SD 3" or "Flux"; None if nothing tells.

    What its modules show counts more than what its metadata say.
    """
    widths = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}
    for name, layer in adapter.layers.items():
        if re.search(r"attn2_to_[kv]$", name) and len(layer.shape) > 1 and layer.shape[1] in widths:
            return widths[layer.shape[1]]
    if any("double_blocks_" in name or "single_transformer_blocks_" in name for name in adapter.layers):
        return "Flux"
    if any("joint_blocks_" in name for name in adapter.layers):
        return "SD 3"
    if any(name.startswith("lora_te2_") for name in adapter.layers):
        return "SDXL"
    return _stated_family(adapter.metadata)


def _stated_family(metadata: Mapping[str, str]) -> str | None:
    stated = f"{metadata.get('modelspec.architecture', '')} {metadata.get('ss_base_model_version', '')}"
    marks = {
        "SDXL": ("stable-diffusion-xl", "sdxl"),
        "SD 1": ("stable-diffusion-v1", "sd_v1"),
        "SD 2": ("stable-diffusion-v2", "sd_v2"),
        "SD 3": ("stable-diffusion-3", "sd3"),
        "Flux": ("flux",),
    }
    return next((family for family, words in marks.items() if any(word in stated for word in words)), None)


def with_kohya_names(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adapters of one family with their modules named as kohya's files name them; other families stay as they are.

    Raises:
        AdapterError: One has the same module twice, under different names.
    """
    families = {family_of(adapter) for adapter in adapters} - {None}
    if families & {"SD 3", "Flux"}:
        return list(adapters)
    sdxl = families == {"SDXL"} or (not families and _are_named_as_sdxl(adapters))
    return [_with_kohya_names(adapter, sdxl=sdxl) for adapter in adapters]


def _with_kohya_names(adapter: Adapter, *, sdxl: bool) -> Adapter:
    names = {name: _own_name(name, sdxl=sdxl) for name in adapter.layers}
    if len(set(names.values())) < len(names):
        twice = next(name for name, count in Counter(names.values()).items() if count > 1)
        raise AdapterError(
            f"The adapter has the module {twice} twice, under different names.",
            "Download or copy the adapter file again, or choose another.",
        )
    layers = {names[name]: layer for name, layer in adapter.layers.items()}
    vectors = {}
    for key, vector in adapter.vectors.items():
        module, _, part = key.rpartition(".")
        vectors[f"{_own_name(module, sdxl=sdxl)}.{part}"] = vector
    return replace(adapter, layers=layers, vectors=vectors)


def _own_name(name: str, *, sdxl: bool) -> str:
    """Kohya's name; one of the original code stays, however many residual layers a level of its UNet has."""
    original = ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")
    return name if sdxl and name.startswith(original) else kohya_name(module_path(name), sdxl=sdxl)


def _are_named_as_sdxl(adapters: Iterable[Adapter]) -> bool:
    """Whether some modules have names that kohya gives an SDXL's alone, and none those of an SD 1's alone."""
    xl = ("lora_te1_", "lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")
    others = ("lora_te_", "lora_unet_down_blocks_", "lora_unet_mid_block_", "lora_unet_up_blocks_")
    names = [name for adapter in adapters for name in adapter.layers]
    return any(name.startswith(xl) for name in names) and not any(name.startswith(others) for name in names)


_TEXT = "text_model."
UNET = "unet"

Adaptable = nn.Linear | nn.Conv2d
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def networks(model: DiffusionModel) -> dict[str, nn.Module]:
    """The networks that adapters change, by their component's name."""
    return {UNET: model.unet, **model.text_encoders}


def adaptable_modules(model: DiffusionModel) -> dict[str, dict[str, Adaptable]]:
    """Component → path → Linear or convolution; paths in text encoders begin with "text_model." in every version."""
    return {
        component: {
            canonical_path(component, path): module
            for path, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        for component, network in networks(model).items()
    }


def modules_by_path(model: DiffusionModel) -> dict[tuple[str, str], Adaptable]:
    """(component, path) → Linear or convolution."""
    return {
        (component, path): module
        for component, modules in adaptable_modules(model).items()
        for path, module in modules.items()
    }


def canonical_path(component: str, path: str) -> str:
    """A path with the level "text_model." that transformers 5 dropped from some text encoders."""
    bare = component == UNET or path.startswith(_TEXT) or path == "text_projection"
    return path if bare else _TEXT + path


def adapter_names(model: DiffusionModel) -> dict[tuple[str, str], str]:
    """(component, path) → the module's name in an adapter file, as kohya names it for the model's family."""
    prefixes = {kind.name: kind.adapter_prefix for kind in model.family.text_encoders}
    names: dict[tuple[str, str], str] = {}
    for component, modules in adaptable_modules(model).items():
        paths = {path: path for path in modules}
        if component == UNET and model.family.original_names:
            paths |= _original(model)
        prefix = prefixes.get(component, PREFIXES[UNET])
        names |= {(component, path): prefix + paths[path].replace(".", "_") for path in modules}
    return names


def modules_by_name(model: DiffusionModel) -> dict[str, Adaptable]:
    """Every name that a file may give a module → the module: diffusers' and the original code's paths, any prefix."""
    return _by_name(model, adaptable_modules(model))


def named_weights(model: DiffusionModel, *, biases: bool = False) -> dict[str, Tensor]:
    """The weights that adapters change, by the names that this model's own adapter files give their modules.

    Args:
        model: A built model.
        biases: Also the weights of norms, and the biases as "<module>.bias".
    """
    names = adapter_names(model)
    found = {names[place]: module.weight.detach() for place, module in modules_by_path(model).items()}
    prefixes = {kind.name: kind.adapter_prefix for kind in model.family.text_encoders}
    for component, network in networks(model).items() if biases else ():
        paths = {canonical_path(component, path): module for path, module in network.named_modules()}
        own: dict[str, str] = {}
        if component == UNET and model.family.original_names:
            own = original_names(paths, int(model.unet.config.layers_per_block))
        for path, module in paths.items():
            name = prefixes.get(component, PREFIXES[UNET]) + own.get(path, path).replace(".", "_")
            for kind, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 1:
                    found[f"{name}.bias" if kind == "bias" else name] = parameter.detach()
    return found


def parametrized_by_name(model: DiffusionModel) -> dict[str, nn.Module]:
    """As `modules_by_name`, for all modules that have weights or biases of their own, such as norms."""
    found = {
        component: {
            canonical_path(component, path): module
            for path, module in network.named_modules()
            if list(module.parameters(recurse=False))
        }
        for component, network in networks(model).items()
    }
    return _by_name(model, found)


def _by_name(model: DiffusionModel, modules: Mapping[str, Mapping[str, ModuleT]]) -> dict[str, ModuleT]:
    found: dict[str, ModuleT] = {}
    for component, paths in modules.items():
        for prefix in _prefixes(component, len(model.text_encoders)):
            found |= {prefix + path.replace(".", "_"): module for path, module in paths.items()}
        if component == UNET:
            original = original_names(paths, int(model.unet.config.layers_per_block))
            found |= {PREFIXES[UNET] + name.replace(".", "_"): paths[path] for path, name in original.items()}
    return found


def own_names(model: DiffusionModel) -> dict[str, str]:
    """Every name that a file may give a module → the name that this model's own files give it."""
    names = adapter_names(model)
    own = {id(module): names[place] for place, module in modules_by_path(model).items()}
    return {name: own[id(module)] for name, module in modules_by_name(model).items()}


def _prefixes(component: str, encoders: int) -> list[str]:
    if component == UNET:
        return [PREFIXES[UNET]]
    if component == "text_encoder":  # diffusers' converter calls it the first even where there is but one
        return [PREFIXES[component], "lora_te1_"]
    return [PREFIXES[component]]


def _original(model: DiffusionModel) -> dict[str, str]:
    paths = [path for path, module in model.unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return original_names(paths, int(model.unet.config.layers_per_block))


def is_convolution(name: str) -> bool:
    """Whether a module whose name is this one is a 3×3 convolution in every family."""
    return bool(_CONVOLUTION.search(module_path(name).path))


def weight_shape(name: str, layers: Sequence[Layer], weight: Tensor | None) -> tuple[int, ...]:
    """The shape of a module's weight, (out, in) or (out, in, k, k).

    It is that of the weight; else of the layer that knows the kernel; else 3×3 for a module whose name is that of
    such a convolution.

    Raises:
        AdapterError: The layers are of different sizes.
    """
    shapes = [layer.shape for layer in layers if not isinstance(layer, OftLayer)]
    known = tuple(weight.shape) if weight is not None else max(shapes, key=len)
    different = [layer.shape for layer in layers if not fits(layer, known)]
    if different:
        raise AdapterError(
            f"The module {name} has the shape {different[0]} in one adapter and {known} in another or in the base.",
            "Merge adapters that were made for models of the same shape.",
        )
    if weight is None and len(known) == 2 and is_convolution(name) and known[1] % 9 == 0:
        return (known[0], known[1] // 9, 3, 3)
    return known


def block_order(block: str) -> tuple[int, str]:
    """A key that sorts blocks as a picture goes through them."""
    return (("text", "down", "mid", "up", "other").index(block.split()[0]), block)
