"""Adapters added to weights: of a built model, to generate with it, or of a base model, to train on top."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..core.errors import AdapterError, NotFiniteError
from ..core.tensor_files import is_finite
from ..models import families
from ..models.families.base import BaseWeights, Component, DiffusionModel, Family, Prediction
from ..models.open import checked
from .kohya import Adapter
from .layers import Layer, fits
from .names import Adaptable, canonical_path, modules_by_name, networks, parametrized_modules_by_name
from .prefixes import UNET

logger = logging.getLogger("dreambooth_lora")


def merge_into(model: DiffusionModel, adapter: Adapter, strength: float) -> None:
    """Add an adapter to a model's weights; the touched weights become private copies, all others stay as they are.

    Args:
        model: A built model; its UNet and text encoders are changed.
        adapter: What to add.
        strength: Factor; 1 is as trained.

    Raises:
        AdapterError: The adapter was made for another family, or none of its modules fits.
        NotFiniteError: The strength makes weights that are not finite.
    """
    _require_family(model.family, adapter.metadata)
    modules = modules_by_name(model)
    unknown = [name for name in adapter.layers if name not in modules]
    if unknown and len(unknown) == len(adapter.layers):
        raise AdapterError(
            f"None of the adapter's {len(unknown)} modules exists in this {model.family.title} model, "
            f"e.g. {unknown[0]}.",
            "Use an adapter that was made for the base model's family.",
        )
    if unknown:
        logger.warning(
            "%d of the adapter's %d modules don't exist in this model and are left out, e.g. %s",
            len(unknown),
            len(adapter.layers),
            unknown[0],
        )
    known = {name: layer for name, layer in adapter.layers.items() if name in modules}
    for name, layer in known.items():  # all are checked before the first is added
        _require_shape(name, layer, modules[name])
    for name, layer in known.items():
        weight = modules[name].weight.detach()
        delta = layer.delta(weight).to(weight.device).reshape(weight.shape)
        modules[name].weight = _sum(name, weight, delta, strength)
    if adapter.vectors:
        parametrized_modules = parametrized_modules_by_name(model)
        for key, vector in adapter.vectors.items():
            _add_vector(parametrized_modules.get(key.rpartition(".")[0]), key, vector, strength)


def _add_vector(module: nn.Module | None, key: str, vector: torch.Tensor, strength: float) -> None:
    """Add to a bias, or to the weight of a norm; one that the model does not have is left out with a warning."""
    parameter_name = "bias" if key.endswith(".diff_b") else "weight"
    parameter = getattr(module, parameter_name, None)
    if parameter is None or parameter.shape != vector.shape:
        logger.warning("The model has no %s for %s of the adapter; it is left out.", parameter_name, key)
        return
    merged = _sum(key, parameter.detach(), vector.to(parameter.device, torch.float32), strength)
    setattr(module, parameter_name, merged)


def _sum(name: str, weight: torch.Tensor, delta: torch.Tensor, strength: float) -> nn.Parameter:
    """A weight with a delta added, of the weight's type.

    Raises:
        NotFiniteError: A number of it is not finite, or too large for that type.
    """
    merged = (weight.float() + strength * delta).to(weight.dtype)
    if not is_finite(merged):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise NotFiniteError(
            f"The adapter at strength {strength:g} makes numbers in the weights of {name} that {dtype} can't hold.",
            "Choose a lower strength, or another adapter or base model if it is about 1 already.",
        )
    return nn.Parameter(merged, requires_grad=False)


def apply_to_base(base: BaseWeights, adapters: Sequence[tuple[Adapter, float]]) -> BaseWeights:
    """A base model with adapters added to its weights; only the touched tensors are copies.

    Args:
        base: The opened base model.
        adapters: Each with its strength, in the order in which they are added.

    Raises:
        AdapterError: An adapter was made for another family, or none of its modules fits.
    """
    if not adapters:
        return base
    model = base.family.build(base)
    before = {component: dict(network.named_parameters()) for component, network in networks(model).items()}
    for adapter, strength in adapters:
        merge_into(model, adapter, strength)
    merged = {
        component: {
            canonical_path(component, name): parameter.detach()
            for name, parameter in network.named_parameters()
            if parameter is not before[component][name]
        }
        for component, network in networks(model).items()
    }
    text_encoders = [
        _with_tensors(component, merged[kind.name])
        for kind, component in zip(base.family.text_encoders, base.text_encoders, strict=True)
    ]
    return checked(replace(base, unet=_with_tensors(base.unet, merged[UNET]), text_encoders=text_encoders))


def _with_tensors(component: Component, tensors: Mapping[str, torch.Tensor]) -> Component:
    return replace(component, tensors={**component.tensors, **tensors})


def _require_family(family: Family, metadata: Mapping[str, str]) -> None:
    """Refuse an adapter whose metadata name another family, by Stability's key or else by kohya's."""
    architecture = metadata.get("modelspec.architecture", "").split("/")[0]
    version = metadata.get("ss_base_model_version", "")
    predictions = [Prediction(kind) for kind in ("epsilon", "v_prediction")]
    if architecture:
        is_foreign = architecture not in [family.architecture(prediction) for prediction in predictions]
    else:
        known_versions = tuple(known.adapter_marks.base_version for known in families.recognizable_families())
        own_versions = [family.base_version(prediction) for prediction in predictions]
        is_foreign = version.startswith(known_versions) and version not in own_versions
    if is_foreign:
        raise AdapterError(
            f"The adapter was made for {architecture or version}, but the base model is {family.title}.",
            "Use a base model of the adapter's family, or an adapter of the base model's family.",
        )


def _require_shape(name: str, layer: Layer, module: Adaptable) -> None:
    if not fits(layer, module.weight.shape):
        raise AdapterError(
            f"The adapter's module {name} has the shape {layer.shape}, the model's {tuple(module.weight.shape)}.",
            "Use an adapter that was made for a model of this shape.",
        )
