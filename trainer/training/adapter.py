"""An adapter being trained: PEFT's layers inside a model's networks, under the names of the adapter file."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.kohya import Adapter
from ..adapters.layers import DORA_SCALE, make_layer
from ..adapters.module_paths import ModulePath, canonical_path
from ..adapters.names import Adaptable, modules_by_path, networks
from ..adapters.orthogonal import DOWN, plain_factors
from ..adapters.peft_layers import (
    ORTHOGONAL_LORA,
    PEFT_ADAPTER_NAME,
    PEFT_METHODS,
    AdapterConfig,
    adapters_off,
    first_factors,
    initial_values,
)
from ..adapters.prefixes import UNET
from ..adapters.targets import Target, choose_targets, fit_start_adapter, targets_of_adapter
from ..core.errors import AdapterError, SettingsError, suggest
from ..core.seeding import generator
from ..models.families.base import DiffusionModel
from ..settings.adapter import ROTATIONS
from ..settings.train import TrainSettings
from .rank_schedule import RankSchedule
from .runs.checkpoint import Saved


@dataclass(frozen=True)
class StartingPoint:
    """What a run builds on in addition to the base model.

    Attributes:
        start: An adapter to continue training.
        stacked: Adapters that were applied to the base, with their strengths; for a file that includes them.
    """

    start: Adapter | None = None
    stacked: Sequence[tuple[Adapter, float]] = ()


@dataclass(frozen=True)
class TrainedLayer:
    """The trained parameters of one module, float32.

    Attributes:
        target: The module.
        parameters: By suffix: what follows the module's name in a key of the file.
        initial: Their initial values, for a LoRA with orthogonal initialisation; its delta is the difference.
    """

    target: Target
    parameters: Mapping[str, nn.Parameter]
    initial: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The parameters that the delta is a product of: all but DoRA's magnitudes."""
        return {suffix: parameter for suffix, parameter in self.parameters.items() if suffix != DORA_SCALE}

    @property
    def scale(self) -> float:
        """What the delta is multiplied by: alpha / rank; rotations and a LoKr of two whole factors are not scaled."""
        if {"lokr_w1", "lokr_w2"} <= set(self.parameters) or "oft_blocks" in self.parameters:
            return 1.0
        return self.target.alpha / self.target.rank

    def saved_tensors(self) -> dict[str, Tensor]:
        """The tensors saved in the file, by suffix; not detached."""
        if self.initial:
            return plain_factors(self.parameters, self.initial)
        return {suffix: parameter.reshape(self.saved_shape(suffix)) for suffix, parameter in self.parameters.items()}

    def saved_shape(self, suffix: str) -> tuple[int, ...]:
        """A parameter's shape in the file, which for DoRA's magnitudes is not PEFT's."""
        parameter = self.parameters[suffix]
        if suffix != DORA_SCALE:
            return tuple(parameter.shape)
        dimensions = self.parameters["lora_down.weight"].ndim
        return (parameter.numel(), *[1] * (dimensions - 1))


