"""LoRA out of changed weights: the nearest change of a given rank, module by module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..adapters.kohya import Adapter
from ..adapters.layers import Layer
from ..adapters.names import adaptable_modules, canonical_path
from ..adapters.targets import Target
from ..core.errors import AdapterError
from ..core.events import Listener, Phase, SilentListener, stop_if_asked
from ..models.families.base import BaseWeights
from ..settings.merge import ExtractSettings
from .deltas import Delta, nearest_lora, to_layer, truncate
from .merge import MergeResult, layer_to_device, truncation_for
from .report import MergeReport, compare_with_inputs


def extract_lora(
    base: BaseWeights, changed: Mapping[str, Tensor], targets: list[Target], metadata: Mapping[str, str]
) -> Adapter:
    """What fine-tuning changed in the weights of Linear layers and convolutions, as a LoRA.

    Args:
        base: The base model.
        changed: "<component>.<parameter>" → tuned tensor.
        targets: The modules to extract, with their ranks.
        metadata: Of the adapter.
    """
    modules = adaptable_modules(base.family.build(base))
    tuned = {_canonical_name(name): tensor for name, tensor in changed.items()}
    layers = {}
    for target in targets:
        name = f"{target.component}.{target.path}.weight"
        weight = modules[target.component][target.path].weight
        layers[target.name] = nearest_lora(tuned[name].float() - weight.float().cpu(), target.rank)
    return Adapter(layers, metadata)


def _canonical_name(name: str) -> str:
    """The name "<component>.<parameter>", whichever version of transformers built the text encoder."""
    component, _, parameter = name.partition(".")
    return f"{component}.{canonical_path(component, parameter)}"


def extract_between(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    settings: ExtractSettings,
    device: torch.device | None = None,
    listener: Listener | None = None,
) -> MergeResult:
    """The difference of two models as a LoRA.

    Args:
        base: Weights by the modules' kohya names, of the model that was tuned; 1-D ones and "<module>.bias" count for
            `settings.biases` alone.
        tuned: As `base`, of the tuned model.
        settings: Size, and whether biases count.
        device: Where to compute; None for the CPU.
        listener: Told of the progress; may stop the work.

    Raises:
        AdapterError: The models have different layers, or don't differ.
        CancelledError: The listener asked to stop.
    """
    listener, device = listener or SilentListener(), device or torch.device("cpu")
    for name in sorted(base.keys() ^ tuned.keys()):
        raise _different_layers(name, base.get(name), tuned.get(name))
    layers: dict[str, Layer] = {}
    vectors: dict[str, Tensor] = {}
    modules = []
    for number, name in enumerate(sorted(base)):
        if number % 16 == 0:
            listener.report(Phase("extracting", number, len(base)))
            stop_if_asked(listener)
        before, after = base[name].to(device), tuned[name].to(device)  # each is read once: a host's is costly
        if before.shape != after.shape:
            raise _different_layers(name, before, after)
        change = _difference(before, after)
        if change is None:
            continue
        if change.ndim == 1:
            if settings.biases:
                vectors[f"{name.removesuffix('.bias')}.{'diff_b' if name.endswith('.bias') else 'diff'}"] = change.cpu()
            continue
        whole = Delta(tuple(change.shape), change.flatten(1))
        kept = truncate(whole, truncation_for(settings, whole.shape))
        layers[name] = layer_to_device(to_layer(kept), torch.device("cpu"))
        modules.append(compare_with_inputs(name, [(whole, 1.0)], [0], kept))
    listener.report(Phase("extracting", len(base), len(base)))
    if not layers:
        raise AdapterError("The two models don't differ in any layer.", "Give the tuned model and its base.")
    return MergeResult(Adapter(layers, {}, vectors), MergeReport(["difference"], "extract", modules))


def _different_layers(name: str, base: Tensor | None, tuned: Tensor | None) -> AdapterError:
    shapes = ["missing" if one is None else tuple(one.shape) for one in (base, tuned)]
    return AdapterError(
        f"The models have different layers: {name} is {shapes[0]} in the base and {shapes[1]} in the tuned model.",
        "Give a model and the base that it was tuned from.",
    )


def _difference(base: Tensor, tuned: Tensor) -> Tensor | None:
    """The change, float32; None where there is none but the rounding to another type."""
    if base.dtype == tuned.dtype:
        return None if torch.equal(base, tuned) else tuned.float() - base.float()
    change = tuned.float() - base.float()
    types = [torch.finfo(one.dtype) for one in (base, tuned)]
    coarser, step = max(one.eps for one in types), max(one.eps * one.smallest_normal for one in types)
    rounding = coarser / 2 * torch.linalg.vector_norm(base.float())  # an upper bound; nearly 3 times what it is
    rounding += step / 2 * base.numel() ** 0.5  # of numbers below the smallest normal one
    return change if torch.linalg.vector_norm(change) > rounding else None
