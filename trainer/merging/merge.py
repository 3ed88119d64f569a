"""Merge several adapters into one, module by module, with one module's deltas in memory at a time.

`methods` holds the methods, `deltas` the arithmetic, `report` the report of the result.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..adapters.kohya import Adapter
from ..adapters.layers import FullLayer, Layer, LohaLayer, LokrLayer, LoraLayer, OftLayer, fits
from ..adapters.metadata import MERGE_KEY, derived_metadata
from ..adapters.module_paths import module_path
from ..adapters.names import family_of, is_3x3_convolution, shown_family, weight_shape, with_kohya_names
from ..adapters.prefixes import UNET
from ..core.errors import AdapterError, SettingsError, suggest
from ..core.events import Listener, Phase, SilentListener, stop_if_asked
from ..settings.merge import BlockWeight, MergeSettings, TruncationSettings
from .deltas import Delta, Truncation, to_delta, to_layer, truncate
from .methods import METHODS, MergeOptions, column_scaled
from .report import MergeReport, ModuleReport, compare_with_inputs, overlap_warnings

CPU = torch.device("cpu")
LayerT = TypeVar("LayerT", bound=Layer)


@dataclass(frozen=True)
class WeightedAdapter:
    """One of the adapters to merge.

    Attributes:
        adapter: The adapter.
        title: Its display name, unique.
        strength: Of its modules in the UNet.
        text_strength: Of its modules in the text encoders.
        blocks: Further factors for parts of the model; the last whose pattern matches a module's path counts.
    """

    adapter: Adapter
    title: str
    strength: float = 1.0
    text_strength: float = 1.0
    blocks: Sequence[BlockWeight] = ()

    def module_strength(self, name: str) -> float:
        """The strength of a module, by its kohya name."""
        path = module_path(name)
        strength = self.strength if path.component == UNET else self.text_strength
        factors = [block.factor for block in self.blocks if block.pattern.search(str(path))]
        return strength * (factors[-1] if factors else 1.0)


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge, and what it keeps of the adapters."""

    adapter: Adapter
    report: MergeReport


def merge(
    adapters: Sequence[WeightedAdapter],
    settings: MergeSettings,
    weights: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    listener: Listener | None = None,
    *,
    columns: Mapping[str, Sequence[Tensor]] | None = None,
) -> MergeResult:
    """Merge adapters into one.

    Args:
        adapters: The adapters with their strengths; a single one is scaled and, depending on the method, truncated.
        settings: Method and size.
        weights: The base model's weights by the modules' kohya names, for DoRA and OFT, and for convolutions whose
            kernel is not known from the adapters.
        device: Where to compute; None for the CPU.
        listener: Gets the progress; may stop the merge.
        columns: Kohya name → for each adapter with the module, a coefficient of each input, (in,): these modules
            are merged by `methods.column_scaled`, whatever the method of the others.

    Raises:
        SettingsError: There is nothing to merge, or a block weight pattern matches no modules.
        AdapterError: The adapters are for different families, have no modules in common, differ in shape, or need
            weights.
        NotFiniteError: Strengths or adapters give NaN or infinite values.
        CancelledError: The listener asked to stop.
    """
    listener = listener or SilentListener()
    device = device or CPU
    weights = weights or {}
    adapters, warnings = with_common_names(adapters)
    names = sorted({name for weighted in adapters for name in weighted.adapter.layers})
    _require_patterns_match(adapters, names)
    _require_weights(adapters, settings, weights)
    layers: dict[str, Layer] = {}
    module_reports: list[ModuleReport] = []
    for number, name in enumerate(names):
        if number % 16 == 0:
            listener.report(Phase("merging", number, len(names)))
            stop_if_asked(listener)
        inputs = _ModuleInputs.of(name, adapters, weights)
        layers[name], module_report = _merge_module(inputs, settings, device, (columns or {}).get(name))
        module_reports.append(module_report)
    listener.report(Phase("merging", len(names), len(names)))
    titles = [weighted.title for weighted in adapters]
    method = "learned" if columns else settings.method
    warnings = [*warnings, *overlap_warnings(module_reports, titles)]
    metadata = _metadata(adapters, method, settings, layers)
    merged = Adapter(
        layers, metadata, _merged_vectors(adapters), merged_embeddings([weighted.adapter for weighted in adapters])
    )
    return MergeResult(merged, MergeReport(titles, method, module_reports, warnings))


