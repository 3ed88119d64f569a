"""Where a module of an adapter file belongs, from its name alone; the same whatever program named it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor, nn

from ..core.errors import AdapterError
from ..models import families
from ..models.clip_names import with_text_tower
from ..models.families import ForeignFamily
from ..models.families.base import DiffusionModel, Family
from ..models.ldm_names import DIFFUSERS_BLOCKS, ORIGINAL_BLOCKS, diffusers_name, original_names
from .kohya import Adapter
from .layers import Layer, OftLayer, fits
from .prefixes import KOHYA_UNET_PREFIX, UNET, family_prefix, possible_prefixes, split_prefix

_WORDS = (  # parts of paths that hold underscores themselves, longer ones first
    "transformer_blocks|final_layer_norm|skip_connection|text_projection|time_embedding|"
    "output_blocks|add_embedding|conv_norm_out|conv_shortcut|time_emb_proj|input_blocks|"
    "middle_block|down_blocks|layer_norm1|layer_norm2|out_layers|emb_layers|time_embed|"
    "text_model|up_blocks|mid_block|in_layers|label_emb|self_attn|linear_1|linear_2|conv_out|"
    "proj_out|out_proj|conv_in|proj_in|to_out|q_proj|k_proj|v_proj|to_q|to_k|to_v"
)
_WORD = re.compile(rf"(?<![a-z0-9])({_WORDS})(?![a-z0-9])")
_CONVOLUTION = re.compile(r"(^|\.)(conv\d?|conv_in|conv_out)$")  # of paths in diffusers


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
    component, rest = split_prefix(name)
    path = _dotted(rest)
    if component == UNET:
        path = diffusers_name(path, layers_per_block) or path
    return ModulePath(component, path)


def layers_per_block(names: Iterable[str]) -> int:
    """Residual layers per level of the UNet whose modules have these names: one in some smaller SDXLs, else two."""
    one = re.compile(r"^lora_unet_(input_blocks_(3_1|2_0_op|4_0_op)(_|$)|output_blocks_(1|3)_[12]_conv$)")
    return 1 if any(one.match(name) for name in names) else 2


def _dotted(underscored: str) -> str:
    """A path whose dots were written as underscores; the words of Stable Diffusion's networks are known."""
    kept = _WORD.sub(lambda match: match[1].replace("_", "\0"), underscored)
    return kept.replace("_", ".").replace("\0", "_")


def kohya_name(path: ModulePath, family: Family) -> str:
    """The name that kohya's files give a module of a published model of a family."""
    name = path.path
    if path.component == UNET and family.original_names:
        attentions = [f"up_blocks.{level}.attentions.0" for level in family.attention_up_levels]
        name = original_names([name, *attentions], layers_per_block=2).get(name, name)
    return family_prefix(family, path.component) + name.replace(".", "_")


def name_in_family(name: str, family: Family) -> str:
    """The name that files of a family give a module, from that of any program.

    A name of the original code stays, however many residual layers a level of its UNet has.
    """
    stays = family.original_names and name.startswith(tuple(_unet_beginnings(family)))
    return name if stays else kohya_name(module_path(name), family)


def recognized_family(adapter: Adapter) -> Family | ForeignFamily | None:
    """The family that an adapter was made for; None if nothing shows it.

    What its modules show counts more than what its metadata state.
    """
    stated = [family for family in families.recognizable_families() if _is_stated(family, adapter.metadata)]
    for name, layer in adapter.layers.items():
        if re.search(r"attn2_to_[kv]$", name) and len(layer.shape) > 1:
            width = layer.shape[1]
            fitting = [family for family in families.FAMILIES if family.adapter_marks.context_width == width]
            if fitting:
                return next((family for family in fitting if family in stated), fitting[0])
    return family_by_names(adapter.layers) or next(iter(stated), None)


def family_by_names(names: Iterable[str]) -> Family | ForeignFamily | None:
    """The family whose models alone have modules of such names; None if there is none."""
    whole = list(names)
    for family in families.recognizable_families():
        pattern = family.adapter_marks.module_names
        if pattern and any(re.search(pattern, name) for name in whole):
            return family
    return None


