"""Optimiser and learning-rate schedule of a run."""

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

from ..adapters.prefixes import UNET
from ..core.errors import SettingsError, suggest
from ..settings.train import TrainSettings

WORDS = "token"  # the group of the rare words' vectors, as their learning rate is called
_POLYNOMIAL_END = 1e-7  # where diffusers lets the polynomial schedule end; it refuses rates that begin lower
_RESERVED_ARGUMENTS = {  # of constructors: settings of their own give these, or they don't go with this recipe
    "args",
    "capturable",
    "differentiable",
    "is_paged",
    "lr",
    "maximize",
    "momentum_dtype",
    "optim_bits",
    "params",
    "relative_step",
    "warmup_init",
    "warmup_steps",
    "weight_decay",
}


def make_optimizer(
    groups: Mapping[str, list[nn.Parameter]], settings: TrainSettings, faster: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The chosen optimiser; each component is a parameter group with its own peak learning rate, "peak".

    With LoRA+ (Hayou et al. 2024, arXiv:2402.12354) each is two groups; the learning rate of the second is
    `lora_plus_ratio` times that of the first.

    Args:
        groups: Component → its trained parameters.
        settings: Optimiser, its options, learning rates.
        faster: The parameters that LoRA+ puts into the second groups.

    Raises:
        SettingsError: The optimiser's package is missing, or rejects its options.
    """
    rates = {UNET: settings.learning_rate, **settings.text_encoder_rates, WORDS: settings.token_lr}
    fast_ids = {id(parameter) for parameter in faster} if settings.lora_plus_ratio else set()
    param_groups = []
    for component, parameters in groups.items():
        rate = rates[component]
        slow_group = [parameter for parameter in parameters if id(parameter) not in fast_ids]
        fast_group = [parameter for parameter in parameters if id(parameter) in fast_ids]
        for group, peak in ((slow_group, rate), (fast_group, rate * settings.lora_plus_ratio)):
            if group:
                param_groups.append({"params": group, "lr": peak, "peak": peak})
    return _build(param_groups, settings)


def _build(param_groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """An optimiser of the chosen class with its options."""
    optimizer_class = _import_class(settings)
    options = settings.extra_options
    usual = dict(settings.optimizer_class.fixed)
    if (
        settings.optimizer == "adamw"
        and param_groups[0]["params"][0].device.type == "cuda"
        and "foreach" not in options
    ):
        usual["fused"] = True  # one kernel for all; and it alone skips what a GradScaler rejects without being asked
    known = set(inspect.signature(optimizer_class).parameters) - _RESERVED_ARGUMENTS - {"kwargs"}
    unknown = [name for name in options if name not in known]
    if unknown:
        raise SettingsError(
            f"The optimizer {settings.optimizer} has no option '{unknown[0]}' ({suggest('optimizer_options')}).",
            f"Choose from: {', '.join(sorted(known))}. Learning rates and {suggest('weight_decay')} are separate "
            "settings.",
        )
    try:
        optimizer: torch.optim.Optimizer = optimizer_class(
            param_groups,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            **{**usual, **options},
        )
    except Exception as error:  # packages have types of their own for a bad value
        raise SettingsError(
            f"The optimizer {settings.optimizer} rejects {suggest('optimizer_options')} "
            f"'{settings.optimizer_options}': {error}.",
            "Correct the value, or remove the option.",
        ) from error
    return optimizer


def _import_class(settings: TrainSettings) -> Any:
    """The optimiser's class.

    Raises:
        SettingsError: Its package is missing, too old, or can't be loaded.
    """
    source = settings.optimizer_class
    package, _, oldest = source.requirement.partition(">=")
    optimizer = suggest("optimizer", settings.optimizer)
    command = f'"{sys.executable}" -m pip install -U "{source.requirement}"'
    remedy = (
        f"Install it: {command} (pip install {package}), or choose {suggest('optimizer', 'adamw')} or "
        f"{suggest('optimizer', 'adafactor')}{usual_rate(settings)}."
    )
    try:
        module = importlib.import_module(source.module)
        if package and _version_numbers(importlib.metadata.version(package)) < _version_numbers(oldest):
            raise SettingsError(f"{optimizer} needs {source.requirement}; an older version is installed.", remedy)
    except ImportError as error:
        raise SettingsError(
            f"{optimizer} needs the package {package}, which is not installed ({error}).", remedy
        ) from error
    except (OSError, RuntimeError) as error:  # a library of its own that does not fit the system
        raise SettingsError(
            f"{optimizer} needs the package {package}, which can't be loaded: {error}.", remedy
        ) from error
    return getattr(module, source.name)


def usual_rate(settings: TrainSettings) -> str:
    """What to add to the advice to choose another optimiser, since prodigy's learning rate is a factor of about 1."""
    return f", with {suggest('learning_rate', 1e-4)}" if settings.optimizer == "prodigy" else ""


def _version_numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def require_optimizer(settings: TrainSettings, device: torch.device | None = None) -> None:
    """Try the optimiser on one small parameter, to report problems before any long work.

    Args:
        settings: Optimiser and options.
        device: Where training runs; None: not known yet, so an optimiser with custom kernels takes no step.

    Raises:
        SettingsError: Its package is missing or does not work on the device, or an option is unknown or rejected.
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
            warnings.simplefilter("ignore")  # they are repeated when training begins
            optimizer.step()
            torch.isfinite(parameter).all().item()  # waits for the device, which reports an error late
    except Exception as error:
        options = suggest("optimizer_options")
        with_options = f" with {options} '{settings.optimizer_options}'" if settings.optimizer_options else ""
        raise SettingsError(
            f"{suggest('optimizer', settings.optimizer)} does not work on {device or 'cpu'}{with_options}: {error}.",
            f"Correct {options}, update the optimiser's package, or choose {suggest('optimizer', 'adamw')} or "
            f"{suggest('optimizer', 'adafactor')}{usual_rate(settings)}.",
        ) from error


def restore_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Continue from a saved state; a paged optimiser gets its state in paged memory again.

    The state of a GPU's fused kernel also works on a device where PyTorch has no such kernel.

    Args:
        optimizer: The optimiser, or accelerate's wrapper of it.
        state: What its `state_dict()` was.
    """
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        if group.get("fused") and group["params"][0].device.type != "cuda":
            group["fused"] = False
    unwrapped = getattr(optimizer, "optimizer", optimizer)
    if not getattr(unwrapped, "is_paged", False):
        return
    for parameter, tensors in unwrapped.state.items():
        for name in {"state1", "state2"} & set(tensors):  # bitsandbytes puts these on the device when it loads
            paged = unwrapped.get_state_buffer(parameter, dtype=tensors[name].dtype)
            paged.copy_(tensors[name])
            tensors[name] = paged


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def learning_rate_factor(optimizer: torch.optim.Optimizer, settings: TrainSettings) -> Callable[[int], float]:
    """Step → factor of the learning rate, from diffusers' schedules; a function, so that resuming needs no state."""
    from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler

    peak = settings.learning_rate
    if settings.lr_schedule == "polynomial" and peak <= _POLYNOMIAL_END:
        schedule = get_polynomial_decay_schedule_with_warmup(
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.steps,
            lr_end=peak / 1000,
            power=settings.lr_power,
        )
    else:
        schedule = get_scheduler(
            settings.lr_schedule,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.steps,
            num_cycles=settings.lr_cycles,
            power=settings.lr_power,
        )
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor
