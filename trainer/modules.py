"""The modules of a model that an adapter can change, and the names that adapter files give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from .families.base import DiffusionModel
from .kohya import PREFIXES
from .original_names import original_names

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


def modules_by_place(model: DiffusionModel) -> dict[tuple[str, str], Adaptable]:
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
    found = {names[place]: module.weight.detach() for place, module in modules_by_place(model).items()}
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
    own = {id(module): names[place] for place, module in modules_by_place(model).items()}
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
