"""Errors, in two parts: what is wrong, and what to do about it.

A remedy often names a setting. How a user changes it depends on the interface: a flag on the command line, a widget of
a node, a field of a web page. So the engine writes `suggest("resume", "never")` into the text, and the face that shows
the error words it by `TrainerError.remedy_in`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from typing_extensions import Self

_SUGGESTED = re.compile("⟦([a-z0-9_]+)(?:=([^⟧]*))?⟧")

Wording = Callable[[str, "str | None"], str]
"""Name of a setting, and the value that would help or None → how a face words it, such as `--resume never`."""


def suggest(setting: str, value: object = None) -> str:
    """A setting in the text of an error, with the value that would help, if any; each face words it in its own way."""
    return f"⟦{setting}⟧" if value is None else f"⟦{setting}={value}⟧"


def worded(text: str, word: Wording) -> str:
    """The text with every `suggest` in it worded by a face."""
    return _SUGGESTED.sub(lambda match: word(match[1], match[2]), text)


SWITCHED = {"True": "on", "False": "off"}  # the value of a switch, as people call it


def plain(setting: str, value: str | None) -> str:
    """The wording of a face that has none of its own: `resume`, `resume = never`, or `combine = off`."""
    if value is None:
        return setting
    return f"{setting} = {SWITCHED.get(value, value)}"


class TrainerError(Exception):
    """An error that the user can fix.

    Args:
        problem: What is wrong; names the file, the key or the value.
        remedy: What to do about it, as an instruction; settings are named by `suggest`.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self._problem = problem
        self._remedy = remedy

    @property
    def problem(self) -> str:
        """What is wrong, in plain words."""
        return self.problem_in(plain)

    @property
    def remedy(self) -> str:
        """What to do about it, in plain words."""
        return self.remedy_in(plain)

    @property
    def unworded(self) -> tuple[str, str]:
        """Problem and remedy as they are kept for a face that is not there yet: it takes `worded`."""
        return self._problem, self._remedy

    def problem_in(self, word: Wording) -> str:
        """What is wrong, worded by a face."""
        return worded(self._problem, word)

    def remedy_in(self, word: Wording) -> str:
        """What to do about it, worded by a face."""
        return worded(self._remedy, word)

    def about(self, subject: str) -> Self:
        """The same error about something that it does not name itself, such as a file."""
        return type(self)(f"{subject}: {self._problem}", self._remedy)

    def __str__(self) -> str:
        return f"{self.problem}\n→ {self.remedy}"


class SettingsError(TrainerError):
    """A setting has an invalid value, or settings contradict each other."""


class PicturesError(TrainerError):
    """The pictures or their captions can't be used."""


class WeightsError(TrainerError):
    """The base model can't be read or is not one that can be trained."""


class UnsupportedModelError(WeightsError):
    """The base model is of a known family that is not supported."""


class AdapterError(TrainerError):
    """An adapter file can't be read, or does not fit the model."""


class StorageError(TrainerError):
    """A file or folder can't be written or read: permissions, a full disk, damaged run state."""


class BusyError(StorageError):
    """Another process works in a folder that one process alone may write to."""


class DivergedError(TrainerError):
    """The loss or the weights became NaN or infinite."""

    @classmethod
    def of_loss(
        cls, loss: float, step: int, *, learning_rate: float, precision: str, kept_step: int, run: str
    ) -> DivergedError:
        """The error of a loss that is not a finite number.

        Args:
            loss: The loss.
            step: Step at which it occurred, from 1.
            learning_rate: Peak learning rate of the run.
            precision: "fp32", "bf16" or "fp16".
            kept_step: Step of the newest checkpoint before it; 0: none.
            run: The run's folder.
        """
        if step == 1:
            return cls(
                f"The base model itself gives a loss of {loss} before any training.",
                f"Choose another {suggest('precision')} (fp32 or bf16), another VAE or another checkpoint.",
            )
        safer = f" or choose {suggest('precision', 'bf16')} or fp32" if precision == "fp16" else ""
        kept = f"The adapter from step {kept_step} was saved in {run}." if kept_step else "Nothing had been saved yet."
        return cls(
            f"The loss became {loss} at step {step}; the run was stopped.",
            f"Lower {suggest('learning_rate')} (it was {learning_rate:g}){safer}, which starts a new run. {kept}",
        )


class NotFiniteError(TrainerError):
    """Numbers that were to be written or applied are NaN, infinite, or too large for their type."""


class OutOfMemoryError(TrainerError):
    """The device ran out of memory."""


class CancelledError(Exception):
    """The listener asked to stop. The work done so far is kept.

    Attributes:
        step: Steps completed before the stop.
        steps: Steps that the run was to have.
    """

    def __init__(self, step: int = 0, steps: int = 0) -> None:
        super().__init__(f"stopped after step {step} of {steps}")
        self.step = step
        self.steps = steps