class TrainableAdapter:
    """An adapter of any kind inside a model's UNet and text encoders.

    Attributes:
        layers: Name of a module in the file → its layer.
    """

    def __init__(
        self,
        model: DiffusionModel,
        settings: TrainSettings,
        start: Adapter | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Inject the adapter.

        Its initial values depend on the seed and each module's name alone, and leave the model's predictions as they
        are.

        Args:
            model: A built model; its networks get PEFT's layers.
            settings: Kind, modules, ranks, seed.
            start: An adapter to go on from: its kind, modules, ranks and alphas replace the settings'.
            device: Where the adapter is trained; None: where the weights of each module are.

        Raises:
            SettingsError: The settings do not fit the model.
            AdapterError: `start` does not.
        """
        self._device = device
        self._method = PEFT_METHODS[_method_name(start) if start else settings.adapter]
        if start is None and settings.lora_init == "orthogonal":
            self._method = ORTHOGONAL_LORA
        self._max_norm = settings.max_norm
        start = fit_start_adapter(model, start) if start else None
        targets = planned_targets(model, settings, start)
        original_modules = modules_by_path(model)  # those that PEFT's layers will wrap
        self._inject(model, targets, settings)
        injected_modules = _injected_modules(model)
        self._modules = list(injected_modules.values())
        self.layers: dict[str, TrainedLayer] = {}
        for target in targets:
            module = injected_modules[target.module_path]
            self._method.prepare(module)
            layer = TrainedLayer(target, self._method.parameters(module), self._method.initial(module))
            self._initialize(layer, original_modules[target.module_path], settings.seed)
            module.scaling[PEFT_ADAPTER_NAME] = layer.scale
            self.layers[target.name] = layer
        if start:
            self._load(start)
        if settings.rank_schedule == "timestep":
            self._limit_ranks(model, settings)

    def _limit_ranks(self, model: DiffusionModel, settings: TrainSettings) -> None:
        """Let the components of the denoiser's layers act by timestep; text encoders know none."""
        schedule = RankSchedule(model.denoiser, model.objective.timesteps, settings.min_rank, settings.rank_power)
        for path, module in _injected_modules(model).items():
            if path.component == UNET:
                for down in first_factors(module):
                    schedule.limit(down)

    def _inject(self, model: DiffusionModel, targets: Sequence[Target], settings: TrainSettings) -> None:
        """Inject PEFT's layers, once for each network and rank."""
        paths_by_rank: dict[tuple[str, int], list[str]] = {}
        for target in targets:
            paths_by_rank.setdefault((target.component, target.rank), []).append(target.path)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of another rank, on other modules
            for (component, rank), paths in paths_by_rank.items():
                network = networks(model)[component]
                own_paths = {canonical_path(component, path): path for path, _ in network.named_modules()}
                pattern = "|".join(re.escape(own_paths[path]) for path in paths)
                config = AdapterConfig(
                    targets=f"({pattern})", rank=rank, dropout=settings.dropout, factor=settings.lokr_factor
                )
                self._method.inject(network, config)

    def _initialize(self, layer: TrainedLayer, module: Adaptable, seed: int) -> None:
        """Give a layer its initial values, in float32 whatever type PEFT chose, and make it trainable."""
        for suffix, parameter in layer.parameters.items():
            for tensor in (parameter, layer.initial.get(suffix, parameter)):
                tensor.data = torch.empty_like(
                    tensor, dtype=torch.float32, device=self._device, memory_format=torch.contiguous_format
                )
            if not parameter.is_meta:  # as it is while a run's memory is planned
                source = generator(seed, "start", layer.target.name, suffix)
                values = initial_values(self._method, suffix, parameter.shape, module, source)
                with torch.no_grad():
                    parameter.copy_(values)
                    if layer.initial:
                        layer.initial[suffix].copy_(values)
            parameter.requires_grad_(True)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Component → its trained parameters, in an order that depends only on the modules' names."""
        groups: dict[str, list[nn.Parameter]] = {}
        for layer in self.layers.values():
            groups.setdefault(layer.target.component, []).extend(layer.parameters.values())
        return groups

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [parameter for group in self.groups().values() for parameter in group]

    def starting_at_zero(self) -> list[nn.Parameter]:
        """The parameters that start at zero, so that the adapter initially has no effect."""
        return [
            parameter
            for layer in self.layers.values()
            for suffix, parameter in layer.parameters.items()
            if suffix in self._method.zero_initialized
        ]

    def adapter(self, metadata: Mapping[str, str] | None = None) -> Adapter:
        """A copy of the current state on the CPU, float32."""
        layers = {}
        for name, layer in self.layers.items():
            with torch.no_grad():
                tensors = {
                    suffix: tensor.to("cpu", copy=True).contiguous() for suffix, tensor in layer.saved_tensors().items()
                }
            # the rank is another one than that of the target if the start is subtracted; the scale stays
            alpha = layer.target.alpha * (len(tensors[DOWN]) / layer.target.rank if layer.initial else 1)
            layers[name] = make_layer(name, tensors, alpha)
        return Adapter(layers, metadata or {})

    def load(self, adapter: Adapter) -> None:
        """Set the parameters to a saved state of the same run.

        Raises:
            AdapterError: Its modules or shapes differ.
        """
        _require_same_modules(adapter.layers, self.layers)
        self._load(adapter)

    def _load(self, adapter: Adapter) -> None:
        for name, layer in self.layers.items():
            tensors = adapter.layers[name].tensors()
            loaded_shapes = {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}
            expected_shapes = {suffix: layer.saved_shape(suffix) for suffix in layer.parameters}
            if loaded_shapes != expected_shapes:
                raise AdapterError(
                    f"{name} of the adapter has the tensors {loaded_shapes}, but this run trains {expected_shapes}.",
                    f"Start from an adapter that was trained here, with the same settings ({suggest('lokr_factor')}).",
                )
            with torch.no_grad():
                for suffix, parameter in layer.parameters.items():
                    parameter.copy_(tensors[suffix].reshape(parameter.shape))

    def saved(self, metadata: Mapping[str, str]) -> Saved:
        """A copy of the current state, as a complete adapter."""
        factors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in self._orthogonal_state().items()}
        return Saved(adapter=self.adapter(metadata), factors=factors)

    def restore(self, saved: Saved) -> None:
        """Set the parameters to a saved state of the same run.

        Raises:
            AdapterError: It is another run's.
        """
        state = self._orthogonal_state()
        if not state:
            self.load(saved.adapter or Adapter({}))
            return
        _require_same_modules(state, saved.factors)
        for name, tensor in state.items():
            tensor.copy_(saved.factors[name])

    def _orthogonal_state(self) -> dict[str, Tensor]:
        """Of a LoRA that starts orthogonal, what its file does not tell: "<module>.<suffix>", trained and initial."""
        state = {}
        for name, layer in self.layers.items():
            for suffix, initial in layer.initial.items():
                state[f"{name}.{suffix}"] = layer.parameters[suffix].detach()
                state[f"{name}.initial.{suffix}"] = initial
        return state

    def squared_change(self, trained: Collection[str]) -> Tensor:
        """See `Trainable.squared_change`; computed from the factors, without the deltas."""
        squares = [
            self._method.squared_norm(layer.saved_tensors() if layer.initial else layer.factors) * layer.scale**2
            for layer in self.layers.values()
            if layer.target.component in trained
        ]
        return torch.stack(squares).sum()

    @contextlib.contextmanager
    def untrained(self) -> Iterator[None]:
        """See `Trainable.untrained`; the adapter is turned off."""
        with adapters_off(self._modules), torch.no_grad():
            yield

    def is_finite(self) -> bool:
        """Whether every trained number is finite."""
        return all(bool(torch.isfinite(parameter.detach().cpu()).all()) for parameter in self.parameters())

    @torch.no_grad()
    def after_update(self, trained: Collection[str]) -> None:
        """Scale every layer's delta to a norm of at most `max_norm`, if set: all factors equally, as kohya does.

        A rotation's generator is limited instead, see `PeftMethod.squared_norm`.

        Args:
            trained: Components that are still trained.
        """
        if not self._max_norm:
            return
        for layer in self.layers.values():
            if layer.target.component not in trained:
                continue
            factors = layer.factors
            norm = self._method.squared_norm(factors).sqrt() * layer.scale
            shrink = (self._max_norm / norm.clamp(min=self._max_norm)) ** (1 / len(factors))
            for factor in factors.values():
                factor.mul_(shrink)


