"""Names of modules: what a name in an adapter file means, and the names of a model's modules.

Programs name the same module differently: by its path in diffusers or in the original code, under several prefixes.
`module_paths.module_path` maps a name to the module's path, `kohya_name` maps the path to the name in kohya's
files. `adapter_names` and `modules_by_name` do the same for the modules of a model that is built.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from ..core.errors import AdapterError
from ..models import families
from ..models.families.base import DiffusionModel, Family
from ..models.ldm_names import ORIGINAL_BLOCKS
from ..models.stored_weights import StoredLinear
from ..models.transformers import is_transformer_module
from .foreign import foreign_family_in_words
from .kohya import Adapter
from .layers import Layer, OftLayer, fits
from .layers.base import DAMAGED_FILE_REMEDY
from .module_paths import ModulePath, canonical_path, module_path, underscored
from .prefixes import KOHYA_UNET_PREFIX, UNET, family_prefix, possible_prefixes

_ORIGINAL_UNET_PREFIXES = tuple(f"{KOHYA_UNET_PREFIX}{block}_" for block in ORIGINAL_BLOCKS)
_CONVOLUTION = re.compile(r"(^|\.)(conv\d?|conv_in|conv_out)$")  # of paths in diffusers

Adaptable = nn.Linear | nn.Conv2d
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def kohya_name(path: ModulePath, family: Family) -> str:
    """The name, in kohya's files, of a module of a family's published model."""
    dotted = path.path
    if path.component == UNET and family.original_names:
        dotted = family.layout.published_name(dotted, family.transformer_depths) or dotted
    return family_prefix(family, path.component) + underscored(dotted)


def name_in_family(name: str, family: Family) -> str:
    """The name of a module in a family's files, from that of any program.

    A name of Stable Diffusion's original code stays, whatever the number of residual layers per level of its UNet.
    """
    stays = family.original_names and name.startswith(_ORIGINAL_UNET_PREFIXES)
    return name if stays or name in family.adapter_marks.shared_names else kohya_name(module_path(name), family)


def shown_family(adapter: Adapter) -> Family | None:
    """The family of an adapter by its modules' names and widths; None if several have such modules."""
    for name, layer in adapter.layers.items():
        is_of_unet = re.search(r"attn2_to_[kv]$", name) and not is_transformer_module(module_path(name).path)
        if is_of_unet and len(layer.shape) > 1:
            width = layer.shape[1]
            fitting = [family for family in families.FAMILIES if family.adapter_marks.context_width == width]
            if fitting:
                stated = [family for family in fitting if is_stated(family, adapter.metadata)]
                return [*stated, *fitting][0]
    return family_by_names(adapter.layers)


def recognized_family(adapter: Adapter) -> Family | None:
    """The family that an adapter was made for: by its modules, else by its metadata, else None."""
    stated = [family for family in families.FAMILIES if is_stated(family, adapter.metadata)]
    return shown_family(adapter) or next(iter(stated), None)


def family_by_names(names: Iterable[str]) -> Family | None:
    """The only family with modules of these names; None if there is none."""
    all_names = list(names)
    for family in families.FAMILIES:
        pattern = family.adapter_marks.module_names
        if pattern and any(re.search(pattern, name) for name in all_names):
            return family
    return None


def family_of(adapter: Adapter) -> str | None:
    """Short title of the family that an adapter was made for, such as "SD 1"; None if unknown."""
    family = recognized_family(adapter)
    return family.short_title if family else None


def is_stated(family: Family, metadata: Mapping[str, str]) -> bool:
    """Whether an adapter's metadata names a family, in Stability's or kohya's keys."""
    marks = family.adapter_marks
    return marks.architecture in metadata.get("modelspec.architecture", "") or marks.base_version in metadata.get(
        "ss_base_model_version", ""
    )


def contradicting_words(family: Family, metadata: Mapping[str, str]) -> str | None:
    """The model family in an adapter's metadata, if it differs from this one; else None.

    It is a hint: the modules count more, since programs and people write a family's name in many ways.
    """
    if is_stated(family, metadata):
        return None
    for word in (metadata.get("modelspec.architecture", ""), metadata.get("ss_base_model_version", "")):
        stated = {"modelspec.architecture": word, "ss_base_model_version": word}
        if any(is_stated(other, stated) for other in families.FAMILIES) or foreign_family_in_words(word):
            return word.removesuffix("/lora")
    return None


def is_published(path: ModulePath, family: Family) -> bool:
    """Whether the published models of a family have such a module, which a smaller relative may lack.

    Modules outside blocks, which every relative has, do not count.
    """
    if path.component != UNET:
        return True
    return family.layout.is_published(path.path, family.transformer_depths)


