"""What a run trains: an adapter, or the weights themselves. The recipe uses only this protocol."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ..adapters.kohya import Adapter
from ..adapters.names import networks
from ..adapters.prefixes import UNET
from ..core.devices import to_device
from ..core.errors import AdapterError, suggest
from ..models.block_swap import BlockSwap, set_aside, swapped_blocks
from ..models.families.base import DiffusionModel
from ..models.nf4 import quantize
from ..models.stored_weights import as_ordinary_layers
from ..settings.train import TrainSettings
from .adapter import TrainableAdapter
from .runs.checkpoint import Saved
from .words import TrainedWords, WithWords


class Trainable(Protocol):
    """Parameters inside a model's networks that are trained in float32."""

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Component → its trained parameters, always in the same order."""

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""

    def starting_at_zero(self) -> list[nn.Parameter]:
        """The parameters of an adapter that start at zero, for which LoRA+ uses a higher learning rate."""

    def saved(self, metadata: Mapping[str, str]) -> Saved:
        """A copy of the current state, for a checkpoint."""

    def restore(self, saved: Saved) -> None:
        """Set the parameters to a saved state of the same run."""

    def is_finite(self) -> bool:
        """Whether every trained number is finite."""

    def after_update(self, trained: Collection[str]) -> None:
        """Enforce constraints after every step, in the components that are still trained."""

    def squared_change(self, trained: Collection[str]) -> Tensor:
        """‖W - W₀‖² of the base's weights in the components that are still trained, 0-D, with gradients."""

    def untrained(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block the denoiser predicts as it did before anything was trained; without gradients."""


def make_trainable(
    model: DiffusionModel,
    settings: TrainSettings,
    device: torch.device,
    dtype: torch.dtype,
    start: Adapter | None,
    words: TrainedWords | None = None,
) -> Trainable:
    """Move the networks to the device and make what the settings select trainable.

    Args:
        model: A built model; of its text encoders only those that run in every step.
        settings: What is trained.
        device: Where training runs.
        dtype: Type of the weights that are not trained.
        start: An adapter to start from.
        words: Words trained together with it, which the model has learned.

    Raises:
        SettingsError: The settings do not fit the model.
        AdapterError: `start` does not.
    """
    full = settings.adapter == "full"
    swapped = swapped_blocks(model.denoiser, settings.swap_blocks) if device.type == "cuda" else []
    for block in swapped:  # one after the other, so that the device never holds all of them
        if settings.base_quantization == "nf4":
            quantize(block, device, dtype)
        to_device(block, torch.device("cpu"), dtype)
    for component, network in networks(model).items():
        if component == UNET or settings.text_encoders_in_steps([component]):
            if component == UNET and settings.base_quantization == "nf4":
                quantize(network, device, dtype)
            if full:
                as_ordinary_layers(network)
            with set_aside(network, swapped):
                to_device(network, device, torch.float32 if full else dtype)
    if full:
        return FullFinetune(model, settings)
    adapter = TrainableAdapter(model, settings, start, device)
    if swapped:
        BlockSwap(swapped, device)
    if words is None:
        return adapter
    words.to_device(device)
    return WithWords(adapter, words)


@contextlib.contextmanager
def evaluating(model: DiffusionModel) -> Iterator[None]:
    """Put denoiser and text encoders into evaluation mode inside the block, and back into their own mode after it."""
    modes = [(network, network.training) for network in networks(model).values()]
    for network, _ in modes:
        network.eval()
    try:
        yield
    finally:
        for network, training in modes:
            network.train(training)


class FullFinetune:
    """All weights of the UNet, and of the text encoders that have a learning rate, as private float32 copies."""

    def __init__(self, model: DiffusionModel, settings: TrainSettings) -> None:
        """Replace the borrowed parameters of a built model by copies and make them trainable."""
        self._networks = {
            name: network
            for name, network in networks(model).items()
            if name == UNET or name in settings.text_encoder_rates
        }
        originals = {parameter: parameter.data for parameter in self.parameters()}
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)
        self._untrained = originals if settings.needs_base else {}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Component → its parameters, in the networks' order."""
        return {name: list(network.parameters()) for name, network in self._networks.items()}

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [parameter for group in self.groups().values() for parameter in group]

    def starting_at_zero(self) -> list[nn.Parameter]:
        """None: there is no adapter."""
        return []

    def _named(self) -> dict[str, nn.Parameter]:
        """Parameters by "<component>.<parameter>"."""
        return {
            f"{component}.{name}": parameter
            for component, network in self._networks.items()
            for name, parameter in network.named_parameters()
        }

    def saved(self, metadata: Mapping[str, str]) -> Saved:
        """A copy of the current state on the CPU."""
        copies = {
            name: parameter.detach().to("cpu", copy=True).contiguous() for name, parameter in self._named().items()
        }
        return Saved(weights=copies, metadata=metadata)

    def restore(self, saved: Saved) -> None:
        """Set the parameters to a saved state of the same run.

        Raises:
            AdapterError: It is another run's.
        """
        parameters = self._named()
        weights = saved.weights or {}
        if set(parameters) != set(weights):
            raise AdapterError(
                "The checkpoint contains different weights from those that this run trains.",
                f"Start again with {suggest('resume', 'never')} or another {suggest('name')}.",
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])

    def is_finite(self) -> bool:
        """Whether every trained number is finite."""
        return all(bool(torch.isfinite(p.detach()).all()) for p in self.parameters())

    def after_update(self, trained: Collection[str]) -> None:
        """No constraints."""

    def squared_change(self, trained: Collection[str]) -> Tensor:
        """See `Trainable.squared_change`."""
        groups = self.groups()
        squares = [
            (parameter - self._untrained[parameter]).square().sum()
            for component in trained
            for parameter in groups.get(component, ())
        ]
        return torch.stack(squares).sum()

    @contextlib.contextmanager
    def untrained(self) -> Iterator[None]:
        """See `Trainable.untrained`; the weights as they were are kept where the settings need them."""
        trained = {parameter: parameter.data for parameter in self._untrained}
        for parameter, original in self._untrained.items():
            parameter.data = original
        try:
            with torch.no_grad():
                yield
        finally:
            for parameter, data in trained.items():
                parameter.data = data
