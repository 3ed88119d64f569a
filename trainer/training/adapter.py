"""An adapter being trained: PEFT layers inside a model's networks, seen under the names of the adapter file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.kohya import Adapter
from ..adapters.layers import DORA_SCALE, make_layer
from ..adapters.names import canonical_path, modules_by_path, networks
from ..adapters.peft_layers import PEFT_ADAPTER_NAME, PEFT_METHODS, AdapterConfig, initial_values
from ..adapters.targets import Target, choose_targets, fit_start_adapter, targets_of_adapter
from ..core.errors import AdapterError, SettingsError
from ..core.seeding import generator
from ..models.families.base import DiffusionModel
from ..settings.train import TrainSettings
from .runs.checkpoint import Saved


@dataclass(frozen=True)
class StartingPoint:
    """What a run builds upon beside the base model.

    Attributes:
        start: An adapter to go on training.
        stacked: Adapters that were applied to the base, with their strengths; for a file that holds them, too.
    """

    start: Adapter | None = None
    stacked: Sequence[tuple[Adapter, float]] = ()


@dataclass(frozen=True)
class TrainedLayer:
    """The trained parameters of one module, float32, under the names that follow the module's in a file."""

    target: Target
    parts: Mapping[str, nn.Parameter]

    def saved_shape(self, part: str) -> tuple[int, ...]:
        """A part's shape in the file; PEFT holds DoRA's magnitudes in another one."""
        shape = tuple(self.parts[part].shape)
        if part != DORA_SCALE:
            return shape
        return (self.parts[part].numel(), *[1] * (self.parts["lora_down.weight"].ndim - 1))


class TrainableAdapter:
    """An adapter inside a model's UNet and text encoders, whatever its kind."""

    def __init__(self, model: DiffusionModel, settings: TrainSettings, start: Adapter | None = None) -> None:
        """Inject the adapter.

        Its start depends on the seed and each module's name alone, and leaves the model's predictions as they are.

        Args:
            model: A built model; its networks get PEFT's layers.
            settings: Kind, layers, ranks, seed.
            start: An adapter to go on from: its kind, layers, ranks and alphas replace the settings'.

        Raises:
            SettingsError: The settings do not fit the model.
            AdapterError: `start` does not.
        """
        self._kind = PEFT_METHODS[kind_of(start) if start else settings.adapter]
        self._max_norm = settings.max_norm
        start = fit_start_adapter(model, start) if start else None
        targets = planned_targets(model, settings, start)
        modules = modules_by_path(model)  # as they are now; reading a quantised weight makes it anew
        self._inject(model, targets, settings)
        self.layers: dict[str, TrainedLayer] = {}
        injected = _injected(model)
        for target in targets:
            module = injected[target.component, target.path]
            parts, base = self._kind.parameters(module), modules[target.component, target.path]
            for part, parameter in parts.items():
                parameter.data = torch.empty_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
                source = generator(settings.seed, "start", target.name, part)
                if not parameter.is_meta:  # as it is while a run is planned
                    with torch.no_grad():
                        parameter.copy_(initial_values(self._kind, part, parameter.shape, base, source))
                parameter.requires_grad_(True)
            self.layers[target.name] = TrainedLayer(target, parts)
            module.scaling[PEFT_ADAPTER_NAME] = _scale(target, parts)
        if start:
            self._load(start)

    def _inject(self, model: DiffusionModel, targets: Sequence[Target], settings: TrainSettings) -> None:
        """Let PEFT put its layers in, once for each network and rank."""
        from peft import inject_adapter_in_model

        places: dict[tuple[str, int], list[str]] = {}
        for target in targets:
            places.setdefault((target.component, target.rank), []).append(target.path)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of another rank, on other modules
            for (component, rank), paths in places.items():
                network = networks(model)[component]
                found = {canonical_path(component, path): path for path, _ in network.named_modules()}
                pattern = "|".join(re.escape(found[path]) for path in paths)
                shape = AdapterConfig(f"({pattern})", rank, settings.dropout, settings.lokr_factor)
                inject_adapter_in_model(self._kind.make_config(shape), network, adapter_name=PEFT_ADAPTER_NAME)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Component → its trained parameters, in an order that depends on the modules' names alone."""
        found: dict[str, list[nn.Parameter]] = {}
        for layer in self.layers.values():
            found.setdefault(layer.target.component, []).extend(layer.parts.values())
        return found

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [parameter for group in self.groups().values() for parameter in group]

    def starting_at_zero(self) -> list[nn.Parameter]:
        """The parameters of the parts that begin at zero, so that the model predicts at first as without an adapter."""
        zero = self._kind.zero_initialized
        return [one for layer in self.layers.values() for part, one in layer.parts.items() if part in zero]

    def adapter(self, metadata: Mapping[str, str] | None = None) -> Adapter:
        """A copy of the current state on the CPU, float32."""
        layers = {}
        for name, layer in self.layers.items():
            parts = {
                part: parameter.detach().cpu().reshape(layer.saved_shape(part)).clone()
                for part, parameter in layer.parts.items()
            }
            layers[name] = make_layer(name, parts, layer.target.alpha)
        return Adapter(layers, metadata or {})

    def load(self, adapter: Adapter) -> None:
        """Set the parameters to a saved state of the same run.

        Raises:
            AdapterError: Its modules or shapes differ.
        """
        if set(adapter.layers) != set(self.layers):
            raise AdapterError(
                "The checkpoint adapts other modules than this run.", "Start anew with --resume never or another name."
            )
        self._load(adapter)

    def _load(self, adapter: Adapter) -> None:
        for name, layer in self.layers.items():
            tensors = adapter.layers[name].tensors()
            shapes = {part: layer.saved_shape(part) for part in layer.parts}
            if {part: tuple(tensor.shape) for part, tensor in tensors.items()} != shapes:
                found = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
                raise AdapterError(
                    f"{name} of the adapter has the tensors {found}, and this run trains {shapes}.",
                    "Start from an adapter that was trained here, with the same settings (lokr_factor).",
                )
            with torch.no_grad():
                for part, parameter in layer.parts.items():
                    parameter.copy_(tensors[part].reshape(parameter.shape))

    def saved(self, metadata: Mapping[str, str]) -> Saved:
        """A copy of the current state, as a complete adapter."""
        return Saved(adapter=self.adapter(metadata))

    def restore(self, saved: Saved) -> None:
        """Set the parameters to a saved state of the same run.

        Raises:
            AdapterError: It is another run's.
        """
        self.load(saved.adapter or Adapter({}))

    def is_finite(self) -> bool:
        """Whether every trained number is finite."""
        return all(bool(torch.isfinite(p.detach().cpu()).all()) for p in self.parameters())

    @torch.no_grad()
    def after_update(self, trained: Collection[str]) -> None:
        """Shrink every layer's change to `max_norm`, if there is a limit, all its factors alike (kohya's way)."""
        if not self._max_norm:
            return
        for layer in self.layers.values():
            if layer.target.component not in trained:
                continue
            factors = {part: parameter for part, parameter in layer.parts.items() if part != DORA_SCALE}
            norm = self._kind.delta_norm(factors) * _scale(layer.target, factors)
            shrink = (self._max_norm / norm.clamp(min=self._max_norm)) ** (1 / len(factors))
            for parameter in factors.values():
                parameter.mul_(shrink)


