"""What can go wrong, said in two parts: what is wrong, and what to do about it."""

from __future__ import annotations


class TrainerError(Exception):
    """Something a user can mend.

    Args:
        problem: What is wrong; names the file, the key or the value.
        remedy: What to do about it, as an instruction.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}\n→ {self.remedy}"


class SettingsError(TrainerError):
    """A setting has a value that can't be used, or two settings contradict each other."""


class PicturesError(TrainerError):
    """The pictures or their captions can't be used."""


class WeightsError(TrainerError):
    """The base model can't be read or is not one that can be trained."""


class UnsupportedModelError(WeightsError):
    """The base model was recognised, but its family is not supported."""


class AdapterError(TrainerError):
    """An adapter file can't be read, or does not fit the model."""


class StorageError(TrainerError):
    """A file or folder can't be written or read: permissions, a full disk, damaged run state."""


class DivergedError(TrainerError):
    """The loss or the weights became NaN or infinite."""


class OutOfMemoryError(TrainerError):
    """The device's memory does not suffice."""


class CancelledError(Exception):
    """The listener asked to stop. What was done so far is kept.

    Attributes:
        step: Steps completed before the stop.
        steps: Steps that the run was to have.
    """

    def __init__(self, step: int = 0, steps: int = 0) -> None:
        super().__init__(f"stopped after step {step} of {steps}")
        self.step = step
        self.steps = steps