@dataclass(frozen=True)
class _ModuleInputs:
    """What is merged into one module.

    Attributes:
        name: kohya's.
        layers: Index of an adapter that has the module → its layer.
        strengths: The same indices → strength of the layer.
        weight: The module's weight; None where it is not needed.
    """

    name: str
    layers: Mapping[int, Layer]
    strengths: Mapping[int, float]
    weight: Tensor | None

    @classmethod
    def of(cls, name: str, adapters: Sequence[WeightedAdapter], weights: Mapping[str, Tensor]) -> _ModuleInputs:
        """Gather one module's layers, and its weight where it is needed."""
        having = {index: weighted for index, weighted in enumerate(adapters) if name in weighted.adapter.layers}
        layers = {index: weighted.adapter.layers[name] for index, weighted in having.items()}
        strengths = {index: weighted.module_strength(name) for index, weighted in having.items()}
        return cls(name, layers, strengths, weight_if_needed(name, list(layers.values()), weights))

    def deltas(self, device: torch.device) -> dict[int, Delta]:
        """Index of the adapter → what its layer adds at strength 1, float32 on the device.

        Raises:
            AdapterError: The layers are of different shapes.
        """
        shape = weight_shape(self.name, list(self.layers.values()), self.weight)
        return {
            index: to_delta(layer_to_device(layer, device), shape, self.weight) for index, layer in self.layers.items()
        }


def _merge_module(
    inputs: _ModuleInputs, settings: MergeSettings, device: torch.device, columns: Sequence[Tensor] | None
) -> tuple[Layer, ModuleReport]:
    """One module's layer, on the CPU, and what it keeps of its inputs."""
    if len(inputs.layers) == 1 and not settings.truncates and columns is None:
        [(index, layer)] = inputs.layers.items()
        same_kind = scale_layer(layer, inputs.strengths[index])
        if same_kind is not None:  # and needs no weight
            return same_kind, ModuleReport.untouched(inputs.name, index, same_kind.rank)
    deltas = inputs.deltas(device)
    scaled_deltas = {
        index: delta.times(inputs.strengths[index]).require_finite(inputs.name) for index, delta in deltas.items()
    }
    weighted_deltas = [(delta, inputs.strengths[index]) for index, delta in deltas.items()]
    if columns is not None:
        result = column_scaled(weighted_deltas, columns)
    else:
        options = MergeOptions(
            density=settings.density, protected=settings.protected, seed=settings.seed, name=inputs.name
        )
        result = METHODS[settings.method](weighted_deltas, options)
    if settings.truncates:
        result = truncate(result.require_finite(inputs.name), truncation_for(settings, result.shape))
    is_sum = settings.method == "sum" and columns is None
    report = compare_with_inputs(inputs.name, scaled_deltas, result, is_sum=is_sum)
    return layer_to_device(to_layer(result.require_finite(inputs.name)), CPU), report


def weight_if_needed(name: str, layers: Sequence[Layer], weights: Mapping[str, Tensor]) -> Tensor | None:
    """A module's weight where its layers need it or lack the kernel; else None, since a host's is costly to read."""
    plain = all(isinstance(layer, LoraLayer) and not layer.needs_weight for layer in layers)
    return None if plain and not is_3x3_convolution(name) else weights.get(name)


def truncation_for(settings: TruncationSettings, shape: Sequence[int]) -> Truncation:
    """The limits for a weight of that shape, (out, in) or (out, in, k, k)."""
    has_kernel = len(shape) > 2 and max(shape[2:]) > 1
    rank = settings.conv_rank if has_kernel and settings.conv_rank else settings.rank
    return Truncation(rank=rank or None, energy=settings.energy, ratio=settings.ratio or None)


def scale_layer(layer: Layer, factor: float) -> Layer | None:
    """The layer times a factor, of the same type; None if its delta is not proportional to any of its tensors."""
    if factor == 1:
        return layer
    if factor == 0 and len(layer.shape) > 1:  # not by alpha 0, which kohya and LyCORIS read as "the rank"
        outputs, inputs, *kernel = layer.shape
        down = torch.zeros(1, inputs, *kernel)
        up = torch.zeros(outputs, 1, *[1] * len(kernel))
        return LoraLayer(down, up, alpha=1.0)
    if factor == 0 and isinstance(layer, OftLayer):  # which does not know the inputs
        return OftLayer(torch.zeros_like(layer.blocks), layer.alpha or 1.0)
    if layer.needs_weight:
        return None
    if isinstance(layer, FullLayer):
        return FullLayer(layer.diff.float() * factor)
    if isinstance(layer, LokrLayer) and layer.is_whole and layer.w1 is not None:
        return replace(layer, w1=layer.w1.float() * factor)
    assert isinstance(layer, LoraLayer | LohaLayer | LokrLayer)
    return replace(layer, alpha=layer.alpha * factor)


