"""What the command plan does: the memory that a training needs, with several options to save some, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..adapters.kohya import read_adapter
from ..core.devices import free_memory, pick_device, pick_precision
from ..core.errors import SettingsError, suggest
from ..models.families.base import BaseWeights
from ..settings.train import PlanCommand, TrainSettings
from ..training.memory.plan import (
    CUDA_CONTEXT,
    GB,
    MemoryNeed,
    MemorySaving,
    Planner,
    memory_savings,
    remedies,
    resident_bytes,
)
from .train import open_base_model

_EIGHT_BIT = "adamw-8bit"
_COLUMNS = ("base", "trained", "activations", "encoding", "previews", "total")
_EXPLANATION = """base: the frozen weights. trained: what is learned, its gradients and the optimiser's state.
activations: what a step needs in addition. encoding: the peak while pictures and captions are
encoded. previews: what generating a preview needs in addition to the weights.
total: the peak of the whole run, with a margin of 5 % and 0.25 GB. CUDA itself takes about 0.5 GB more."""


@dataclass(frozen=True)
class _Row:
    """One line of the table: an option and the memory that it needs."""

    title: str
    need: MemoryNeed


def run_plan(settings: PlanCommand) -> str:
    """Measure every option that the settings allow, and some that change them; returns a table as text.

    Settings in the text are named by `suggest`.

    Raises:
        SettingsError: The settings do not fit the model, or no memory is given and there is no CUDA GPU.
    """
    device = pick_device(settings.device)
    if settings.memory is None and device.type != "cuda":
        raise SettingsError(
            "This computer has no CUDA GPU to plan for.",
            f"Give a graphics card's memory in GB: {suggest('memory', 8)}.",
        )
    precision = _planned_precision(settings, device)
    start = read_adapter(settings.start_from) if settings.start_from else None
    base = open_base_model(settings)
    memory = _planned_memory(settings, base, precision, device)
    planner = Planner(base, settings, precision, start, priors=_trains_class_pictures(settings))
    savings = memory_savings(settings, planner.blocks)
    rows = [_Row(saving.described(settings) or "as set", planner.need(saving)) for saving in savings]
    lossy = _lossy_rows(rows[-1].title, savings[-1], settings, planner)
    lines = [
        _headline(settings, base, precision),
        "",
        *_table(rows, lossy),
        "",
        _EXPLANATION,
        "",
        _verdict(rows, settings, memory),
    ]
    return "\n".join(lines)


def _trains_class_pictures(settings: PlanCommand) -> bool:
    """Whether a pass has samples of the class, too."""
    return bool(settings.prior_count and settings.trains_class_pictures)


def _planned_precision(settings: PlanCommand, device: torch.device) -> str:
    """The precision to plan for: "auto" is that of the GPU, or that of a recent one if this computer has none."""
    if settings.precision == "auto" and device.type != "cuda":
        return "bf16"
    return settings.precision if settings.precision != "auto" else pick_precision("auto", device)


def _planned_memory(settings: PlanCommand, base: BaseWeights, precision: str, device: torch.device) -> int:
    """Bytes to plan for, without those that CUDA itself takes."""
    if settings.memory is None:
        return free_memory(device) + resident_bytes(base, settings, precision, device)
    return round(settings.memory * GB) - CUDA_CONTEXT


def _headline(settings: PlanCommand, base: BaseWeights, precision: str) -> str:
    return (
        f"{base.family.title}, {precision}, {settings.resolution}², {settings.adapter} of rank {settings.rank}, "
        f"{settings.batch_size} × {settings.gradient_accumulation} pictures per step"
        f"{' and as many class pictures' if _trains_class_pictures(settings) else ''}; in GB"
    )


def _lossy_rows(title: str, saving: MemorySaving, settings: TrainSettings, planner: Planner) -> list[_Row]:
    """Options that change the result, for the user alone to choose.

    Args:
        title: Of the option that they are added to.
        saving: That option.
        settings: The run's settings.
        planner: The run's planner.
    """
    rows = []
    eight_bit = not settings.optimizer.startswith(_EIGHT_BIT)
    four_bit = settings.base_quantization == "none" and settings.adapter != "full"
    if eight_bit:
        rows.append(_Row(f"{title}, {_EIGHT_BIT}", planner.need(saving, optimizer=_EIGHT_BIT)))
    if four_bit:
        rows.append(_Row(f"{title}, nf4", planner.need(saving, quantization="nf4")))
    if eight_bit and four_bit:
        need = planner.need(saving, optimizer=_EIGHT_BIT, quantization="nf4")
        rows.append(_Row(f"{title}, {_EIGHT_BIT}, nf4", need))
    return rows


def _table(rows: Sequence[_Row], lossy: Sequence[_Row]) -> list[str]:
    """The lines of the table: options with the same result, then those that change it."""
    width = max(len(row.title) for row in [*rows, *lossy])
    lines = [" " * width + "".join(f"{column:>12}" for column in _COLUMNS)]
    lines += [_line(row, width) for row in rows]
    if lossy:
        lines.append("with settings that change the result slightly:")
        lines += [_line(row, width) for row in lossy]
    return lines


def _line(row: _Row, width: int) -> str:
    need = row.need
    sizes = (need.base, need.trained, need.activations, need.encoding, need.previews, need.total)
    return row.title.ljust(width) + "".join(f"{size / GB:12.2f}" if size else f"{'-':>12}" for size in sizes)


def _verdict(rows: Sequence[_Row], settings: TrainSettings, memory: int) -> str:
    for row in rows:
        if row.need.total <= memory:
            return f"Chosen for {memory / GB:.1f} GB: {row.title}."
    return f"None of these fits in {memory / GB:.1f} GB. {remedies(settings)}."