def with_kohya_names(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adapters of one family with their modules named as kohya's files name them.

    Raises:
        AdapterError: One has the same module twice, under different names.
    """
    family = _common_family([shown_family(adapter) for adapter in adapters])
    family = family or _common_family([recognized_family(adapter) for adapter in adapters])
    family = family or _family_by_naming(adapters)
    return [_with_names_of(family, adapter) for adapter in adapters]


def _common_family(recognized: Iterable[Family | None]) -> Family | None:
    """The only family among these; the first of all if there are several, which are refused where it counts."""
    given = list(recognized)
    found = [family for family in families.FAMILIES if family in given]
    return found[0] if len(found) == 1 else families.FAMILIES[0] if found else None


def _with_names_of(family: Family, adapter: Adapter) -> Adapter:
    vector_modules = {key.rpartition(".")[0] for key in adapter.vectors}
    names = {name: name_in_family(name, family) for name in sorted({*adapter.layers, *vector_modules})}
    repeated = [name for name, count in Counter(names.values()).items() if count > 1]
    if repeated:
        both = " and ".join(name for name, renamed in names.items() if renamed == repeated[0])
        raise AdapterError(
            f"The adapter has the module {repeated[0]} twice, under different names: {both}.", DAMAGED_FILE_REMEDY
        )
    layers = {names[name]: layer for name, layer in adapter.layers.items()}
    vectors = {}
    for key, vector in adapter.vectors.items():
        name, _, suffix = key.rpartition(".")
        vectors[f"{names[name]}.{suffix}"] = vector
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
    blocks = family.layout.block_names if family.original_names else family.layout.block_paths
    return {f"{KOHYA_UNET_PREFIX}{block}_" for block in blocks}


def networks(model: DiffusionModel) -> dict[str, nn.Module]:
    """The networks that adapters change, by their component's name."""
    return {UNET: model.denoiser, **model.text_encoders}


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
    """Every name that a module may have in a file → the module: diffusers' and the original code's, any prefix."""
    return _by_possible_names(model, adaptable_modules(model))


def parametrized_modules_by_name(model: DiffusionModel) -> dict[str, nn.Module]:
    """As `modules_by_name`, for all modules with weights or biases, such as norms."""
    parametrized = {
        component: {
            canonical_path(component, path): module
            for path, module in network.named_modules()
            if list(module.parameters(recurse=False)) or isinstance(module, StoredLinear)
        }
        for component, network in networks(model).items()
    }
    return _by_possible_names(model, parametrized)


def canonical_names(model: DiffusionModel) -> dict[str, str]:
    """Every name that a module may have in a file → its name in this model's own files."""
    names = adapter_names(model)
    own_names = {id(module): names[path] for path, module in modules_by_path(model).items()}
    return {name: own_names[id(module)] for name, module in modules_by_name(model).items()}


def named_weights(model: DiffusionModel, *, biases: bool = False) -> dict[str, Tensor]:
    """The weights that adapters change, by their modules' names in this model's own adapter files.

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
    return {path: prefix + underscored(original.get(path, path)) for path in paths}


def _by_possible_names(model: DiffusionModel, modules: Mapping[str, Mapping[str, ModuleT]]) -> dict[str, ModuleT]:
    """Every name that a file may give one of these modules, of component → path → module."""
    by_name: dict[str, ModuleT] = {}
    for component, by_path in modules.items():
        for prefix in possible_prefixes(model.family, component):
            by_name |= {prefix + underscored(path): module for path, module in by_path.items()}
        if component == UNET:
            original = _original_paths(model, by_path)
            by_name |= {KOHYA_UNET_PREFIX + underscored(name): by_path[path] for path, name in original.items()}
    return by_name


def _original_paths(model: DiffusionModel, paths: Collection[str]) -> dict[str, str]:
    """Path in diffusers → path in the original code, for modules of the model's UNet."""
    return model.family.layout.original_names(paths, model.denoiser.config)


def is_3x3_convolution(name: str) -> bool:
    """Whether a module, by its kohya name, is a 3×3 convolution in every family."""
    return bool(_CONVOLUTION.search(module_path(name).path))


def weight_shape(name: str, layers: Sequence[Layer], weight: Tensor | None) -> tuple[int, ...]:
    """The shape of a module's weight, (out, in) or (out, in, k, k).

    It is that of the weight; else that of a layer with a known kernel; else, if there is none, with a kernel of 3×3 for
    a module whose name is that of such a convolution.

    Args:
        name: The module's kohya name.
        layers: One or more for the module; without the weight, at least one that is not an OFT.
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
            f"The module {name} has shape {unfitting[0]} in one adapter and {shape} in another or in the base model.",
            "Merge adapters made for models of the same size.",
        )
    if weight is None and len(shape) == 2 and shape[1] % 9 == 0 and is_3x3_convolution(name):
        return (shape[0], shape[1] // 9, 3, 3)
    return shape
