"""Averaged weights: those that are previewed, saved and exported, where they differ from the optimiser's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..settings.optimizer import OptimizerSettings


class WeightAveraging:
    """The two sets of a run's weights: the raw weights, which the optimiser updates, and the evaluation weights.

    The parameters hold the raw weights, and the evaluation weights inside `evaluation_weights()`.

    With `ema_decay` the evaluation weights are an exponential moving average, updated after each step k = 1, 2, … by
        average ← d_k · average + (1 - d_k) · raw,  d_k = min(ema_decay, k / (k + 9)),  d_1 = 0
    (diffusers' `EMAModel` computes the same, but its module imports torchvision, which may be broken). With
    schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682) the raw weights are y, at which gradients are taken, and
    the evaluation weights x, computed from y and the optimiser's z. Otherwise both are the same, and this class does
    nothing.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, settings: OptimizerSettings
    ) -> None:
        """Set up before the first step.

        Args:
            parameters: All trained parameters, always in the same order.
            optimizer: The optimiser itself, not a wrapper.
            settings: Whether and how to average.
        """
        self._parameters = dict(enumerate(parameters)) if settings.averages else {}  # those that are not frozen
        self._schedule_free: Any = optimizer if settings.optimizer == "adamw-schedule-free" else None
        self._decay = settings.ema_decay
        self._step = 0
        self._averages = self._copies() if settings.ema_decay else {}
        self._raw: dict[int, Tensor] | None = None  # while the parameters hold the evaluation weights

    def _copies(self) -> dict[int, Tensor]:
        return {index: parameter.detach().clone() for index, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the raw weights; call it after each optimiser step."""
        if not self._averages:
            return
        self._step += 1
        decay = min(self._decay, self._step / (self._step + 9)) if self._step > 1 else 0.0
        torch._foreach_lerp_(list(self._averages.values()), list(self._parameters.values()), 1 - decay)

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The parameters hold the evaluation weights inside the block, and afterwards the raw ones, bit for bit.

        Not to be nested.
        """
        self._restore_raw()  # an interrupt may have come while they were exchanged
        if not self._parameters:
            yield
            return
        self._raw = self._copies()
        try:
            if self._schedule_free is not None:
                self._schedule_free.eval()
            else:
                self._assign(self._averages)
            yield
        finally:
            self._restore_raw()

    @torch.no_grad()
    def _assign(self, values: Mapping[int, Tensor]) -> None:
        for index, parameter in self._parameters.items():
            parameter.copy_(values[index])

    def _restore_raw(self) -> None:
        """Put the copies of the raw weights back; the optimiser's own way from x to y loses the last bits."""
        if self._raw is None:
            return
        if self._schedule_free is not None:
            self._schedule_free.train()
        self._assign(self._raw)
        self._raw = None

    @torch.no_grad()
    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set these parameters to their evaluation weights permanently: they are not trained further.

        They may leave the device. Parameters that are frozen already stay as they are.
        """
        ids = {id(parameter) for parameter in parameters}
        frozen = {index: parameter for index, parameter in self._parameters.items() if id(parameter) in ids}
        if not frozen:
            return
        with self.evaluation_weights():
            final = {index: parameter.detach().clone() for index, parameter in frozen.items()}
        for index, parameter in frozen.items():
            parameter.copy_(final[index])
            if self._schedule_free is not None:
                self._schedule_free.state.pop(parameter, None)  # without its z there is no way from x to y
            self._averages.pop(index, None)
            del self._parameters[index]

    def raw_weights(self) -> dict[str, Tensor]:
        """Copies of the raw weights on the CPU, for a checkpoint, by index; empty if nothing is averaged."""
        self._restore_raw()
        return {
            str(index): parameter.detach().to("cpu", copy=True).contiguous()
            for index, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def restore(self, raw: Mapping[str, Tensor], step: int) -> None:
        """Continue from a checkpoint. The parameters hold the evaluation weights of the same checkpoint.

        Args:
            raw: What `raw_weights` gave.
            step: Steps completed.
        """
        self._step = step
        if self._averages:
            self._averages = self._copies()
        for index, tensor in raw.items():
            self._parameters[int(index)].copy_(tensor)
