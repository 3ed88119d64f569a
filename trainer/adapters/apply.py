"""Adapters added to weights: of a built model, for drawing, or of a base model, for training on top."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..core.errors import AdapterError
from ..models import families
from ..models.families.base import BaseWeights, Component, DiffusionModel, Family, Prediction
from ..models.open import checked
from .kohya import Adapter
from .layers import Layer, fits
from .names import Adaptable, canonical_path, modules_by_name, networks, parametrized_by_name

logger = logging.getLogger("dreambooth_lora")


def merge_into(model: DiffusionModel, adapter: Adapter, strength: float) -> None:
    """Add an adapter to a model's weights; the touched weights become private copies, all others stay as they are.

    Args:
        model: A built model; its UNet and text encoders are changed.
        adapter: What to add.
        strength: Factor; 1 is as trained.

    Raises:
        AdapterError: The adapter was made for another family, or none of its modules fits.
    """
    _require_family(model.family, adapter.metadata)
    modules = modules_by_name(model)
    places = parametrized_by_name(model) if adapter.vectors else {}
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
    fitting = [(name, modules[name]) for name in adapter.layers if name in modules]
    for name, module in fitting:  # all are looked at before the first is changed
        _require_shape(name, adapter.layers[name], module)
    for name, module in fitting:
        weight = module.weight.detach()
        change = adapter.layers[name].delta(weight).to(weight.device).reshape(weight.shape)
        module.weight = nn.Parameter((weight.float() + strength * change).to(weight.dtype), requires_grad=False)
    for name, vector in adapter.vectors.items():
        _add_vector(places.get(name.rpartition(".")[0]), name, vector, strength)


def _add_vector(module: nn.Module | None, name: str, vector: torch.Tensor, strength: float) -> None:
    """Add to a bias, or to the weight of a norm; one that the model does not have is left out with a warning."""
    kind = "bias" if name.endswith(".diff_b") else "weight"
    parameter = getattr(module, kind, None)
    if parameter is None or parameter.shape != vector.shape:
        logger.warning("The model has no %s for %s of the adapter; it is left out.", kind, name)
        return
    changed = parameter.detach().float() + strength * vector.to(parameter.device, torch.float32)
    setattr(module, kind, nn.Parameter(changed.to(parameter.dtype), requires_grad=False))


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
    changed = {
        component: {
            _own_name(component, name): parameter.detach()
            for name, parameter in network.named_parameters()
            if parameter is not before[component][name]
        }
        for component, network in networks(model).items()
    }
    texts = [
        _with_tensors(component, changed[kind.name])
        for kind, component in zip(base.family.text_encoders, base.text_encoders, strict=True)
    ]
    return checked(replace(base, unet=_with_tensors(base.unet, changed["unet"]), text_encoders=texts))


def _own_name(component: str, parameter: str) -> str:
    path, _, kind = parameter.rpartition(".")
    return f"{canonical_path(component, path)}.{kind}"


def _with_tensors(component: Component, tensors: Mapping[str, torch.Tensor]) -> Component:
    return replace(component, tensors={**component.tensors, **tensors})


def _require_family(family: Family, metadata: Mapping[str, str]) -> None:
    """Refuse an adapter that says it was made for another family, in Stability's words or in kohya's."""
    architecture = metadata.get("modelspec.architecture", "").split("/")[0]
    version = metadata.get("ss_base_model_version", "")
    predictions = [Prediction(kind) for kind in ("epsilon", "v_prediction")]
    foreign = architecture not in [family.architecture(one) for one in predictions]
    known_versions = tuple(known.adapter_marks.base_version for known in families.recognizable_families())
    foreign_version = version.startswith(known_versions) and version not in [
        family.base_version(one) for one in predictions
    ]
    if (architecture and foreign) or (not architecture and foreign_version):
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
