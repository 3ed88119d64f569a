"""Several adapters become one: `merge` goes through them module by module, so that memory for one module suffices.

`merge_methods` holds the methods, `changes` the arithmetic, `merge_report` what is told about the result.
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
from ..adapters.layers import DifferenceLayer, Layer, LohaLayer, LokrLayer, LoraLayer, fits
from ..adapters.metadata import MERGE_KEY, derived_metadata
from ..adapters.names import family_of, is_convolution, module_path, weight_shape, with_kohya_names
from ..core.errors import AdapterError, SettingsError
from ..core.events import Listener, Phase, SilentListener, stop_if_asked
from ..settings.merge import BlockWeight, MergeSettings, ReductionSettings
from .deltas import Delta, Truncation, to_delta, to_layer, truncate
from .methods import METHODS, MergeOptions, column_scaled
from .report import ModuleReport, Report, compare_with_inputs, overlap_warnings

LayerT = TypeVar("LayerT", bound=Layer)


@dataclass(frozen=True)
class WeightedAdapter:
    """One of the adapters to merge.

    Attributes:
        adapter: The adapter.
        title: Its name for people, unlike the others'.
        strength: Of its part for the UNet.
        text_strength: Of its part for the text encoders.
        blocks: Further factors of parts of the model; the last whose pattern is found in a module's place counts.
    """

    adapter: Adapter
    title: str
    strength: float = 1.0
    text_strength: float = 1.0
    blocks: Sequence[BlockWeight] = ()

    def weight(self, name: str) -> float:
        """The strength of a module, by its kohya name."""
        place = module_path(name)
        weight = self.strength if place.component == "unet" else self.text_strength
        factors = [block.factor for block in self.blocks if block.pattern.search(str(place))]
        return weight * (factors[-1] if factors else 1.0)


@dataclass(frozen=True)
class Merged:
    """The result of a merge, and what it keeps of the adapters."""

    adapter: Adapter
    report: Report


def merge(
    parts: Sequence[WeightedAdapter],
    settings: MergeSettings,
    weights: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    listener: Listener | None = None,
    *,
    columns: Mapping[str, Sequence[Tensor]] | None = None,
) -> Merged:
    """Merge adapters into one.

    Args:
        parts: The adapters with their strengths; one is scaled and, if the method says so, reduced.
        settings: Method and size.
        weights: The base model's weights by the modules' kohya names, for DoRA and OFT, and for convolutions whose
            kernel no adapter tells.
        device: Where to compute; None for the CPU.
        listener: Told of the progress; may stop the merge.
        columns: Kohya name → for each adapter that has the module a coefficient of each input, (in,): these modules
            are merged as `merge_methods.column_scaled` does, by whatever method the others are.

    Raises:
        SettingsError: There is nothing to merge, or a pattern of block weights fits no module.
        AdapterError: The adapters are of different families, have no module or no shape in common, or need weights.
        CancelledError: The listener asked to stop.
    """
    listener, device = listener or SilentListener(), device or torch.device("cpu")
    parts, warnings = aligned(parts)
    known = weights or {}
    names = sorted({name for part in parts for name in part.adapter.layers})
    _require_patterns_match(parts, names)
    _require_weights(parts, settings, known)
    layers: dict[str, Layer] = {}
    modules: list[ModuleReport] = []
    for number, name in enumerate(names):
        if number % 16 == 0:
            listener.report(Phase("merging", number, len(names)))
            stop_if_asked(listener)
        module = _Module.of(name, parts, known, device)
        layers[name], row = _merged(module, settings, (columns or {}).get(name))
        modules.append(row)
    listener.report(Phase("merging", len(names), len(names)))
    titles = [part.title for part in parts]
    method = "learned" if columns else settings.method
    report = Report(titles, method, modules, [*warnings, *overlap_warnings(modules, titles)])
    return Merged(Adapter(layers, _metadata(parts, method, settings, layers), _vectors(parts)), report)


@dataclass(frozen=True)
class _Module:
    """What is merged into one module."""

    name: str
    layers: Sequence[Layer]
    strengths: Sequence[float]
    indices: Sequence[int]
    weight: Tensor | None
    device: torch.device

    @classmethod
    def of(
        cls, name: str, parts: Sequence[WeightedAdapter], weights: Mapping[str, Tensor], device: torch.device
    ) -> _Module:
        """Gather one module's layers, and its weight where it tells something."""
        present = [index for index, part in enumerate(parts) if name in part.adapter.layers]
        layers = [parts[index].adapter.layers[name] for index in present]
        weight = needed_weight(name, layers, weights)
        return cls(name, layers, [parts[index].weight(name) for index in present], present, weight, device)

    def changes(self) -> list[Delta]:
        """What each layer adds at strength 1, float32.

        Raises:
            AdapterError: The layers are of different shapes.
        """
        shape = weight_shape(self.name, self.layers, self.weight)
        return [to_delta(on_device(layer, self.device), shape, self.weight) for layer in self.layers]