def _is_stated(family: Family | ForeignFamily, metadata: Mapping[str, str]) -> bool:
    stated = f"{metadata.get('modelspec.architecture', '')} {metadata.get('ss_base_model_version', '')}"
    marks = family.adapter_marks
    return marks.architecture in stated or marks.base_version in stated


def family_of(adapter: Adapter) -> str | None:
    """Short title of the family that an adapter was made for, such as "SD 1" or "Flux"; None if nothing shows it."""
    family = recognized_family(adapter)
    return family.short_title if family else None


def with_kohya_names(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adapters of one family with their modules named as kohya's files name them; foreign families stay as they are.

    Raises:
        AdapterError: One has the same module twice, under different names.
    """
    recognized = {recognized_family(adapter) for adapter in adapters} - {None}
    known = [family for family in recognized if family is not None and not isinstance(family, ForeignFamily)]
    if len(known) < len(recognized):
        return list(adapters)
    if len(known) == 1:
        family = known[0]
    else:
        family = families.FAMILIES[0] if known else _family_by_naming(adapters)
    return [_with_names_of(family, adapter) for adapter in adapters]


def _with_names_of(family: Family, adapter: Adapter) -> Adapter:
    names = {name: name_in_family(name, family) for name in adapter.layers}
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
        vectors[f"{name_in_family(module, family)}.{part}"] = vector
    return replace(adapter, layers=layers, vectors=vectors)


def _family_by_naming(adapters: Iterable[Adapter]) -> Family:
    """The family whose way of naming some modules have and that of the first family none; else the first family."""
    names = [name for adapter in adapters for name in adapter.layers]
    usual = families.FAMILIES[0]
    for family in families.FAMILIES[1:]:
        own = tuple(_beginnings(family) - _beginnings(usual))
        others = tuple(_beginnings(usual) - _beginnings(family))
        if any(name.startswith(own) for name in names) and not any(name.startswith(others) for name in names):
            return family
    return usual


def _beginnings(family: Family) -> set[str]:
    """What names of modules begin with in a family's files."""
    return {kind.adapter_prefix for kind in family.text_encoders} | _unet_beginnings(family)


def _unet_beginnings(family: Family) -> set[str]:
    blocks = ORIGINAL_BLOCKS if family.original_names else DIFFUSERS_BLOCKS
    return {f"{KOHYA_UNET_PREFIX}{block}_" for block in blocks}


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
    return path if component == UNET else with_text_tower(path)


def adapter_names(model: DiffusionModel) -> dict[tuple[str, str], str]:
    """(component, path) → the module's name in an adapter file, as kohya names it for the model's family."""
    names: dict[tuple[str, str], str] = {}
    for component, modules in adaptable_modules(model).items():
        paths = {path: path for path in modules}
        if component == UNET and model.family.original_names:
            paths |= _original(model)
        prefix = family_prefix(model.family, component)
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
    for component, network in networks(model).items() if biases else ():
        paths = {canonical_path(component, path): module for path, module in network.named_modules()}
        own: dict[str, str] = {}
        if component == UNET and model.family.original_names:
            own = original_names(paths, int(model.unet.config.layers_per_block))
        for path, module in paths.items():
            name = family_prefix(model.family, component) + own.get(path, path).replace(".", "_")
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
        for prefix in possible_prefixes(model.family, component):
            found |= {prefix + path.replace(".", "_"): module for path, module in paths.items()}
        if component == UNET:
            original = original_names(paths, int(model.unet.config.layers_per_block))
            found |= {KOHYA_UNET_PREFIX + name.replace(".", "_"): paths[path] for path, name in original.items()}
    return found


def own_names(model: DiffusionModel) -> dict[str, str]:
    """Every name that a file may give a module → the name that this model's own files give it."""
    names = adapter_names(model)
    own = {id(module): names[place] for place, module in modules_by_path(model).items()}
    return {name: own[id(module)] for name, module in modules_by_name(model).items()}


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
