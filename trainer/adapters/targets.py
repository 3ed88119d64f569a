"""Which modules get an adapter, of which rank and alpha: the settings' patterns against a model's modules."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from ..core.errors import AdapterError, SettingsError, suggest
from ..models import families
from ..models.families import joined_titles
from ..models.families.base import DiffusionModel, Family
from ..settings.adapter import ROTATIONS, AdapterSettings
from .keys import embedding_names
from .kohya import Adapter
from .layers import Layer, LokrLayer, OftLayer, fits
from .layers.oft import block_size, butterfly_factors
from .module_paths import ModulePath
from .names import Adaptable, adapter_names, canonical_names, modules_by_name, modules_by_path, networks
from .prefixes import UNET

logger = logging.getLogger("dreambooth_lora")


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

    @property
    def module_path(self) -> ModulePath:
        """Component and path."""
        return ModulePath(self.component, self.path)


def choose_targets(model: DiffusionModel, settings: AdapterSettings) -> list[Target]:
    """The modules that the settings choose, the UNet's first, sorted by name.

    Raises:
        SettingsError: A setting belongs to another family, chooses nothing, or a rank does not fit a module.
    """
    require_family_fits(model.family, settings)
    _require_patterns_match(model, settings)
    names = adapter_names(model)
    modules = modules_by_path(model)
    targets: list[Target] = []
    for component in networks(model):
        if component != UNET and component not in settings.text_encoder_rates:
            continue
        paths = [path for path in modules if path.component == component]
        chosen = _chosen_paths(model.family, component, [path.path for path in paths], settings)
        component_targets = [
            _target(path, names[path], modules[path], settings) for path in paths if path.path in chosen
        ]
        trained = [target for target in component_targets if target.rank]
        if not trained:
            raise SettingsError(
                f"No layers of the {component} are left to train: {suggest('targets')}, {suggest('include')}, "
                f"{suggest('exclude')} and {suggest('block_ranks')} together select none.",
                _ways_to_more_layers(settings),
            )
        targets += sorted(trained, key=lambda target: target.name)
    for target in targets:
        _require_rank_fits(target, modules[target.module_path], settings)
    return targets


def _ways_to_more_layers(settings: AdapterSettings) -> str:
    """What to change of the settings that leave no layer, as an instruction."""
    ways = [f"choose different {suggest('targets')}"]
    if settings.exclude:
        ways.append(f"shorten {suggest('exclude')}")
    if settings.block_ranks:
        ways.append(f"raise the ranks in {suggest('block_ranks')}")
    text = " or ".join(ways)
    return f"{text[0].upper()}{text[1:]}."


def require_family_fits(family: Family, settings: AdapterSettings) -> None:
    """Check that no setting belongs to another family.

    Raises:
        SettingsError: Names the setting and what to choose.
    """
    text_encoders = {kind.name for kind in family.text_encoders}
    for component in settings.text_encoder_rates:
        if component not in text_encoders:
            raise SettingsError(
                f"{suggest(f'{component}_lr')} trains a text encoder that {family.title} does not have.",
                f"Set {suggest(f'{component}_lr', 0)}; the text encoder of {family.title} is trained by "
                f"{suggest('text_encoder_lr')}.",
            )
    if settings.text_encoder_rates and not family.text_targets:
        rate = f"{min(settings.text_encoder_rates)}_lr"
        raise SettingsError(
            f"{suggest(rate)} trains a text encoder, but {family.title}'s is a language model, which can't be trained.",
            f"Set {suggest(rate, 0)}.",
        )
    if settings.targets != "none" and settings.targets not in family.targets:
        fitting = [other for other in families.FAMILIES if settings.targets in other.targets]
        raise SettingsError(
            f"{suggest('targets', settings.targets)} is not available for {family.title}.",
            f"Choose {suggest('targets')} from: {', '.join(family.targets)}; or use a base model of "
            f"{joined_titles(fitting)}.",
        )
    if settings.adapter == "full" and not family.trains_fully:
        fitting = [other for other in families.FAMILIES if other.trains_fully]
        raise SettingsError(
            f"{suggest('adapter', 'full')} (fine-tuning all weights) is not available for {family.title}.",
            f"Choose lora, dora, loha, lokr, oft or boft for {suggest('adapter')}, or use a base model of "
            f"{joined_titles(fitting)}.",
        )


def _chosen_paths(family: Family, component: str, paths: Iterable[str], settings: AdapterSettings) -> set[str]:
    """Those of a network's paths that `targets`, `include` (for the UNet) and `exclude` choose."""
    if component == UNET:
        preset = family.targets.get(settings.targets, "(?!)")
        include = settings.include_patterns
    else:
        preset = family.text_targets.get(settings.targets, family.text_targets["attention-mlp"])
        include = []
    exclude = settings.exclude_patterns
    return {
        path
        for path in paths
        if (re.fullmatch(preset, path) or any(pattern.search(path) for pattern in include))
        and not any(pattern.search(path) for pattern in exclude)
    }