def with_common_names(adapters: Sequence[WeightedAdapter]) -> tuple[list[WeightedAdapter], list[str]]:
    """The adapters with kohya's names of one family for their modules, and warnings for the user.

    Raises:
        SettingsError: There are none.
        AdapterError: They are for different families, or have nothing in common.
    """
    if not adapters:
        raise SettingsError(
            "There are no adapters to merge.", "Specify at least one adapter file, such as dog.safetensors."
        )
    families = [(weighted.title, family_of(weighted.adapter)) for weighted in adapters]
    shown = [(weighted.title, shown_family(weighted.adapter)) for weighted in adapters]
    if len({family for _, family in shown} - {None}) > 1:
        raise _different_families([(title, family.short_title if family else None) for title, family in shown])
    renamed = with_kohya_names([weighted.adapter for weighted in adapters])
    named = [replace(weighted, adapter=adapter) for weighted, adapter in zip(adapters, renamed, strict=True)]
    warnings = [*_warnings_of_no_effect(named), *_warnings_of_different_bases(named)]
    common = set.intersection(*(set(weighted.adapter.layers) for weighted in named))
    if len({family for _, family in families if family}) > 1:  # only their metadata say so
        if not common or not all(_fit_each_other(name, named) for name in common):
            raise _different_families(families)
        listed = _listed(families)
        warnings.append(f"The adapters' metadata names different families ({listed}), but their modules match.")
    if len(named) > 1 and not common:
        if any(family is None for _, family in families):
            examples = " and ".join(next(iter(weighted.adapter.layers), "nothing") for weighted in named[:2])
            raise AdapterError(
                f"The adapters have no modules in common: they change {examples}, for example.",
                "Merge adapters made for the same model family.",
            )
        warnings.append("The adapters have no modules in common, so the result simply contains all of them.")
    return named, warnings


def _different_families(families: Sequence[tuple[str, str | None]]) -> AdapterError:
    return AdapterError(
        f"The adapters are for different model families: {_listed(families)}.", "Merge adapters for the same family."
    )


def _listed(families: Sequence[tuple[str, str | None]]) -> str:
    """Titles of adapters with their families, as far as these are known."""
    return ", ".join(f"{title} is for {family}" for title, family in families if family)


def _fit_each_other(name: str, adapters: Sequence[WeightedAdapter]) -> bool:
    """Whether the layers that adapters have for a module are of one shape."""
    layers = [weighted.adapter.layers[name] for weighted in adapters if name in weighted.adapter.layers]
    largest = max((layer.shape for layer in layers), key=len)
    return all(fits(layer, largest) for layer in layers)


def _warnings_of_no_effect(adapters: Sequence[WeightedAdapter]) -> list[str]:
    """A warning for each adapter whose strength leaves nothing of it."""
    warnings = []
    for weighted in adapters:
        modules = [*weighted.adapter.layers, *(key.rpartition(".")[0] for key in weighted.adapter.vectors)]
        if not any(weighted.module_strength(name) for name in modules):
            warnings.append(f"{weighted.title} has strength 0, so it has no effect.")
    return warnings


def _warnings_of_different_bases(adapters: Sequence[WeightedAdapter]) -> list[str]:
    """A warning if the metadata name different base models."""
    bases = {weighted.adapter.metadata.get("ss_sd_model_name", "") for weighted in adapters} - {"", "None"}
    if len(bases) < 2:
        return []
    listed = ", ".join(sorted(bases))
    return [f"The adapters were trained on different base models ({listed}), so the result may be weaker."]


def _require_patterns_match(adapters: Sequence[WeightedAdapter], names: Iterable[str]) -> None:
    """Refuse a pattern of block weights that is found nowhere: it has a typing error."""
    paths = [str(module_path(name)) for name in names] or ["unet.mid_block.resnets.0.conv1"]
    for weighted in adapters:
        for block in weighted.blocks:
            if not any(block.pattern.search(path) for path in paths):
                examples = " or ".join(sorted({paths[0], paths[-1]}))
                raise SettingsError(
                    f"The block weight '{block.pattern.pattern}' of {weighted.title} matches no modules.",
                    f"Use part of a module's path; paths look like {examples}.",
                )