def _require_same_modules(saved: Collection[str], own: Collection[str]) -> None:
    """Check that a checkpoint is of this run.

    Raises:
        AdapterError: It has other modules.
    """
    if set(saved) != set(own):
        raise AdapterError(
            "The checkpoint adapts different modules from this run.",
            f"Start again with {suggest('resume', 'never')} or another {suggest('name')}.",
        )


def planned_targets(model: DiffusionModel, settings: TrainSettings, start: Adapter | None) -> list[Target]:
    """The modules that a run trains.

    Raises:
        SettingsError: The settings do not fit the model, or `start`.
        AdapterError: `start` does not fit the model.
    """
    targets = _targets_of(model, settings, start)
    early = model.family.prompt_modules
    reading = [target.path for target in targets if early and target.component == UNET and re.match(early, target.path)]
    if reading:
        raise SettingsError(
            f"{reading[0]} encodes prompts, which are cached before the first step, so it can't be trained.",
            f"Use the adapter as {suggest('base_lora')} and train on top of it."
            if start
            else f"Remove such layers from {suggest('include')}.",
        )
    largest_rank = max(target.rank for target in targets if target.component == UNET)
    if settings.rank_schedule == "timestep" and settings.min_rank > largest_rank:
        raise SettingsError(
            f"{suggest('min_rank', settings.min_rank)} is higher than the rank of every layer (at most "
            f"{largest_rank}).",
            f"Set {suggest('min_rank', 0)} to use half of each layer's rank, or "
            f"{suggest('rank_schedule', 'constant')} to use the full rank at every timestep.",
        )
    return targets


