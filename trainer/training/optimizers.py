"""Optimiser, learning-rate schedule and accelerator of a run."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..core.errors import SettingsError
from ..settings.train import TrainSettings

_POLYNOMIAL_END = 1e-7  # where diffusers lets the polynomial schedule end; it refuses rates that begin lower
_OURS = {  # arguments of constructors that settings of their own give, or that don't go with this recipe
    *("params", "lr", "weight_decay", "maximize", "capturable", "differentiable", "momentum_dtype"),
    *("relative_step", "warmup_init", "optim_bits", "is_paged", "args", "warmup_steps"),
}


def make_optimizer(
    groups: Mapping[str, list[nn.Parameter]], settings: TrainSettings, faster: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The chosen optimiser; each component is a group with its own peak learning rate, "peak".

    With LoRA+ (Hayou et al. 2024, arXiv:2402.12354) each is two groups, the second of which learns `lora_plus_ratio`
    times as fast.

    Args:
        groups: Component → its trained parameters.
        settings: Optimiser, its options, rates.
        faster: The parameters that LoRA+ has in the second groups.

    Raises:
        SettingsError: The optimiser's package is missing, or refuses its options.
    """
    rates = {"unet": settings.learning_rate, **settings.text_rates}
    chosen = {id(parameter) for parameter in faster} if settings.lora_plus_ratio else set()
    options = []
    for name, parameters in groups.items():
        for quick, rate in ((False, rates[name]), (True, rates[name] * settings.lora_plus_ratio)):
            members = [parameter for parameter in parameters if (id(parameter) in chosen) == quick]
            if members:
                options.append({"params": members, "lr": rate, "peak": rate})
    return _build(options, settings)


def _build(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """An optimiser of the chosen class with its options."""
    made, options = _optimizer_class(settings), settings.further_options
    known = set(inspect.signature(made).parameters) - _OURS - {"kwargs"}
    unknown = [name for name in options if name not in known]
    if unknown:
        raise SettingsError(
            f"The optimizer {settings.optimizer} has no option '{unknown[0]}' (optimizer_options).",
            f"Choose from: {', '.join(sorted(known))}. Rates and weight_decay are settings of their own.",
        )
    options = {**settings.optimizer_class.fixed, **options}
    try:
        optimizer: torch.optim.Optimizer = made(
            groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, **options
        )
    except Exception as error:  # packages have types of their own for a bad value
        raise SettingsError(
            f"The optimizer {settings.optimizer} refuses optimizer_options '{settings.optimizer_options}': {error}.",
            "Correct the value, or leave the option out.",
        ) from error
    return optimizer


def _optimizer_class(settings: TrainSettings) -> Any:
    """The class, imported.

    Raises:
        SettingsError: Its package is missing, too old, or can't be loaded.
    """
    found = settings.optimizer_class
    command = f'"{sys.executable}" -m pip install -U "{found.requirement}"'
    package, _, bound = found.requirement.partition(">=")
    remedy = f"Install it: {command} (pip install {package}), or choose optimizer adamw or adafactor."
    try:
        module = importlib.import_module(found.module)
        if package and _numbers(importlib.metadata.version(package)) < _numbers(bound):
            raise SettingsError(f"optimizer {settings.optimizer} needs {found.requirement}, a newer one.", remedy)
    except ImportError as error:
        raise SettingsError(
            f"optimizer {settings.optimizer} needs the package {package}, which is not installed ({error}).", remedy
        ) from error
    except (OSError, RuntimeError) as error:  # a library of its own that does not fit the system
        raise SettingsError(
            f"optimizer {settings.optimizer} needs the package {package}, which can't be loaded: {error}.", remedy
        ) from error
    return getattr(module, found.name)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def require_optimizer(settings: TrainSettings, device: torch.device | None = None) -> None:
    """Try the optimiser on one small parameter, so that what is missing or wrong is told before any long work.

    Args:
        settings: Optimiser and options.
        device: Where training runs; None: not known yet, so an optimiser that has kernels of its own takes no step.

    Raises:
        SettingsError: Its package is missing or does not work on the device, or an option does not exist or is refused.
    """
    if settings.optimizer == "adamw" and not settings.optimizer_options:
        return
    parameter = nn.Parameter(torch.zeros(64, 64, device=device or "cpu"))  # large enough to be kept in 8 bits
    optimizer = _build([{"params": [parameter], "lr": settings.learning_rate}], settings)
    if device is None and settings.optimizer_class.name.endswith("8bit"):
        return
    parameter.grad = torch.ones_like(parameter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once more when training begins
            optimizer.step()
            torch.isfinite(parameter).all().item()  # waits for the device, which reports an error late
    except Exception as error:
        given = f" with optimizer_options '{settings.optimizer_options}'" if settings.optimizer_options else ""
        raise SettingsError(
            f"optimizer {settings.optimizer} does not work on {device or 'cpu'}{given}: {error}.",
            "Correct optimizer_options, update the optimiser's package, or choose optimizer adamw or adafactor.",
        ) from error


def restore_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Go on from a saved state; a paged optimiser gets its state in paged memory again.

    Args:
        optimizer: The optimiser, or accelerate's wrapper of it.
        state: What its `state_dict()` was.
    """
    optimizer.load_state_dict(state)
    inner = getattr(optimizer, "optimizer", optimizer)
    if not getattr(inner, "is_paged", False):
        return
    for parameter, entry in inner.state.items():
        for name in {"state1", "state2"} & set(entry):  # bitsandbytes puts these on the device when it loads
            buffer = inner.get_state_buffer(parameter, dtype=entry[name].dtype)
            buffer.copy_(entry[name])
            entry[name] = buffer


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
