"""Optimiser, learning-rate schedule and accelerator of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .config import TrainSettings
from .errors import SettingsError

_POLYNOMIAL_END = 1e-7  # where diffusers lets the polynomial schedule end; it refuses rates that begin lower


def make_optimizer(groups: Mapping[str, list[nn.Parameter]], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019); each component is a group with its own peak learning rate, "peak"."""
    rates = {"unet": settings.learning_rate, **settings.text_rates}
    options = [{"params": groups[name], "lr": rates[name], "peak": rates[name]} for name in groups]
    return torch.optim.AdamW(options, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def recompute_activations(encoder: Any) -> None:
    """Gradient checkpointing for a network of transformers, whose name for it changes with version 6."""
    enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def learning_rate_factor(optimizer: torch.optim.Optimizer, settings: TrainSettings) -> Callable[[int], float]:
    """Step → factor of the learning rate, from diffusers' schedules; a function, so that resuming needs no state."""
    from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler

    warmup, steps, peak = settings.lr_warmup_steps, settings.steps, settings.learning_rate
    if settings.lr_schedule == "polynomial" and peak <= _POLYNOMIAL_END:
        schedule = get_polynomial_decay_schedule_with_warmup(optimizer, warmup, steps, lr_end=peak / 1000)
    else:
        schedule = get_scheduler(settings.lr_schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor


def make_accelerator(device: torch.device, precision: str, accumulation: int) -> Any:
    """An accelerator for this run; a former run in the same process may have used another precision."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    mixed = "no" if precision == "fp32" else precision
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    try:
        return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed, gradient_accumulation_steps=accumulation)
    except (ValueError, NotImplementedError) as error:
        raise SettingsError(f"{precision} does not work on {device}: {error}.", "Choose precision fp32.") from error


@contextlib.contextmanager
def accelerate_state_kept() -> Iterator[None]:
    """Give accelerate's process-wide state back as it was: other programs in this process may use it, too."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [state._shared_state for state in (AcceleratorState, PartialState, GradientState)]
    saved = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, former in zip(states, saved, strict=True):
            state.clear()
            state.update(former)
