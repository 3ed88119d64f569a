"""Adapters added to weights: of a built model, to generate with it, or of a base model, to train on top."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..core.errors import AdapterError, NotFiniteError
from ..core.tensor_files import is_finite
from ..models.families.base import BaseWeights, Component, DiffusionModel, Family
from ..models.open import checked
from .embeddings import learn_bundled
from .kohya import Adapter
from .layers import fits
from .module_paths import canonical_path, layers_per_block, module_path
from .names import contradicting_words, is_published, networks, parametrized_modules_by_name
from .prefixes import UNET, component_of

logger = logging.getLogger("dreambooth_lora")


def merge_into(model: DiffusionModel, adapter: Adapter, strength: float) -> None:
    """Add an adapter to a model's weights; changed weights become private copies, all others stay borrowed.

    Modules that the model lacks because it is smaller than the published models of its family are skipped with a
    warning; anything else that can't be added is refused. The model learns the bundled words, except, with a
    warning, those that don't fit it.

    Args:
        model: A built model; its UNet and text encoders are changed.
        adapter: What to add.
        strength: Factor; 1 is as trained. 0 changes nothing.

    Raises:
        AdapterError: One of its modules is not in models of this family or has another shape, or none of them fits; or
            it contains a different embedding of a word that the model has learned.
        NotFiniteError: The strength makes weights NaN or infinite.
    """
    additions = _additions(model, adapter)  # all are checked before the first is added
    learn_bundled(model, adapter.embeddings)
    if strength == 0:
        logger.warning("An adapter has strength 0, so it has no effect.")
        return
    for addition in additions:
        parameter = getattr(addition.module, addition.parameter).detach()
        delta = addition.delta(parameter).to(parameter.device).reshape(parameter.shape)
        setattr(addition.module, addition.parameter, _sum(addition.name, parameter, delta, strength))


def _sum(name: str, weight: torch.Tensor, delta: torch.Tensor, strength: float) -> nn.Parameter:
    """A weight with a delta added, of the weight's type.

    Raises:
        NotFiniteError: A number of it is not finite, or too large for that type.
    """
    merged = (weight.float() + strength * delta).to(weight.dtype)
    if not is_finite(merged):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise NotFiniteError(
            f"At strength {strength:g}, the adapter makes the weights of {name} overflow {dtype}.",
            "Use a lower strength; if it is already about 1, use another adapter or base model.",
        )
    return nn.Parameter(merged, requires_grad=False)


@dataclass(frozen=True)
class _Addition:
    """What is added to one parameter.

    Attributes:
        name: Of the module or vector, for messages.
        module: The module that has it.
        parameter: "weight" or "bias".
        delta: The parameter → what is added to it at strength 1.
    """

    name: str
    module: nn.Module
    parameter: str
    delta: Callable[[torch.Tensor], torch.Tensor]


def _additions(model: DiffusionModel, adapter: Adapter) -> list[_Addition]:
    """Everything that an adapter adds to a model.

    Raises:
        AdapterError: A part of it can't be added.
    """
    words = contradicting_words(model.family, adapter.metadata)
    modules = parametrized_modules_by_name(model)
    additions = []
    missing = []
    for name, layer in adapter.layers.items():
        module = modules.get(name)
        if module is None:
            missing.append(name)
            continue
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim < 2 or not fits(layer, weight.shape):
            shape = None if weight is None else tuple(weight.shape)
            raise _misfit(model.family, words, f"module {name} has the shape {layer.shape}, the model's {shape}")
        additions.append(_Addition(name, module, "weight", layer.delta))
    for key, vector in adapter.vectors.items():
        name, _, kind = key.rpartition(".")
        parameter_name = "bias" if kind == "diff_b" else "weight"
        if name not in modules:
            missing.append(name)
            continue
        parameter = getattr(modules[name], parameter_name, None)
        if parameter is None or parameter.shape != vector.shape:
            has = "none" if parameter is None else f"one of shape {tuple(parameter.shape)}"
            what = f"{key} is for a {parameter_name} of {len(vector)} values, but the model has {has}"
            raise _misfit(model.family, words, what)
        additions.append(_Addition(key, modules[name], parameter_name, _always(vector)))
    _require_no_part_missing(model, adapter, missing, words)
    if words:
        logger.warning(
            "The adapter's metadata names another family (%s), but its modules fit this %s model, so it is applied.",
            words,
            model.family.title,
        )
    return additions


def _always(vector: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda _: vector.float()


def _misfit(family: Family, words: str | None, what: str) -> AdapterError:
    """The error of an adapter that does not fit.

    Args:
        family: The model's.
        words: What the adapter's metadata call its own model, if that is another family.
        what: What does not fit.
    """
    if words:
        return AdapterError(
            f"The adapter was made for {words}, but the base model is {family.title}: its {what}.",
            "Use a base model of the adapter's family, or an adapter for the base model's family.",
        )
    return AdapterError(
        f"The adapter's {what}.", f"Use an adapter made for a model of this family ({family.title}) and size."
    )


def _require_no_part_missing(model: DiffusionModel, adapter: Adapter, missing: list[str], words: str | None) -> None:
    """Check that what a model lacks of an adapter is what a smaller model lacks; name it in a warning.

    Raises:
        AdapterError: The model has nothing of it or of one of its networks, or it is of another family.
    """
    if not missing:
        return
    names = {*adapter.layers, *(key.rpartition(".")[0] for key in adapter.vectors)}
    if len({*missing}) == len(names):
        raise _misfit(model.family, words, f"{len(names)} modules do not exist in this model, e.g. {min(missing)}")
    per_block = layers_per_block(names)
    for name in sorted(missing):
        path = module_path(name, per_block)
        if path.component not in networks(model) or not is_published(path, model.family):
            raise _misfit(model.family, words, f"module {name} does not exist in {model.family.title}")
    by_component: dict[str, list[str]] = {}
    for name in sorted(names):
        by_component.setdefault(component_of(name), []).append(name)
    for component, of_component in by_component.items():
        if set(of_component) <= {*missing} and not all(name.endswith("_text_projection") for name in of_component):
            raise _misfit(model.family, words, f"part for the {component} has no counterpart in this model")
    logger.warning(
        "%d of the adapter's %d modules do not exist in this model, which is smaller than others of its family, and "
        "are skipped, e.g. %s",
        len({*missing}),
        len(names),
        min(missing),
    )


def apply_to_base(base: BaseWeights, adapters: Sequence[tuple[Adapter, float]]) -> BaseWeights:
    """A base model with adapters added to its weights; only changed tensors are copied.

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
            if parameter is not before[component].get(name)
        }
        for component, network in networks(model).items()
    }
    text_encoders = [
        _with_tensors(component, merged[kind.name])
        for kind, component in zip(base.family.text_encoders, base.text_encoders, strict=True)
    ]
    unet = _with_tensors(base.denoiser, merged[UNET])
    return checked(replace(base, denoiser=unet, text_encoders=text_encoders, words=model.words))


def with_bundled_words(base: BaseWeights, adapters: Iterable[Adapter]) -> BaseWeights:
    """A base model, to which adapters were added elsewhere, with their bundled words.

    Raises:
        AdapterError: Two of them contain different embeddings of one word.
    """
    embeddings = [adapter.embeddings for adapter in adapters if adapter.embeddings]
    if not embeddings:
        return base
    model = base.family.build(base)
    for bundled in embeddings:
        learn_bundled(model, bundled)
    return checked(replace(base, words=model.words))


def _with_tensors(component: Component, tensors: Mapping[str, torch.Tensor]) -> Component:
    scales = {name: scale for name, scale in component.scales.items() if name not in tensors}
    packed = {name: weight for name, weight in component.packed.items() if name not in tensors}
    return replace(component, tensors={**component.tensors, **tensors}, scales=scales, packed=packed)
