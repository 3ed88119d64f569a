"""Which modules get an adapter, of which rank and alpha: the settings' patterns against a model's modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from ..core.errors import AdapterError, SettingsError
from ..models import families
from ..models.families import titles_of
from ..models.families.base import DiffusionModel, Family
from ..settings.adapter import AdapterSettings
from .kohya import Adapter
from .layers import Layer, LokrLayer, fits
from .names import Adaptable, adaptable_modules, adapter_names, modules_by_name, modules_by_path, own_names
from .prefixes import UNET


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
    _require_patterns_match(model, settings)
    chosen = []
    for component, modules in adaptable_modules(model).items():
        if component != UNET and component not in settings.text_rates:
            continue
        paths = _chosen_paths(model.family, component, modules, settings)
        found = [_target(component, path, names[component, path], modules[path], settings) for path in paths]
        kept = sorted((target for target in found if target.rank), key=lambda target: target.name)
        if not kept:
            raise SettingsError(
                f"No layer of the {component} is left to train: targets, include, exclude and block_ranks together "
                "choose none.",
                "Choose other targets, exclude less, or give a rank above 0.",
            )
        chosen += kept
    modules_here = modules_by_path(model)
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
        having_it = [other for other in families.FAMILIES if settings.targets in other.targets]
        raise SettingsError(
            f"targets '{settings.targets}' does not exist for {family.title}.",
            f"Choose one of: {', '.join(family.targets)}; or a base model of {titles_of(having_it)}.",
        )
    if settings.adapter == "full" and not family.trains_fully:
        training_fully = [other for other in families.FAMILIES if other.trains_fully]
        raise SettingsError(
            f"adapter 'full' (fine-tuning all weights) does not exist for {family.title}.",
            f"Choose lora, dora, loha or lokr, or a base model of {titles_of(training_fully)}.",
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
    return [path for path in chosen if not any(one.search(path) for one in settings.exclude_patterns)]


def _require_patterns_match(model: DiffusionModel, settings: AdapterSettings) -> None:
    """Refuse a pattern that no module of a trained network matches: it has a typing error."""
    trained = {UNET, *settings.text_rates}
    places = [place for place in modules_by_path(model) if place[0] in trained]
    unet = [path for component, path in places if component == UNET]
    patterns = {
        "include": (settings.include_patterns, unet),
        "exclude": (settings.exclude_patterns, [path for _, path in places]),
        "block_ranks": ([entry.pattern for entry in settings.ranks_by_block], [path for _, path in places]),
    }
    for name, (given, paths) in patterns.items():
        for pattern in given:
            if not any(pattern.search(path) for path in paths):
                raise SettingsError(
                    f"{name} '{pattern.pattern}' matches no layer.",
                    f"Layers are named like {unet[0]} and {unet[len(unet) // 2]}.",
                )


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
    smallest = min(len(module.weight), module.weight[0].numel())
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
    if adapter.vectors:
        raise AdapterError(
            f"The adapter to start from also changes biases or norms ({next(iter(adapter.vectors))}).",
            "Start from one that does not; such changes can't be trained on.",
        )
    modules, own = modules_by_name(model), own_names(model)
    layers: dict[str, Layer] = {}
    for name, layer in adapter.layers.items():
        module = modules.get(name)
        if module is None or not fits(layer, module.weight.shape):
            raise AdapterError(
                f"The adapter to start from has the module {name}, which this {model.family.title} model lacks or has "
                "in another shape.",
                "Start from an adapter that was trained on a model of this shape.",
            )
        layers[own[name]] = _with_unit_scale(layer) if isinstance(layer, LokrLayer) else layer
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
    targets = []
    for name, layer in start.layers.items():
        rank, alpha = layer.rank, layer.alpha
        if isinstance(layer, LokrLayer) and layer.is_whole and layer.w2 is not None:
            rank = max(layer.w2.shape[:2])  # at which PEFT makes whole factors, too
            alpha = float(rank)
        targets.append(Target(*places[name], name, rank, alpha))
    return sorted(targets, key=lambda target: (target.component != UNET, target.component, target.name))
