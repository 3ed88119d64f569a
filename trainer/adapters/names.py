"""Names of modules: what a name in an adapter file means, and which names the modules of a model have.

Programs name the same module differently: by its path in diffusers or in the original code, under several prefixes.
`module_path` leads from a name to the module's path, `kohya_name` from the path to the name in kohya's files.
`adapter_names` and `modules_by_name` do the same for the modules of a model that is built.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
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
from .layers.base import DAMAGED_FILE_REMEDY
from .prefixes import KOHYA_UNET_PREFIX, UNET, family_prefix, possible_prefixes, split_prefix

_WORDS = (  # parts of paths that hold underscores themselves, longer ones first
    "transformer_blocks|final_layer_norm|skip_connection|text_projection|time_embedding|"
    "output_blocks|add_embedding|conv_norm_out|conv_shortcut|time_emb_proj|input_blocks|"
    "middle_block|down_blocks|layer_norm1|layer_norm2|out_layers|emb_layers|time_embed|"
    "text_model|up_blocks|mid_block|in_layers|label_emb|self_attn|linear_1|linear_2|conv_out|"
    "proj_out|out_proj|conv_in|proj_in|to_out|q_proj|k_proj|v_proj|to_q|to_k|to_v"
)
_WORD = re.compile(rf"(?<![a-z0-9])({_WORDS})(?![a-z0-9])")
_ONE_LAYER_PER_BLOCK = re.compile(r"^lora_unet_(input_blocks_(3_1|2_0_op|4_0_op)(_|$)|output_blocks_(1|3)_[12]_conv$)")
_CONVOLUTION = re.compile(r"(^|\.)(conv\d?|conv_in|conv_out)$")  # of paths in diffusers
_BLOCK_KINDS = ("text", "down", "mid", "up", "other")

Adaptable = nn.Linear | nn.Conv2d
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class ModulePath:
    """The path of a module, whatever program named it.

    Attributes:
        component: "unet", "text_encoder" or "text_encoder_2".
        path: Dotted path in diffusers or transformers; in text encoders with "text_model.".
    """

    component: str
    path: str

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"

    @property
    def block(self) -> str:
        """The block it belongs to: "down 0", "mid", "up 3", "text", "text 2"; "other" outside of blocks."""
        if self.component != UNET:
            return self.component.replace("_encoder", "").replace("_", " ")
        level = re.search(r"(?:(down|up)_blocks|mid_block)(?:\.(\d+))?", self.path)
        if level is None:
            return "other"
        return f"{level[1]} {level[2]}" if level[1] else "mid"


def block_order(block: str) -> tuple[int, str]:
    """A key that sorts blocks in the order of the forward pass."""
    return _BLOCK_KINDS.index(block.split()[0]), block


def module_path(name: str, layers_per_block: int = 2) -> ModulePath:
    """The path of a module by its kohya name, which may be made of the original code's or diffusers' path.

    Args:
        name: Such as "lora_unet_input_blocks_4_1_proj_in" or "lora_te_text_model_encoder_layers_0_mlp_fc1".
        layers_per_block: Residual layers per level of the UNet, which the original code's numbers depend on.
    """
    component, rest = split_prefix(name)
    path = _dotted(rest)
    if component == UNET:
        path = diffusers_name(path, layers_per_block) or path
    return ModulePath(component, path)


def layers_per_block(names: Iterable[str]) -> int:
    """Residual layers per level of the UNet whose modules have these names: one in some smaller SDXLs, else two."""
    return 1 if any(_ONE_LAYER_PER_BLOCK.match(name) for name in names) else 2


def canonical_path(component: str, path: str) -> str:
    """A path or parameter's name with the level "text_model." that transformers 5 dropped from some text encoders."""
    return path if component == UNET else with_text_tower(path)


def kohya_name(path: ModulePath, family: Family) -> str:
    """The name that kohya's files give a module of a published model of a family."""
    dotted = path.path
    if path.component == UNET and family.original_names:
        attentions = [f"up_blocks.{level}.attentions.0" for level in family.attention_up_levels]
        dotted = original_names([dotted, *attentions], layers_per_block=2).get(dotted, dotted)
    return family_prefix(family, path.component) + _underscored(dotted)