def _require_weights(
    adapters: Sequence[WeightedAdapter], settings: MergeSettings, weights: Mapping[str, Tensor]
) -> None:
    """Refuse, before anything is computed, layers that need a weight that is not there."""
    adapters_by_module = Counter(name for weighted in adapters for name in weighted.adapter.layers)
    for weighted in adapters:
        for name, layer in weighted.adapter.layers.items():
            if not layer.needs_weight or name in weights:
                continue
            is_alone = adapters_by_module[name] == 1 and not settings.truncates
            if is_alone and weighted.module_strength(name) in (0, 1):
                continue  # it stays as it is, or is left out
            raise AdapterError(
                f"{weighted.title} is of type {layer.kind}, which depends on the base model's weights, but none "
                f"was given for {name}.",
                f"Provide the base model that the adapter was made for ({suggest('base')}).",
            )


def require_layers_fit(adapters: Sequence[WeightedAdapter], weights: Mapping[str, Tensor]) -> None:
    """Check that every layer has a weight of its shape.

    Args:
        adapters: From `with_common_names`.
        weights: The base model's, by the modules' kohya names.

    Raises:
        AdapterError: One has none; names it.
    """
    for weighted in adapters:
        for name, layer in weighted.adapter.layers.items():
            if name in weights and fits(layer, weights[name].shape):
                continue
            difference = f"has with shape {tuple(weights[name].shape)}" if name in weights else "does not have"
            raise AdapterError(
                f"{weighted.title} changes {name} of shape {layer.shape}, which the base model {difference}.",
                "Use a base model of the family that the adapter was made for.",
            )


def _merged_vectors(adapters: Sequence[WeightedAdapter]) -> dict[str, Tensor]:
    """The weighted sum of what is added to biases and norms."""
    sums: dict[str, Tensor] = {}
    for weighted in adapters:
        for key, vector in weighted.adapter.vectors.items():
            scaled = vector.float() * weighted.module_strength(key.rpartition(".")[0])
            if key in sums and sums[key].shape != scaled.shape:
                raise AdapterError(
                    f"{key} has {len(scaled)} values in {weighted.title} and {len(sums[key])} in another adapter.",
                    "Merge adapters made for models of the same size.",
                )
            sums[key] = sums[key] + scaled if key in sums else scaled
    return sums


def merged_embeddings(adapters: Iterable[Adapter]) -> dict[str, Tensor]:
    """The adapters' bundled embeddings, unchanged: strengths do not affect them.

    Raises:
        AdapterError: Two adapters contain different ones with the same name.
    """
    embeddings: dict[str, Tensor] = {}
    for adapter in adapters:
        for key, tensor in adapter.embeddings.items():
            other = embeddings.setdefault(key, tensor)
            if other.shape != tensor.shape or not torch.equal(other, tensor):
                raise AdapterError(
                    f"Two of the adapters contain different embeddings with the same name: {key}.",
                    "Use only one of the two.",
                )
    return embeddings


def _metadata(
    adapters: Sequence[WeightedAdapter], method: str, settings: MergeSettings, layers: Mapping[str, Layer]
) -> dict[str, str]:
    """Provenance: what was merged, how, and what readers look for."""
    inputs = [
        {
            "title": weighted.title,
            "hash": weighted.adapter.metadata.get("sshs_model_hash", ""),
            "strength": weighted.strength,
            "text_strength": weighted.text_strength,
            "blocks": {block.pattern.pattern: block.factor for block in weighted.blocks},
        }
        for weighted in adapters
    ]
    used = {name: value for name, value in settings.model_dump(mode="json").items() if name in settings.used_settings}
    sources = [weighted.adapter for weighted in adapters]
    titles = [weighted.title for weighted in adapters]
    provenance = json.dumps({"inputs": inputs, **used, "method": method}, sort_keys=True)
    return derived_metadata(sources, titles, layers) | {MERGE_KEY: provenance}


def resize(
    adapter: WeightedAdapter,
    settings: TruncationSettings,
    weights: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    listener: Listener | None = None,
) -> MergeResult:
    """Convert an adapter of any type to a LoRA of another rank; arguments and errors are those of `merge`."""
    limits = {name: getattr(settings, name) for name in TruncationSettings.model_fields}
    return merge([adapter], MergeSettings(method="svd", **limits), weights, device, listener)


def layer_to_device(layer: LayerT, device: torch.device) -> LayerT:
    """The layer with its tensors on a device."""
    if device.type == "cpu" and all(tensor.device.type == "cpu" for tensor in layer.tensors().values()):
        return layer
    dataclass_layer: Any = layer  # the protocol does not say that layers are dataclasses
    moved = {name: value.to(device) for name, value in vars(layer).items() if isinstance(value, Tensor)}
    return cast(LayerT, replace(dataclass_layer, **moved))
