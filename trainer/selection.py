"""Which modules get an adapter, of which rank and alpha: the settings' patterns against a model's modules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from .adapter_settings import AdapterSettings
from .errors import AdapterError, SettingsError
from .families.base import DiffusionModel, Family
from .kohya import Adapter
from .layers import Layer, LokrLayer
from .modules import UNET, Adaptable, adaptable_modules, adapter_names, modules_by_name, modules_by_place


@dataclass(frozen=True)
class Target:
    """A module that gets an adapter.

    Attributes:
        component: "unet", "text_encoder" or "text_encoder_2".
        path: Its path in diffusers or transformers.
        name: Its name in the adapter file.
        rank: Rank of its adapter.
        alpha: Numerator of the adapter's scale alpha / rank, as the file has it.
    """

    component: str
    path: str
    name: str
    rank: int
    alpha: float


def choose_targets(model: DiffusionModel, settings: AdapterSettings) -> list[Target]:
    """The modules that the settings choose, the UNet's first, in the order of their names.

    Raises:
        SettingsError: A setting belongs to another family, chooses nothing, or a rank does not fit a module.
    """
    require_family_fits(model.family, settings)
    names = adapter_names(model)
    chosen = []
    for component, modules in adaptable_modules(model).items():
        if component != UNET and component not in settings.text_rates:
            continue
        paths = _chosen_paths(model.family, component, modules, settings)
        found = [_target(component, path, names[component, path], modules[path], settings) for path in paths]
        chosen += sorted((target for target in found if target.rank), key=lambda target: target.name)
    modules_here = modules_by_place(model)
    for target in chosen:
        _require_rank_fits(target, modules_here[target.component, target.path], settings)
    return chosen


def require_family_fits(family: Family, settings: AdapterSettings) -> None:
    """Check that no setting belongs to another family.

    Raises:
        SettingsError: Names the setting and what to choose.
    """
    known = {kind.name for kind in family.text_encoders}
    for component in settings.text_rates:
        if component not in known:
            raise SettingsError(
                f"{component}_lr trains a text encoder that {family.title} does not have.",
                f"Set {component}_lr to 0; the text encoder of {family.title} is trained by text_encoder_lr.",
            )
    if settings.targets != "none" and settings.targets not in family.targets:
        raise SettingsError(
            f"targets '{settings.targets}' does not exist for {family.title}.",
            f"Choose one of: {', '.join(family.targets)}; or a base model of Stable Diffusion XL.",
        )
    if settings.adapter == "full" and not family.trains_fully:
        raise SettingsError(
            f"adapter 'full' (fine-tuning all weights) does not exist for {family.title}.",
            "Choose lora, dora, loha or lokr, or a base model of Stable Diffusion 1.x.",
        )


def _chosen_paths(
    family: Family, component: str, modules: Mapping[str, Adaptable], settings: AdapterSettings
) -> list[str]:
    if component != UNET:
        preset = re.compile(family.text_targets.get(settings.targets, family.text_targets["attention-mlp"]))
        chosen = [path for path in modules if preset.fullmatch(path)]
    else:
        pattern = re.compile(family.targets.get(settings.targets, "(?!)"))
        include = settings.include_patterns
        chosen = [path for path in modules if pattern.fullmatch(path) or any(one.search(path) for one in include)]
        for one in include:
            if not any(one.search(path) for path in modules):
                raise SettingsError(
                    f"include '{one.pattern}' matches no layer of the UNet.",
                    f"Its layers are named like {next(iter(modules))} and {list(modules)[len(modules) // 2]}.",
                )
    kept = [path for path in chosen if not any(one.search(path) for one in settings.exclude_patterns)]
    if not kept:
        raise SettingsError(
            f"No layer of the {component} is left to train: targets, include and exclude together choose none.",
            "Choose other targets, or exclude less.",
        )
    return kept


def _target(component: str, path: str, name: str, module: nn.Module, settings: AdapterSettings) -> Target:
    rank, alpha = settings.rank, settings.alpha
    if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1) and (settings.conv_rank or settings.conv_alpha):
        rank, alpha = settings.conv_rank or rank, settings.conv_alpha
    for entry in settings.ranks_by_block:
        if entry.pattern.search(path):
            rank, alpha = entry.rank, entry.alpha
    value = float(rank if alpha is None else alpha)
    return Target(component, path, name, rank, value * rank**0.5 if settings.rank_stabilized else value)


def _require_rank_fits(target: Target, module: Adaptable, settings: AdapterSettings) -> None:
    """Refuse a rank above the size of a layer; LoKr needs none, it takes whole factors then."""
    smallest = min(module.weight.shape[:2])
    if target.rank > smallest and settings.adapter != "lokr":
        raise SettingsError(
            f"rank {target.rank} is above the size of the layer {target.path} ({smallest}).",
            f"Set the rank to at most {smallest}; 4 to 32 are usual. (block_ranks sets it for parts of the model.)",
        )


def fitted_start(model: DiffusionModel, adapter: Adapter) -> Adapter:
    """An adapter to go on from under the names that this model's files have; a LoKr's scale goes into its factors.

    Raises:
        AdapterError: A module of it does not exist in the model, or is of another shape.
    """
    modules, names = modules_by_name(model), adapter_names(model)
    own = {id(module): names[key] for key, module in modules_by_place(model).items()}
    layers: dict[str, Layer] = {}
    for name, layer in adapter.layers.items():
        module = modules.get(name)
        if module is None or math.prod(layer.shape) != module.weight.numel():
            raise AdapterError(
                f"The adapter to start from has the module {name}, which this {model.family.title} model lacks or has "
                "in another shape.",
                "Start from an adapter that was trained on a model of this shape.",
            )
        layers[own[id(module)]] = _with_unit_scale(layer) if isinstance(layer, LokrLayer) else layer
    return replace(adapter, layers=layers)


def _with_unit_scale(layer: LokrLayer) -> LokrLayer:
    """The same LoKr with alpha equal to its rank: the scale is multiplied into the smaller factor."""
    if layer.is_whole or layer.alpha == layer.rank:
        return replace(layer, alpha=float(layer.rank))
    scale = layer.alpha / layer.rank
    if layer.w1 is not None:
        return replace(layer, w1=layer.w1 * scale, alpha=float(layer.rank))
    assert layer.w1_a is not None
    return replace(layer, w1_a=layer.w1_a * scale, alpha=float(layer.rank))


def targets_of(model: DiffusionModel, start: Adapter) -> list[Target]:
    """The modules, ranks and alphas of an adapter from `fitted_start`."""
    places = {name: key for key, name in adapter_names(model).items()}
    targets = [Target(*places[name], name, layer.rank, layer.alpha) for name, layer in start.layers.items()]
    return sorted(targets, key=lambda target: (target.component != UNET, target.component, target.name))
