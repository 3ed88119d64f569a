"""What `python -m trainer plan` does: the memory that ways to train need, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters.kohya import read_adapter
from ..core.devices import free_memory, pick_device, pick_precision
from ..core.errors import SettingsError
from ..settings.train import PlanCommand, TrainSettings
from ..training.memory.plan import CONTEXT, GB, MemoryNeed, MemorySaving, Planner, lent_bytes, memory_savings, remedies
from .train import open_settings

_EIGHT_BIT = "adamw-8bit"
_EXPLAINED = """base: the frozen weights. trained: what is learned, its gradients, the optimiser's state.
activations: what a step keeps beside them. encoding: all that is there while pictures and captions
are encoded. previews: what is there beside the weights while one is drawn.
in all: the most at any time, with a margin of 5 % and 0.25 GB. CUDA itself takes about 0.5 GB more."""


def run_plan(settings: PlanCommand) -> str:
    """Measure every way to train that the settings allow, and some that change them; returns a table.

    Raises:
        SettingsError: The settings do not fit the model, or no memory is given and there is no CUDA GPU.
    """
    device = pick_device(settings.device)
    on_gpu = device.type == "cuda"
    if settings.memory is None and not on_gpu:
        raise SettingsError(
            "There is no CUDA GPU here whose memory could be planned.", "Give a card's memory in GB: --memory 8."
        )
    precision: str = settings.precision
    if precision == "auto":
        precision = pick_precision("auto", device) if on_gpu else "bf16"
    start = read_adapter(settings.start_from) if settings.start_from else None
    base = open_settings(settings)
    if settings.memory is None:
        memory = free_memory(device) + lent_bytes(base, settings, precision, device)
    else:
        memory = round(settings.memory * GB) - CONTEXT
    planner = Planner(base, settings, precision, start, bool(settings.prior_count))
    ways = [(lean.described(settings) or "as set", planner.need(lean)) for lean in memory_savings(settings)]
    head = (
        f"{base.family.title}, {precision}, {settings.resolution}², {settings.adapter} of rank {settings.rank}, "
        f"{settings.batch_size} × {settings.gradient_accumulation} pictures a step"
        f"{' and as many of the class' if settings.prior_count else ''}; in GB"
    )
    further = plan_advice(memory_savings(settings)[-1], settings, planner)
    further = [(f"{ways[-1][0]}, {name}", need) for name, need in further]
    lines = [head, "", *table(ways, further), "", _EXPLAINED, "", _verdict(ways, settings, memory)]
    return "\n".join(lines)


def plan_advice(lean: MemorySaving, settings: TrainSettings, planner: Planner) -> list[tuple[str, MemoryNeed]]:
    """What settings that change the result would need; the user alone chooses them.

    Args:
        lean: What is saved beside.
        settings: The run's.
        planner: Of the run.
    """
    others: list[tuple[str, dict[str, str]]] = []
    if not str(getattr(settings, "optimizer", "adamw")).startswith(_EIGHT_BIT):
        others.append((_EIGHT_BIT, {"optimizer": _EIGHT_BIT}))
    if settings.base_quantization == "none" and settings.adapter != "full":
        others += [(f"{name}nf4", {**one, "quantization": "nf4"}) for name, one in [("", {}), *_joined(others)]]
    return [(name, planner.need(lean, **changes)) for name, changes in others]


def _joined(others: Sequence[tuple[str, dict[str, str]]]) -> list[tuple[str, dict[str, str]]]:
    return [(f"{name}, ", changes) for name, changes in others]


def table(ways: Sequence[tuple[str, MemoryNeed]], further: Sequence[tuple[str, MemoryNeed]]) -> list[str]:
    """Lines of a table: ways to train that give the same, and ways that change the result."""
    width = max(len(name) for name, _ in [*ways, *further])
    columns = ["base", "trained", "activations", "encoding", "previews", "in all"]
    lines = [" " * width + "".join(f"{column:>12}" for column in columns), *(_line(*one, width) for one in ways)]
    if further:
        lines += ["and with settings that change what is learned a little:", *(_line(*one, width) for one in further)]
    return lines


def _line(name: str, need: MemoryNeed, width: int) -> str:
    numbers = (need.base, need.trained, need.activations, need.encoding, need.previews, need.total)
    return name.ljust(width) + "".join(f"{number / GB:12.2f}" if number else f"{'-':>12}" for number in numbers)


def _verdict(ways: Sequence[tuple[str, MemoryNeed]], settings: TrainSettings, memory: int) -> str:
    name = next((name for name, need in ways if need.total <= memory), None)
    if name is None:
        return f"None of these fits into {memory / GB:.1f} GB. {remedies(settings)}."
    return f"Picked for {memory / GB:.1f} GB: {name}."