def name_in_family(name: str, family: Family) -> str:
    """The name that files of a family give a module, from that of any program.

    A name of the original code stays, however many residual layers a level of its UNet has.
    """
    stays = family.original_names and name.startswith(tuple(_unet_prefixes(family)))
    return name if stays else kohya_name(module_path(name), family)


def _underscored(path: str) -> str:
    return path.replace(".", "_")


def _dotted(underscored: str) -> str:
    """A path whose dots were written as underscores; the words of Stable Diffusion's networks are known."""
    protected = _WORD.sub(lambda match: match[1].replace("_", "\0"), underscored)
    return protected.replace("_", ".").replace("\0", "_")


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
    all_names = list(names)
    for family in families.recognizable_families():
        pattern = family.adapter_marks.module_names
        if pattern and any(re.search(pattern, name) for name in all_names):
            return family
    return None


def family_of(adapter: Adapter) -> str | None:
    """Short title of the family that an adapter was made for, such as "SD 1" or "Flux"; None if nothing shows it."""
    family = recognized_family(adapter)
    return family.short_title if family else None


def _is_stated(family: Family | ForeignFamily, metadata: Mapping[str, str]) -> bool:
    stated = f"{metadata.get('modelspec.architecture', '')} {metadata.get('ss_base_model_version', '')}"
    marks = family.adapter_marks
    return marks.architecture in stated or marks.base_version in stated


