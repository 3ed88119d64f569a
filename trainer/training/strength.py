"""The strength at which an adapter is best: measured like a checkpoint, with pictures from the same noise for each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..adapters.kohya import Adapter
from ..core.errors import CancelledError, TrainerError
from ..core.events import Listener, Note
from ..core.files import write_atomic
from ..evaluation.evaluator import Evaluator, best_index
from ..evaluation.generator import CachedGenerator, SampleConfig
from ..models.families.base import BaseWeights
from .gallery import AS_TRAINED, STRENGTHS_FILE, measured_strengths
from .runs.layout import RunLayout

STRENGTHS = (0.6, 0.8, 0.9, 1.0, 1.1, 1.3)
_PICTURES = "strengths"  # folder in the run's, while it is being measured


@dataclass(frozen=True)
class StrengthMeasurement:
    """How an adapter is measured.

    Attributes:
        base: The base model.
        evaluator: Opens what has prompts, references and the models that score.
        config: How the pictures are generated.
        device: Where.
        precision: "fp32", "bf16" or "fp16".
        listener: Gets the progress; may stop the work.
    """

    base: BaseWeights
    evaluator: Callable[[], Evaluator]
    config: SampleConfig
    device: torch.device
    precision: str
    listener: Listener

    def record(self, run: RunLayout, step: int, adapter: Adapter) -> None:
        """Measure the adapter of a run's step at `STRENGTHS`, and keep the best in the run's folder.

        What fails is reported, and nothing is kept: the adapter itself is trained by now.

        Args:
            run: The run; `gallery.preferred_strength` reads it there.
            step: Whose adapter it is.
            adapter: The adapter.

        Raises:
            CancelledError: The listener asked to stop; the finished pictures are kept, and are not generated again.
        """
        pictures = run.path / _PICTURES
        try:
            scores = self._scores(adapter, run)
            best = STRENGTHS[best_index([scores[strength] for strength in STRENGTHS])]
            entry = {"strength": best, "scores": {f"{strength:g}": metrics for strength, metrics in scores.items()}}
            strengths = measured_strengths(run) | {str(step): entry}
            write_atomic(run.path / STRENGTHS_FILE, json.dumps(strengths, indent=1).encode())
        except CancelledError:
            raise
        except TrainerError as error:
            note = f"The best strength could not be measured, and {AS_TRAINED:g} is recommended: {error}"
            self.listener.report(Note(note, warning=True))
            return
        shutil.rmtree(pictures, ignore_errors=True)
        self.listener.report(Note(f"Best strength by fidelity and drift: {best:g}."))

    def _scores(self, adapter: Adapter, run: RunLayout) -> dict[float, Mapping[str, float]]:
        """Strength → metrics."""
        evaluator = self.evaluator()
        generator = CachedGenerator(self.base, run.path / _PICTURES, self.device, self.precision, self.listener)
        try:
            with torch.no_grad():
                return {
                    strength: evaluator.evaluate(
                        generator, [(adapter, strength)], self.config, f"strength {strength:g}"
                    ).metrics
                    for strength in STRENGTHS
                }
        finally:
            generator.close()