def planned_targets(model: DiffusionModel, settings: TrainSettings, start: Adapter | None) -> list[Target]:
    """The modules that a run trains.

    Raises:
        SettingsError: The settings do not fit the model, or `start`.
        AdapterError: `start` does not fit the model.
    """
    if start is None:
        return choose_targets(model, settings)
    if settings.dropout and kind_of(start) not in ("lora", "dora"):
        raise SettingsError(
            f"dropout exists for LoRA and DoRA only, and the adapter to start from is a {start.kind}.",
            "Set dropout to 0.",
        )
    targets = targets_of_adapter(model, fit_start_adapter(model, start))
    for component in {target.component for target in targets} - {"unet"} - set(settings.text_encoder_rates):
        raise SettingsError(
            f"The adapter to start from has a part for the {component}, and {component}_lr is 0.",
            f"Set {component}_lr, such as 5e-5, so that this part is trained on, too.",
        )
    for component in set(settings.text_encoder_rates) - {target.component for target in targets}:
        raise SettingsError(
            f"{component}_lr is set, but the adapter to start from has no part for the {component}.",
            f"Set {component}_lr to 0, or start without an adapter.",
        )
    return targets


def kind_of(adapter: Adapter) -> str:
    """The setting's name of an adapter's kind.

    Raises:
        AdapterError: It is of a kind that can't be trained on.
    """
    found = next((name for name, kind in PEFT_METHODS.items() if kind.title == adapter.kind), None)
    if found is None:
        raise AdapterError(
            f"The adapter to start from is of the kind {adapter.kind}, which can't be trained on.",
            f"Start from one of: {', '.join(kind.title for kind in PEFT_METHODS.values())}.",
        )
    return found


def _scale(target: Target, parts: Mapping[str, Tensor]) -> float:
    """What a layer's change is multiplied by; a LoKr of two whole factors has no rank to scale by."""
    return 1.0 if {"lokr_w1", "lokr_w2"} <= set(parts) else target.alpha / target.rank


def _injected(model: DiffusionModel) -> dict[tuple[str, str], Any]:
    """(component, path) → the layers that PEFT put in."""
    return {
        (component, canonical_path(component, path)): module
        for component, network in networks(model).items()
        for path, module in network.named_modules()
        if hasattr(module, "base_layer")
    }