def _merged(module: _Module, settings: MergeSettings, columns: Sequence[Tensor] | None) -> tuple[Layer, ModuleReport]:
    """One module's layer, and what it keeps."""
    if len(module.layers) == 1 and not settings.reduces and columns is None:
        kept = scaled(module.layers[0], module.strengths[0])
        if kept is not None:  # of its own kind, and without a weight where none is needed
            return kept, ModuleReport.untouched(module.name, module.indices[0], kept.rank)
    weighted = list(zip(module.changes(), module.strengths, strict=True))
    if columns is not None:
        result = column_scaled(weighted, columns)
    else:
        choice = MergeOptions(settings.density, settings.protected, settings.seed, module.name)
        result = METHODS[settings.method](weighted, choice)
    if settings.reduces:
        result = truncate(result, cut_for(settings, result.shape))
    exact = settings.method == "sum" and columns is None
    row = compare_with_inputs(module.name, weighted, module.indices, result, exact=exact)
    return on_device(to_layer(result), torch.device("cpu")), row


def needed_weight(name: str, layers: Sequence[Layer], weights: Mapping[str, Tensor]) -> Tensor | None:
    """A module's weight, where its layers need it or don't tell the kernel; a host's is costly to read."""
    plain = all(isinstance(layer, LoraLayer) and not layer.needs_weight for layer in layers)
    return None if plain and not is_convolution(name) else weights.get(name)


def cut_for(settings: ReductionSettings, shape: Sequence[int]) -> Truncation:
    """The limits for a weight of that shape, (out, in) or (out, in, k, k)."""
    large = len(shape) > 2 and max(shape[2:]) > 1
    return Truncation((large and settings.conv_rank) or settings.rank or None, settings.energy, settings.ratio or None)


def scaled(layer: Layer, factor: float) -> Layer | None:
    """The layer times a factor, of the same kind; None for a kind that is not proportional to a number of its own."""
    if factor == 1:
        return layer
    if factor == 0 and len(layer.shape) > 1:  # not by alpha 0, which kohya and LyCORIS read as "the rank"
        out, inside, *kernel = layer.shape
        return LoraLayer(torch.zeros(1, inside, *kernel), torch.zeros(out, 1, *[1] * len(kernel)), 1.0)
    if layer.needs_weight:
        return None
    if isinstance(layer, DifferenceLayer):
        return DifferenceLayer(layer.diff.float() * factor)
    if isinstance(layer, LokrLayer) and layer.is_whole and layer.w1 is not None:
        return replace(layer, w1=layer.w1.float() * factor)
    assert isinstance(layer, LoraLayer | LohaLayer | LokrLayer)
    return replace(layer, alpha=layer.alpha * factor)


def aligned(parts: Sequence[WeightedAdapter]) -> tuple[list[WeightedAdapter], list[str]]:
    """The parts with their modules under kohya's names of one family, and what should be warned of.

    Raises:
        SettingsError: There are none.
        AdapterError: They are of different families, or have nothing in common.
    """
    if not parts:
        raise SettingsError(
            "There are no adapters to merge.", "Give at least one adapter file, such as dog.safetensors."
        )
    families = [(part.title, family_of(part.adapter)) for part in parts]
    found = sorted({family for _, family in families if family})
    if len(found) > 1:
        told = ", ".join(f"{title} is for {family}" for title, family in families if family)
        raise AdapterError(f"The adapters are of different families: {told}.", "Merge adapters of the same family.")
    adapters = with_kohya_names([part.adapter for part in parts])
    named = [replace(part, adapter=adapter) for part, adapter in zip(parts, adapters, strict=True)]
    warnings = [_different_bases(named)]
    common = set.intersection(*(set(part.adapter.layers) for part in named))
    if len(named) > 1 and not common:
        if any(family is None for _, family in families):
            names = " and ".join(next(iter(part.adapter.layers), "nothing") for part in named[:2])
            raise AdapterError(
                f"The adapters have no module in common: they change {names}, for example.",
                "Merge adapters that were made for the same family of models.",
            )
        warnings.append("The adapters have no module in common, so the result is all of them side by side.")
    return named, [text for text in warnings if text]


