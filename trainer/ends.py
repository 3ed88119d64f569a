"""The two ends of a run: what it builds upon beside the base model, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .kohya import Adapter


@dataclass(frozen=True)
class Stage:
    """What a run builds upon beside the base model.

    Attributes:
        start: An adapter to go on training.
        stacked: Adapters that were applied to the base, with their strengths; for a file that holds them, too.
    """

    start: Adapter | None = None
    stacked: Sequence[tuple[Adapter, float]] = ()


@dataclass(frozen=True)
class TrainResult:
    """What a run gives.

    Attributes:
        adapter: The trained adapter as it stands in the file; of full fine-tuning the extracted one.
        path: The adapter file.
        run: The run's folder, with its checkpoints.
        step: Step whose weights the files hold: the last, unless the run stopped early.
        started_from: Step from which this call went on; equal to the number of steps if the run was finished.
        checkpoint: The checkpoint file of full fine-tuning; None otherwise.
    """

    adapter: Adapter
    path: Path
    run: Path
    step: int
    started_from: int
    checkpoint: Path | None