def _require_patterns_match(model: DiffusionModel, settings: AdapterSettings) -> None:
    """Refuse a pattern that no module of a trained network matches: it has a typing error."""
    trained = {UNET, *settings.text_encoder_rates}
    paths = [path for path in modules_by_path(model) if path.component in trained]
    all_paths = [path.path for path in paths]
    unet_paths = [path.path for path in paths if path.component == UNET]
    searched = [
        *(("include", pattern, unet_paths) for pattern in settings.include_patterns),
        *(("exclude", pattern, all_paths) for pattern in settings.exclude_patterns),
        *(("block_ranks", block.pattern, all_paths) for block in settings.ranks_by_block),
    ]
    for setting, pattern, searched_paths in searched:
        if not any(pattern.search(path) for path in searched_paths):
            raise SettingsError(
                f"{suggest(setting)} '{pattern.pattern}' matches no layers.",
                f"Layers are named like {unet_paths[0]} and {unet_paths[len(unet_paths) // 2]}.",
            )


def _target(path: ModulePath, name: str, module: Adaptable, settings: AdapterSettings) -> Target:
    _, rank, alpha = _rank_of(path.path, module, settings)
    if settings.adapter in ROTATIONS:
        alpha = 0.0  # no limit
        if rank:
            rank = block_size(len(module.weight), rank, butterfly=settings.adapter == "boft") or 1
    file_alpha = float(rank if alpha is None else alpha)
    if settings.rank_stabilized:
        file_alpha *= rank**0.5
    return Target(component=path.component, path=path.path, name=name, rank=rank, alpha=file_alpha)


def _rank_of(path: str, module: nn.Module, settings: AdapterSettings) -> tuple[str, int, float | None]:
    """The setting that a module's rank comes from, the rank, and the alpha (None: equal to the rank)."""
    chosen = ("rank", settings.rank, settings.alpha)
    has_kernel = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
    if has_kernel and (settings.conv_rank or settings.conv_alpha):
        setting = "conv_rank" if settings.conv_rank else "rank"
        chosen = (setting, settings.conv_rank or settings.rank, settings.conv_alpha)
    for block in settings.ranks_by_block:
        if block.pattern.search(path):
            chosen = ("block_ranks", block.rank, block.alpha)
    return chosen


def _require_rank_fits(target: Target, module: Adaptable, settings: AdapterSettings) -> None:
    """Refuse a rank above the size of a layer, or one below the smallest block of a rotation.

    LoKr takes whole factors for a higher rank, and a rotation the largest block.
    """
    if settings.adapter in ROTATIONS:
        if target.rank < 2:
            raise _small_blocks(target, module, settings)
        return
    smallest = min(len(module.weight), module.weight[0].numel())
    if target.rank > smallest and settings.adapter != "lokr":
        setting, _, _ = _rank_of(target.path, module, settings)
        if setting == "block_ranks":
            remedy = f"Set its rank to at most {smallest} in {suggest('block_ranks')}; 4 to 32 is usual."
        else:
            remedy = (
                f"Set {suggest(setting)} to at most {smallest}; 4 to 32 is usual. ({suggest('block_ranks')} sets it "
                "for parts of the model.)"
            )
        raise SettingsError(f"Rank {target.rank} is larger than the layer {target.path} ({smallest}).", remedy)


