"""Fitting a run into the memory of its device: a plan before the first step, and a retry when memory runs out.

These choices are kept apart from the run's settings. They change the result only by rounding, so they are in
neither the fingerprint nor the adapter file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from ...adapters.kohya import Adapter
from ...core.devices import free_memory, used_memory
from ...core.distributed import ProcessGroup
from ...core.errors import OutOfMemoryError, suggest
from ...core.events import Listener, Note
from ...models.families.base import BaseWeights
from ...settings.train import TrainSettings
from ..runs.folder import RunFolder
from .plan import (
    GB,
    MemoryNeed,
    Plan,
    Planner,
    checkpointing_title,
    make_plan,
    memory_savings,
    remedies,
    resident_bytes,
)

ResultT = TypeVar("ResultT", covariant=True)


class Recipe(Protocol[ResultT]):
    """A run that can be attempted."""

    def run(self) -> ResultT:
        """Do everything."""

    def clean_up(self) -> None:
        """Free all memory."""


class MemoryBudget:
    """How a run is computed so that it fits. Outlives the run if that restarts after running out of memory.

    Attributes:
        device: Where the run trains.
        processes: The processes of the run.
        folder: The run's folder, once it is opened; a retry continues in it.
    """

    def __init__(self, settings: TrainSettings, device: torch.device, processes: ProcessGroup | None = None) -> None:
        """Start with everything as the user set it."""
        self.device = device
        self.processes = processes or ProcessGroup()
        self.folder: RunFolder | None = None
        self._requested = settings
        self._options = memory_savings(settings)  # fastest first
        self._chosen = 0  # index of the option in use
        self._need: MemoryNeed | None = None
        self._is_second_try = False

    def effective_settings(
        self,
        settings: TrainSettings,
        base: BaseWeights,
        start: Adapter | None,
        priors: bool,
        precision: str,
        listener: Listener,
    ) -> TrainSettings:
        """The settings to compute with; planned on a CUDA device, unless the setting `fit` is off.

        Args:
            settings: The run's; may differ from those this object was created with in what takes no memory.
            base: The base model.
            start: An adapter to start from.
            priors: Whether there are class pictures.
            precision: "fp32", "bf16" or "fp16".
            listener: Gets a note of what is chosen.
        """
        if self._requested.fit == "auto" and self.device.type == "cuda" and not self._is_second_try:
            self._plan(base, start, priors, precision, listener)
        self._chosen = self.processes.largest(self._chosen, self.device)  # all must share the samples alike
        return self._options[self._chosen].applied(settings)

    def _plan(self, base: BaseWeights, start: Adapter | None, priors: bool, precision: str, listener: Listener) -> None:
        """Choose the fastest option that fits into the memory that is free."""
        settings = self._requested
        memory = free_memory(self.device) + resident_bytes(base, settings, precision, self.device)
        planner = Planner(base, settings, precision, start, priors)
        try:
            plan = make_plan(planner, settings, memory)
        except RuntimeError as error:  # torch's own: an operation can't be computed without values
            text = f"Memory use could not be estimated ({error}), so all settings stay as they are."
            listener.report(Note(text, warning=True))
            return
        self._options = memory_savings(settings, planner.blocks)
        self._chosen = self._options.index(plan.chosen.saving)
        self._need = plan.chosen.need
        listener.report(plan_note(plan, settings))

    def report_peak(self, listener: Listener) -> None:
        """Report the memory that a planned run actually used, and the estimate."""
        if self._need is None or self._is_second_try:
            return
        used = used_memory(self.device) / GB
        planned = self._need.peak / GB
        listener.report(Note(f"Peak GPU memory allocated was {used:.1f} GB; the estimate was {planned:.1f} GB."))

    def attempt(self, make_recipe: Callable[[], Recipe[ResultT]], listener: Listener) -> ResultT:
        """Run; if memory runs out, free everything and retry once from the newest checkpoint with less memory.

        Args:
            make_recipe: Makes the run around this object.
            listener: Gets a note of the retry.

        Raises:
            OutOfMemoryError: Memory ran out again, or nothing more can be saved.
        """
        while True:
            recipe = make_recipe()
            try:
                return recipe.run()
            except OutOfMemoryError:
                if not self._may_try_again():
                    raise
            finally:
                recipe.clean_up()
            del recipe
            self._is_second_try = True
            self._chosen = self._smaller()
            step = self.folder.newest(self._requested.steps) if self.folder else 0
            origin = f"from step {step}" if step else "from the start"
            change = self._options[self._chosen].described(self._requested)
            listener.report(Note(f"Out of memory. Retrying {origin} with {change}.", warning=True))

    def _may_try_again(self) -> bool:
        """Whether there is an option that takes less; several processes would wait for each other for ever."""
        has_smaller_option = self._smaller() < len(self._options)
        allowed = self._requested.fit != "off" and self.processes.count == 1
        return allowed and has_smaller_option and not self._is_second_try

    def _smaller(self) -> int:
        """Index of the next option; since there is one more try alone, none that saves only a little."""
        smaller = range(self._chosen + 1, len(self._options))
        return next((index for index in smaller if self._options[index].checkpointing == 1), len(self._options))


def plan_note(plan: Plan, settings: TrainSettings) -> Note:
    """The message for the user about a plan."""
    saving = plan.chosen.saving
    need = plan.chosen.need.total / GB
    free = plan.memory / GB
    if not plan.fits:
        changes = saving.described(settings)
        even_with = f", even with {changes}" if changes else ""
        text = f"This training needs about {need:.1f} GB{even_with}, but only {free:.1f} GB are free."
        return Note(f"{text} {remedies(settings)}.", warning=True)
    changed = []
    if saving.checkpointing != settings.checkpointing_interval:
        changed.append(f"{checkpointing_title(saving.checkpointing)} was turned on")
    if saving.split > 1:
        changed.append(f"batches of {settings.batch_size} are computed in {saving.split} micro-batches")
    if saving.swap > settings.swap_blocks:
        changed.append(
            f"{saving.swap} blocks of the base model are swapped to system memory ({suggest('swap_blocks')})"
        )
    text = f"This training needs about {need:.1f} GB of the {free:.1f} GB that are free"
    return Note(f"{text}: {', and '.join(changed)}." if changed else f"{text}.")
