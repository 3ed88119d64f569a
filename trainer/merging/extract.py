"""LoRA from fine-tuned weights: the nearest delta of a given rank, module by module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..adapters.kohya import Adapter
from ..adapters.layers import Layer
from ..adapters.module_paths import canonical_path
from ..adapters.names import adaptable_modules
from ..adapters.targets import Target
from ..core.errors import AdapterError
from ..core.events import Listener, Phase, SilentListener, stop_if_asked
from ..models.families.base import BaseWeights
from ..settings.merge import ExtractSettings
from .deltas import Delta, nearest_lora, to_layer, truncate
from .merge import CPU, MergeResult, layer_to_device, truncation_for
from .report import MergeReport, compare_with_inputs


def extract_lora(
    base: BaseWeights, tuned: Mapping[str, Tensor], targets: list[Target], metadata: Mapping[str, str]
) -> Adapter:
    """What fine-tuning changed in the weights of Linear layers and convolutions, as a LoRA.

    Args:
        base: The base model.
        tuned: "<component>.<parameter>" → fine-tuned tensor.
        targets: The modules to extract, with their ranks.
        metadata: Of the adapter.
    """
    modules = adaptable_modules(base.family.build(base))
    tuned_weights = {_canonical_name(name): tensor for name, tensor in tuned.items()}
    layers = {}
    for target in targets:
        base_weight = modules[target.component][target.path].weight
        tuned_weight = tuned_weights[f"{target.component}.{target.path}.weight"]
        layers[target.name] = nearest_lora(tuned_weight.float() - base_weight.float().cpu(), target.rank)
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
        listener: Gets the progress; may stop the work.

    Raises:
        AdapterError: The models have different layers, or do not differ.
        NotFiniteError: One of them has NaN or infinite values.
        CancelledError: The listener asked to stop.
    """
    listener = listener or SilentListener()
    device = device or CPU
    unmatched = sorted(base.keys() ^ tuned.keys())
    if unmatched:
        raise _different_layers(unmatched[0], base.get(unmatched[0]), tuned.get(unmatched[0]))
    layers: dict[str, Layer] = {}
    vectors: dict[str, Tensor] = {}
    module_reports = []
    for number, name in enumerate(sorted(base)):
        if number % 16 == 0:
            listener.report(Phase("extracting", number, len(base)))
            stop_if_asked(listener)
        base_weight = base[name].to(device)  # read once, as below: a host's is costly
        tuned_weight = tuned[name].to(device)
        if base_weight.shape != tuned_weight.shape:
            raise _different_layers(name, base_weight, tuned_weight)
        difference = _difference(base_weight, tuned_weight)
        if difference is None:
            continue
        whole = Delta(tuple(difference.shape), difference.flatten(1) if difference.ndim > 1 else difference)
        whole.require_finite(name)
        if difference.ndim == 1:
            if settings.biases:
                vectors[_vector_key(name)] = difference.cpu()
            continue
        truncated = truncate(whole, truncation_for(settings, whole.shape))
        layers[name] = layer_to_device(to_layer(truncated), CPU)
        module_reports.append(compare_with_inputs(name, {0: whole}, truncated))
    listener.report(Phase("extracting", len(base), len(base)))
    if not layers:
        raise AdapterError("The two models do not differ in any layer.", "Use a fine-tuned model and its base model.")
    return MergeResult(Adapter(layers, {}, vectors), MergeReport(["difference"], "extract", module_reports))


def _vector_key(name: str) -> str:
    """The key in an adapter file for the difference of a norm's weight or of a bias, "<module>.bias"."""
    if name.endswith(".bias"):
        return f"{name.removesuffix('.bias')}.diff_b"
    return f"{name}.diff"


def _different_layers(name: str, base: Tensor | None, tuned: Tensor | None) -> AdapterError:
    base_shape, tuned_shape = ("missing" if weight is None else tuple(weight.shape) for weight in (base, tuned))
    return AdapterError(
        f"The models have different layers: {name} is {base_shape} in the base and {tuned_shape} in the fine-tuned "
        "model.",
        "Use a fine-tuned model and the base model that it was fine-tuned from.",
    )


def _difference(base: Tensor, tuned: Tensor) -> Tensor | None:
    """The difference, float32; None where there is none but the rounding to another dtype."""
    if base.dtype == tuned.dtype:
        return None if torch.equal(base, tuned) else tuned.float() - base.float()
    difference = tuned.float() - base.float()
    dtypes = [torch.finfo(weight.dtype) for weight in (base, tuned)]
    largest_eps = max(dtype.eps for dtype in dtypes)
    largest_step = max(dtype.eps * dtype.smallest_normal for dtype in dtypes)  # of subnormal numbers
    rounding = largest_eps / 2 * torch.linalg.vector_norm(base.float())  # an upper bound, nearly 3 times the usual
    rounding += largest_step / 2 * base.numel() ** 0.5
    return difference if torch.linalg.vector_norm(difference) > rounding else None