def _small_blocks(target: Target, module: Adaptable, settings: AdapterSettings) -> SettingsError:
    """The error for a rank with which a layer would have no block to rotate."""
    setting, rank, _ = _rank_of(target.path, module, settings)
    outputs, butterfly = len(module.weight), settings.adapter == "boft"
    sizes = (size for size in range(2, outputs + 1) if block_size(outputs, size, butterfly=butterfly))
    smallest = next(sizes)  # every layer has an even number of outputs, which is a block itself
    return SettingsError(
        f"Rank {rank} is below the smallest {settings.adapter.upper()} block for the layer {target.path} with "
        f"{outputs} outputs ({smallest}).",
        f"Set its rank to at least {smallest} in {suggest('block_ranks')}."
        if setting == "block_ranks"
        else f"Set {suggest(setting)} to at least {smallest}.",
    )


def fit_start_adapter(model: DiffusionModel, adapter: Adapter) -> Adapter:
    """An adapter to train on, under the names that this model's files have.

    A LoKr's scale goes into its factors, and a rotation's limit into its blocks.

    Raises:
        AdapterError: A module of it does not exist in the model, or is of another shape.
    """
    if adapter.vectors:
        raise AdapterError(
            f"The adapter to start from also changes biases or norms ({next(iter(adapter.vectors))}).",
            "Start from one that does not; training can't continue from these.",
        )
    lost = [name for name in embedding_names(adapter.embeddings) if name not in {word.word for word in model.words}]
    if lost:
        logger.warning(
            "The adapter to start from bundles embeddings, which will not be in the new file: %s", ", ".join(lost)
        )
    modules = modules_by_name(model)
    names = canonical_names(model)
    layers: dict[str, Layer] = {}
    for name, layer in adapter.layers.items():
        module = modules.get(name)
        if module is None or not fits(layer, module.weight.shape):
            raise AdapterError(
                f"The adapter to start from has the module {name}, which this {model.family.title} model lacks or has "
                "with another shape.",
                "Start from an adapter trained on a model of this size.",
            )
        if isinstance(layer, LokrLayer):
            layer = _with_unit_scale(layer)
        if isinstance(layer, OftLayer):
            layer = _without_limit(name, layer)
        layers[names[name]] = layer
    return replace(adapter, layers=layers, embeddings={})


def _with_unit_scale(layer: LokrLayer) -> LokrLayer:
    """The same LoKr with alpha equal to its rank: the scale is multiplied into the smaller factor."""
    if layer.is_whole or layer.alpha == layer.rank:
        return replace(layer, alpha=float(layer.rank))
    scale = layer.alpha / layer.rank
    if layer.w1 is not None:
        return replace(layer, w1=layer.w1 * scale, alpha=float(layer.rank))
    assert layer.w1_a is not None
    return replace(layer, w1_a=layer.w1_a * scale, alpha=float(layer.rank))


def _without_limit(name: str, layer: OftLayer) -> OftLayer:
    """The same rotation without a limit of its own.

    Raises:
        AdapterError: It is of a form that is not trained here.
    """
    if layer.rescale is not None:
        raise AdapterError(
            f"The adapter to start from also rescales the outputs of the module {name}, which is not supported in "
            "training.",
            "Start from one without 'rescale'.",
        )
    if layer.kind == "BOFT" and len(layer.blocks) != butterfly_factors(layer.shape[0], layer.rank):
        raise AdapterError(
            f"The adapter to start from has {len(layer.blocks)} butterfly factors for the module {name}, but "
            f"{butterfly_factors(layer.shape[0], layer.rank)} are needed here.",
            "Start from one with the number of factors that LyCORIS uses.",
        )
    return layer.without_limit()


def targets_of_adapter(model: DiffusionModel, start: Adapter) -> list[Target]:
    """The modules, ranks and alphas of an adapter from `fit_start_adapter`."""
    paths = {name: path for path, name in adapter_names(model).items()}
    targets = []
    for name, layer in start.layers.items():
        path = paths[name]
        rank = layer.rank
        alpha = layer.alpha
        if isinstance(layer, LokrLayer) and layer.is_whole and layer.w2 is not None:
            rank = max(layer.w2.shape[:2])  # at which PEFT makes whole factors, too
            alpha = float(rank)
        targets.append(Target(component=path.component, path=path.path, name=name, rank=rank, alpha=alpha))
    return sorted(targets, key=lambda target: (target.component != UNET, target.component, target.name))
