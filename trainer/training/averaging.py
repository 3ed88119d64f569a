"""Weights that are shown and saved, where they are not the ones that are updated: an average of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..settings.optimizer import OptimizerSettings


class Averaging:
    """The two sets of weights of a run: the raw ones, which the parameters hold, and the shown ones.

    With `ema_decay` the shown weights are an exponential moving average, updated after each step k = 1, 2, … by
        shown ← d_k · shown + (1 - d_k) · raw,  d_k = min(ema_decay, k / (k + 9)),  d_1 = 0
    (diffusers' `EMAModel` computes the same, but its module imports torchvision, which may be broken). With
    schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682) the raw weights are y, at which gradients are taken, and
    the shown ones x, computed from y and the optimiser's z. Otherwise both are the same, and nothing here does or
    costs anything.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, settings: OptimizerSettings
    ) -> None:
        """Look at what is trained, before the first step.

        Args:
            parameters: All trained parameters, always in the same order.
            optimizer: The optimiser itself, not a wrapper.
            settings: Whether and how to average.
        """
        self._parameters = dict(enumerate(parameters)) if settings.averages else {}
        self._free: Any = optimizer if settings.optimizer == "adamw-schedule-free" else None
        self._decay, self._step = settings.ema_decay, 0
        self._raw: list[Tensor] | None = None
        self._averages = self._copies() if settings.ema_decay else []

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters.values()]

    @torch.no_grad()
    def update(self) -> None:
        """Take a step into the average; to be called after each step of the optimiser."""
        if not self._averages:
            return
        self._step += 1
        decay = min(self._decay, self._step / (self._step + 9)) if self._step > 1 else 0.0
        torch._foreach_lerp_(self._averages, list(self._parameters.values()), 1 - decay)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """The parameters hold the shown weights inside, and bit for bit the raw ones again afterwards. Not nested."""
        self._go_back()  # an interrupt may have come while they were exchanged
        if not self._parameters:
            yield
            return
        self._raw = self._copies()
        try:
            if self._free is not None:
                self._free.eval()
            else:
                self._hold(self._averages)
            yield
        finally:
            self._go_back()

    @torch.no_grad()
    def _hold(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self._parameters.values(), values, strict=True):
            parameter.copy_(value)

    def _go_back(self) -> None:
        """Put the kept copies back; the optimiser's own way from x to y loses the last bits."""
        if self._raw is None:
            return
        if self._free is not None:
            self._free.train()
        self._hold(self._raw)
        self._raw = None

    @torch.no_grad()
    def settle(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give these parameters the shown weights for good: they are trained no more, and may leave the device."""
        settled = {id(parameter) for parameter in parameters}
        places = [place for place, parameter in self._parameters.items() if id(parameter) in settled]
        if not places:
            return
        with self.shown():
            last = [self._parameters[place].detach().clone() for place in places]
        kept = [place for place in self._parameters if place not in places]
        if self._averages:
            averages = dict(zip(self._parameters, self._averages, strict=True))
            self._averages = [averages[place] for place in kept]
        for place, value in zip(places, last, strict=True):
            self._parameters[place].copy_(value)
            if self._free is not None:
                self._free.state.pop(self._parameters[place], None)  # without its z there is no way from x to y
        self._parameters = {place: self._parameters[place] for place in kept}

    def raw(self) -> dict[str, Tensor]:
        """Copies of the raw weights on the CPU, for a checkpoint, "<parameter>"; empty if they are the shown ones."""
        self._go_back()
        return {
            str(place): parameter.detach().to("cpu", copy=True).contiguous()
            for place, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def restore(self, raw: Mapping[str, Tensor], step: int) -> None:
        """Go on from a checkpoint.

        Args:
            raw: What `raw` gave. The parameters hold the shown weights of the same checkpoint.
            step: Steps completed.
        """
        self._step = step
        if self._averages:
            self._averages = self._copies()
        for place, value in raw.items():
            self._parameters[int(place)].copy_(value)