def _targets_of(model: DiffusionModel, settings: TrainSettings, start: Adapter | None) -> list[Target]:
    """See `planned_targets`."""
    if start is None:
        return choose_targets(model, settings)
    if settings.rank_schedule == "timestep" and _method_name(start) != "lora":
        raise SettingsError(
            f"{suggest('rank_schedule', 'timestep')} is only available for LoRA, but the adapter to start from is a "
            f"{start.kind}.",
            f"Set {suggest('rank_schedule', 'constant')}.",
        )
    if settings.dropout and _method_name(start) not in ("lora", "dora"):
        raise SettingsError(
            f"{suggest('dropout')} is only available for LoRA and DoRA, but the adapter to start from is a "
            f"{start.kind}.",
            f"Set {suggest('dropout', 0)}.",
        )
    if settings.weight_penalty and _method_name(start) in ("dora", *ROTATIONS):
        raise SettingsError(
            f"{suggest('weight_penalty')} needs the change of each weight, which can't be computed from the parameters "
            f"of the adapter to start from, a {start.kind}.",
            f"Set {suggest('weight_penalty', 0)}.",
        )
    if settings.lora_plus_ratio and _method_name(start) in ROTATIONS:
        raise SettingsError(
            f"{suggest('lora_plus_ratio')} needs an adapter with two factors, but the adapter to start from is a "
            f"{start.kind}.",
            f"Set {suggest('lora_plus_ratio', 0)}.",
        )
    targets = targets_of_adapter(model, fit_start_adapter(model, start))
    components = {target.component for target in targets}
    rates = settings.text_encoder_rates
    for component in components - {UNET} - set(rates):
        rate = suggest(f"{component}_lr")
        raise SettingsError(
            f"The adapter to start from has a part for the {component}, but {rate} is 0.",
            f"Set {rate} (for example 5e-5), so that this part is trained too.",
        )
    for component in set(rates) - components:
        raise SettingsError(
            f"{suggest(f'{component}_lr')} is set, but the adapter to start from has no part for the {component}.",
            f"Set {suggest(f'{component}_lr', 0)}, or start without that adapter.",
        )
    return targets


def _method_name(adapter: Adapter) -> str:
    """The name of an adapter's kind in the settings.

    Raises:
        AdapterError: It is of a kind that can't be trained on.
    """
    for name, method in PEFT_METHODS.items():
        if method.title == adapter.kind:
            return name
    raise AdapterError(
        f"The adapter to start from is of type {adapter.kind}, from which training can't continue.",
        f"Start from one of: {', '.join(method.title for method in PEFT_METHODS.values())}.",
    )


def _injected_modules(model: DiffusionModel) -> dict[ModulePath, Any]:
    """The layers that PEFT injected."""
    return {
        ModulePath(component, canonical_path(component, path)): module
        for component, network in networks(model).items()
        for path, module in network.named_modules()
        if hasattr(module, "base_layer")
    }
