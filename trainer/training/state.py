"""Everything that changes while a run trains: saved in a checkpoint and restored from it, as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .averaging import WeightAveraging
from .optimizers import restore_optimizer
from .runs.checkpoint import Checkpoint, Measurements
from .trainable import Trainable

_SCALER = "scaler"


@dataclass(frozen=True)
class TrainingState:
    """The stateful parts of a run; the learning rate, the samples and dropout are functions of the step.

    Attributes:
        trainable: The parameters.
        optimizer: The optimiser, or accelerate's wrapper of it.
        averaging: The evaluation weights, where they are an average of the parameters.
        scaler: The gradient scaler of fp16 (`torch.amp.GradScaler`); None without.
    """

    trainable: Trainable
    optimizer: Any
    averaging: WeightAveraging
    scaler: Any = None

    def checkpoint(self, step: int, metadata: Mapping[str, str], measurements: Measurements | None) -> Checkpoint:
        """A copy of the current state on the CPU.

        Args:
            step: Steps completed.
            metadata: Of the file of what is trained.
            measurements: What was measured up to this step.
        """
        with self.averaging.evaluation_weights():
            trained = self.trainable.saved(metadata)
        return Checkpoint(
            step=step,
            trained=trained,
            optimizer=self.optimizer.state_dict(),
            extra={_SCALER: self.scaler.state_dict() if self.scaler is not None else None},
            live=self.averaging.raw_weights(),
            measurements=measurements,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same run: all later steps are the same as without the interruption.

        Raises:
            AdapterError: It is another run's.
        """
        self.trainable.restore(checkpoint.trained)
        self.averaging.restore(checkpoint.live, checkpoint.step)
        restore_optimizer(self.optimizer, checkpoint.optimizer)
        if self.scaler is not None and checkpoint.extra.get(_SCALER):
            self.scaler.load_state_dict(checkpoint.extra[_SCALER])