def _different_bases(parts: Sequence[WeightedAdapter]) -> str:
    """A warning if the metadata name different base models."""
    bases = {part.adapter.metadata.get("ss_sd_model_name", "") for part in parts} - {"", "None"}
    if len(bases) < 2:
        return ""
    return f"The adapters were trained on different base models ({', '.join(sorted(bases))}): the result may be weaker."


def _require_patterns_match(parts: Sequence[WeightedAdapter], names: Iterable[str]) -> None:
    """Refuse a pattern of block weights that is found nowhere: it has a typing error."""
    places = [str(module_path(name)) for name in names] or ["unet.mid_block.resnets.0.conv1"]
    for part in parts:
        for block in part.blocks:
            if not any(block.pattern.search(place) for place in places):
                raise SettingsError(
                    f"The block weight '{block.pattern.pattern}' of {part.title} matches no module.",
                    f"Write a part of a module's path, such as that of {' or '.join(sorted({places[0], places[-1]}))}.",
                )


def _require_weights(parts: Sequence[WeightedAdapter], settings: MergeSettings, weights: Mapping[str, Tensor]) -> None:
    """Refuse, before anything is computed, layers that need a weight that is not there."""
    holders = Counter(name for part in parts for name in part.adapter.layers)
    for part in parts:
        for name, layer in part.adapter.layers.items():
            stays = holders[name] == 1 and not settings.reduces and part.weight(name) in (0, 1)
            if layer.needs_weight and name not in weights and not stays:
                raise AdapterError(
                    f"{part.title} is of the kind {layer.kind}: what it adds depends on the base model's weights, and "
                    f"there is none for {name}.",
                    "Give the base model (--base, or the node's input model) that the adapter was made for.",
                )


def require_layers_fit(parts: Sequence[WeightedAdapter], weights: Mapping[str, Tensor]) -> None:
    """Check that every layer has a weight of its shape.

    Args:
        parts: From `aligned`.
        weights: The base model's, by the modules' kohya names.

    Raises:
        AdapterError: One has none; names it.
    """
    for part in parts:
        for name, layer in part.adapter.layers.items():
            if name not in weights or not fits(layer, weights[name].shape):
                found = f"in the shape {tuple(weights[name].shape)}" if name in weights else "not"
                raise AdapterError(
                    f"{part.title} changes {name} of the shape {layer.shape}, which the base model has {found}.",
                    "Use the base model's family that the adapter was made for.",
                )


def _vectors(parts: Sequence[WeightedAdapter]) -> dict[str, Tensor]:
    """The weighted sum of what is added to biases and norms."""
    found: dict[str, Tensor] = {}
    for part in parts:
        for name, vector in part.adapter.vectors.items():
            change = vector.float() * part.weight(name.rpartition(".")[0])
            if name in found and found[name].shape != change.shape:
                raise AdapterError(
                    f"{name} has {len(change)} numbers in {part.title} and {len(found[name])} in another adapter.",
                    "Merge adapters that were made for models of the same shape.",
                )
            found[name] = found[name] + change if name in found else change
    return found


def _metadata(
    parts: Sequence[WeightedAdapter], method: str, settings: MergeSettings, layers: Mapping[str, Layer]
) -> dict[str, str]:
    """Provenance: what was merged, how, and what readers look for."""
    sources = [
        {
            "title": part.title,
            "hash": part.adapter.metadata.get("sshs_model_hash", ""),
            "strength": part.strength,
            "text_strength": part.text_strength,
            "blocks": {block.pattern.pattern: block.factor for block in part.blocks},
        }
        for part in parts
    ]
    used = {name: value for name, value in settings.model_dump(mode="json").items() if name in settings.used}
    return derived_metadata([part.adapter for part in parts], [part.title for part in parts], layers) | {
        MERGE_KEY: json.dumps({"inputs": sources, **used, "method": method}, sort_keys=True)
    }


def resize(
    part: WeightedAdapter,
    settings: ReductionSettings,
    weights: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    listener: Listener | None = None,
) -> Merged:
    """Bring an adapter of any kind to another size, as a LoRA; arguments and errors are those of `merge`."""
    chosen = {name: getattr(settings, name) for name in ReductionSettings.model_fields}
    return merge([part], MergeSettings(method="svd", **chosen), weights, device, listener)


def on_device(layer: LayerT, device: torch.device) -> LayerT:
    """The layer with its tensors on a device."""
    if device.type == "cpu" and all(tensor.device.type == "cpu" for tensor in layer.tensors().values()):
        return layer
    moved: Any = layer
    fields = {name: value.to(device) for name, value in vars(layer).items() if isinstance(value, Tensor)}
    return cast(LayerT, replace(moved, **fields))