def with_kohya_names(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adapters of one family with their modules named as kohya's files name them; foreign families stay as they are.

    Raises:
        AdapterError: One has the same module twice, under different names.
    """
    recognized = {recognized_family(adapter) for adapter in adapters} - {None}
    trainable = [family for family in recognized if family is not None and not isinstance(family, ForeignFamily)]
    if len(trainable) < len(recognized):
        return list(adapters)
    if len(trainable) == 1:
        family = trainable[0]
    elif trainable:
        family = families.FAMILIES[0]
    else:
        family = _family_by_naming(adapters)
    return [_with_names_of(family, adapter) for adapter in adapters]


def _with_names_of(family: Family, adapter: Adapter) -> Adapter:
    names = {name: name_in_family(name, family) for name in adapter.layers}
    repeated = [name for name, count in Counter(names.values()).items() if count > 1]
    if repeated:
        raise AdapterError(
            f"The adapter has the module {repeated[0]} twice, under different names.", DAMAGED_FILE_REMEDY
        )
    layers = {names[name]: layer for name, layer in adapter.layers.items()}
    vectors = {}
    for key, vector in adapter.vectors.items():
        name, _, suffix = key.rpartition(".")
        vectors[f"{name_in_family(name, family)}.{suffix}"] = vector
    return replace(adapter, layers=layers, vectors=vectors)


def _family_by_naming(adapters: Iterable[Adapter]) -> Family:
    """A family with whose prefixes some modules are named, and none with the first family's alone; else the first."""
    names = [name for adapter in adapters for name in adapter.layers]
    usual = families.FAMILIES[0]
    for family in families.FAMILIES[1:]:
        own = tuple(_name_prefixes(family) - _name_prefixes(usual))
        others = tuple(_name_prefixes(usual) - _name_prefixes(family))
        if any(name.startswith(own) for name in names) and not any(name.startswith(others) for name in names):
            return family
    return usual


def _name_prefixes(family: Family) -> set[str]:
    """What names of modules begin with in a family's files."""
    return {kind.adapter_prefix for kind in family.text_encoders} | _unet_prefixes(family)


def _unet_prefixes(family: Family) -> set[str]:
    blocks = ORIGINAL_BLOCKS if family.original_names else DIFFUSERS_BLOCKS
    return {f"{KOHYA_UNET_PREFIX}{block}_" for block in blocks}


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


def modules_by_path(model: DiffusionModel) -> dict[ModulePath, Adaptable]:
    """Path → Linear or convolution."""
    return {
        ModulePath(component, path): module
        for component, modules in adaptable_modules(model).items()
        for path, module in modules.items()
    }


def adapter_names(model: DiffusionModel) -> dict[ModulePath, str]:
    """Path of a Linear or convolution → its name in an adapter file, as kohya names it for the model's family."""
    names: dict[ModulePath, str] = {}
    for component, modules in adaptable_modules(model).items():
        names |= {ModulePath(component, path): name for path, name in _own_names(model, component, modules).items()}
    return names


def modules_by_name(model: DiffusionModel) -> dict[str, Adaptable]:
    """Every name that a file may give a module → the module: diffusers' and the original code's paths, any prefix."""
    return _by_possible_names(model, adaptable_modules(model))


def parametrized_modules_by_name(model: DiffusionModel) -> dict[str, nn.Module]:
    """As `modules_by_name`, for all modules that have weights or biases of their own, such as norms."""
    parametrized = {
        component: {
            canonical_path(component, path): module
            for path, module in network.named_modules()
            if list(module.parameters(recurse=False))
        }
        for component, network in networks(model).items()
    }
    return _by_possible_names(model, parametrized)


def canonical_names(model: DiffusionModel) -> dict[str, str]:
    """Every name that a file may give a module → its name in this model's own files."""
    names = adapter_names(model)
    own_names = {id(module): names[path] for path, module in modules_by_path(model).items()}
    return {name: own_names[id(module)] for name, module in modules_by_name(model).items()}


def named_weights(model: DiffusionModel, *, biases: bool = False) -> dict[str, Tensor]:
    """The weights that adapters change, by the names that this model's own adapter files give their modules.

    Args:
        model: A built model.
        biases: Also the weights of norms, and the biases as "<module>.bias".
    """
    names = adapter_names(model)
    weights = {names[path]: module.weight.detach() for path, module in modules_by_path(model).items()}
    if not biases:
        return weights
    for component, network in networks(model).items():
        modules = {canonical_path(component, path): module for path, module in network.named_modules()}
        for path, name in _own_names(model, component, modules).items():
            for parameter_name, parameter in modules[path].named_parameters(recurse=False):
                if parameter.ndim == 1:
                    key = f"{name}.bias" if parameter_name == "bias" else name
                    weights[key] = parameter.detach()
    return weights


def _own_names(model: DiffusionModel, component: str, paths: Collection[str]) -> dict[str, str]:
    """Path → name in the model's own files, for paths of one of its networks."""
    original: Mapping[str, str] = {}
    if component == UNET and model.family.original_names:
        original = _original_paths(model, paths)
    prefix = family_prefix(model.family, component)
    return {path: prefix + _underscored(original.get(path, path)) for path in paths}


def _by_possible_names(model: DiffusionModel, modules: Mapping[str, Mapping[str, ModuleT]]) -> dict[str, ModuleT]:
    """Every name that a file may give one of these modules, of component → path → module."""
    by_name: dict[str, ModuleT] = {}
    for component, by_path in modules.items():
        for prefix in possible_prefixes(model.family, component):
            by_name |= {prefix + _underscored(path): module for path, module in by_path.items()}
        if component == UNET:
            original = _original_paths(model, by_path)
            by_name |= {KOHYA_UNET_PREFIX + _underscored(name): by_path[path] for path, name in original.items()}
    return by_name


def _original_paths(model: DiffusionModel, paths: Collection[str]) -> dict[str, str]:
    """Path in diffusers → path in the original code, for modules of the model's UNet."""
    return original_names(paths, int(model.unet.config.layers_per_block))


def is_3x3_convolution(name: str) -> bool:
    """Whether a module, by its kohya name, is a 3×3 convolution in every family."""
    return bool(_CONVOLUTION.search(module_path(name).path))


def weight_shape(name: str, layers: Sequence[Layer], weight: Tensor | None) -> tuple[int, ...]:
    """The shape of a module's weight, (out, in) or (out, in, k, k).

    It is that of the weight; else that of the layer whose tensors show the kernel; else, if no layer's do, with a
    kernel of 3×3 for a module whose name is that of such a convolution.

    Args:
        name: The module's kohya name.
        layers: One or more for the module; without the weight, one at least that is no OFT.
        weight: The weight, if it is known.

    Raises:
        AdapterError: A layer does not fit the weight, or the other layers.
    """
    if weight is not None:
        shape = tuple(weight.shape)
    else:
        shape = max((layer.shape for layer in layers if not isinstance(layer, OftLayer)), key=len)
    unfitting = [layer.shape for layer in layers if not fits(layer, shape)]
    if unfitting:
        raise AdapterError(
            f"The module {name} has the shape {unfitting[0]} in one adapter and {shape} in another or in the base.",
            "Merge adapters that were made for models of the same shape.",
        )
    if weight is None and len(shape) == 2 and shape[1] % 9 == 0 and is_3x3_convolution(name):
        return (shape[0], shape[1] // 9, 3, 3)
    return shape
