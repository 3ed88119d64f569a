"""Fitting a run into the memory of its device: a plan before the first step, and a second try when memory runs out.

What is chosen here stands beside the run's settings. It changes nothing of what is learned but rounding, so it is in
neither the fingerprint nor the adapter file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from ...adapters.kohya import Adapter
from ...core.devices import free_memory, used_memory
from ...core.distributed import ProcessGroup
from ...core.errors import OutOfMemoryError
from ...core.events import Listener, Note
from ...models.families.base import BaseWeights
from ...settings.train import TrainSettings
from ..runs.checkpoint import RunFolder
from .plan import GB, MemoryNeed, Plan, Planner, lent_bytes, make_plan, memory_savings, remedies

ResultT = TypeVar("ResultT", covariant=True)


class Recipe(Protocol[ResultT]):
    """A run that can be tried."""

    def run(self) -> ResultT:
        """Do everything."""

    def clean_up(self) -> None:
        """Give all memory back."""


class MemoryBudget:
    """How a run is computed so that it fits. Outlives the run when that begins again after its memory ran out.

    Attributes:
        device: Where the run trains.
        team: The processes of the run.
        folder: The run's folder, once it is opened; a second try goes on in it.
    """

    def __init__(self, settings: TrainSettings, device: torch.device, team: ProcessGroup | None = None) -> None:
        """Begin with everything as set."""
        self.device, self.team = device, team or ProcessGroup()
        self.folder: RunFolder | None = None
        self._settings = settings
        self._ways, self._way = memory_savings(settings), 0
        self._need: MemoryNeed | None = None
        self._tried_again = False

    def settings(
        self, base: BaseWeights, start: Adapter | None, priors: bool, precision: str, listener: Listener
    ) -> TrainSettings:
        """The settings to compute with; plans them on a CUDA device, unless the setting fit is off.

        Args:
            base: The base model.
            start: An adapter to go on from.
            priors: Whether there are class pictures.
            precision: "fp32", "bf16" or "fp16".
            listener: Told what is chosen.
        """
        settings = self._settings
        if settings.fit == "auto" and self.device.type == "cuda" and not self._tried_again:
            memory = free_memory(self.device) + lent_bytes(base, settings, precision, self.device)
            try:
                plan = make_plan(Planner(base, settings, precision, start, priors), settings, memory)
                self._way, self._need = self._ways.index(plan.chosen.lean), plan.chosen.need
                listener.report(told(plan, settings))
            except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
                text = f"The memory could not be planned ({error}), so everything stays as it is set."
                listener.report(Note(text, warning=True))
        self._way = self.team.largest(self._way, self.device)  # all must share the samples alike
        return self._ways[self._way].applied(settings)

    def tell_peak(self, listener: Listener) -> None:
        """Say what a planned run really took, beside the plan."""
        if self._need is not None and not self._tried_again:
            used, planned = used_memory(self.device) / GB, self._need.peak / GB
            listener.report(Note(f"Tensors took up to {used:.1f} GB of the GPU; {planned:.1f} GB were planned."))

    def attempt(self, make: Callable[[], Recipe[ResultT]], listener: Listener) -> ResultT:
        """Run; if the memory runs out, free everything and go on once from the newest checkpoint with less.

        Args:
            make: Makes the run anew around this object.
            listener: Told of the second try.

        Raises:
            OutOfMemoryError: The memory ran out a second time, or there is nothing left to save.
        """
        while True:
            recipe = make()
            try:
                return recipe.run()
            except OutOfMemoryError:
                hopeless = self._tried_again or self._way + 1 >= len(self._ways)
                if hopeless or self._settings.fit == "off" or self.team.count > 1:  # the others would wait for ever
                    raise
            finally:
                recipe.clean_up()
            del recipe
            self._tried_again, self._way = True, self._way + 1
            step = self.folder.newest(self._settings.steps) if self.folder else 0
            where = f"from step {step}" if step else "from the start"
            what = self._ways[self._way].described(self._settings)
            listener.report(Note(f"The memory did not suffice. Going on {where} with {what}.", warning=True))


def told(plan: Plan, settings: TrainSettings) -> Note:
    """What a plan says to the user."""
    lean, need, free = plan.chosen.lean, plan.chosen.need.total / GB, plan.memory / GB
    what = lean.described(settings)
    if not plan.fits:
        even = f", even with {what}" if what else ""
        text = f"This training needs about {need:.1f} GB, and {free:.1f} GB are free{even}. {remedies(settings)}."
        return Note(text, warning=True)
    on = ["gradient checkpointing is turned on"] if lean.checkpointing and not settings.gradient_checkpointing else []
    if lean.split > 1:
        on.append(f"a batch of {settings.batch_size} is computed in {lean.split} parts")
    facts = f"This training needs about {need:.1f} GB of the {free:.1f} GB that are free"
    return Note(f"{facts}{': ' if on else ''}{', and '.join(on)}.")
