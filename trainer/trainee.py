"""What a run trains: an adapter, or the weights themselves. The recipe knows this contract alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import nn

from .adapters import TrainedAdapter
from .checkpoint import Saved
from .config import TrainSettings
from .devices import place
from .families.base import DiffusionModel
from .kohya import Adapter
from .modules import UNET, networks
from .quantization import quantize
from .trained_weights import TrainedWeights


class Trainee(Protocol):
    """Parameters inside a model's networks that are trained in float32."""

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Component → its trained parameters, always in the same order."""

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""

    def starting_at_zero(self) -> list[nn.Parameter]:
        """Those of an adapter's parts that begin at zero, which LoRA+ trains faster."""

    def saved(self, metadata: Mapping[str, str]) -> Saved:
        """A copy of the current state, for a checkpoint."""

    def restore(self, saved: Saved) -> None:
        """Set the parameters to a saved state of the same run."""

    def is_finite(self) -> bool:
        """Whether every trained number is finite."""

    def after_update(self, trained: Collection[str]) -> None:
        """Keep what must hold after every step, in the components that are still trained."""


def begin(
    model: DiffusionModel, settings: TrainSettings, device: torch.device, dtype: torch.dtype, start: Adapter | None
) -> Trainee:
    """Bring the networks to the device and make what the settings name trainable.

    Args:
        model: A built model; of its text encoders only those that are trained.
        settings: What is trained.
        device: Where training runs.
        dtype: Type of the weights that are not trained.
        start: An adapter to go on from.

    Raises:
        SettingsError: The settings do not fit the model.
        AdapterError: `start` does not.
    """
    full = settings.adapter == "full"
    for component, network in networks(model).items():
        if component == UNET or component in settings.text_rates:
            if component == UNET and settings.base_quantization == "nf4":
                quantize(network, device, dtype)
            place(network, device, torch.float32 if full else dtype)
    return TrainedWeights(model, settings) if full else TrainedAdapter(model, settings, start)
