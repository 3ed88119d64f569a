"""Adapters drawn and scored side by side: adapter × scheduler × steps × prompt, and which checkpoint to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.kohya import read_adapter
from ..core.errors import AdapterError
from .evaluator import Evaluated, Evaluation, best_of
from .generator import Adapters, CachedGenerator, Drawing

BASE = "base"


@dataclass(frozen=True)
class Candidate:
    """Adapters to compare, or the base alone.

    Attributes:
        title: For people.
        load: Reads the adapters.
        step: Of a run's checkpoint; None otherwise.
        path: The file, if it is one.
    """

    title: str
    load: Callable[[], Adapters]
    step: int | None = None
    path: Path | None = None


@dataclass(frozen=True)
class ComparisonRow:
    """One contender, drawn in one way."""

    contender: Candidate
    drawing: Drawing
    evaluated: Evaluated

    @property
    def marks(self) -> Mapping[str, float]:
        """Measure → value."""
        return self.evaluated.marks


@dataclass(frozen=True)
class Comparison:
    """What was compared.

    Attributes:
        entries: Contender by contender.
        prompts: What was drawn of the subject.
        class_prompts: What was drawn of the class.
        real: The subject's own pictures among themselves: the top of the scale.
        models: Which models judged: "CLIP", "DINO" → name.
    """

    entries: Sequence[ComparisonRow]
    prompts: Sequence[str]
    class_prompts: Sequence[str]
    real: Mapping[str, float]
    models: Mapping[str, str]

    @property
    def best(self) -> ComparisonRow | None:
        """The checkpoint to keep (`evaluation.best_of`); None if there are not two of them.

        Drawn in several ways, every way has its say: the marks of a checkpoint are means over them.
        """
        found = list(dict.fromkeys(entry.contender for entry in self.entries if entry.contender.step is not None))
        if len(found) < 2:
            return None
        groups = [[entry for entry in self.entries if entry.contender == one] for one in found]
        means = [
            {name: sum(entry.marks[name] for entry in group) / len(group) for name in group[0].marks}
            for group in groups
        ]
        return groups[best_of(means)][0]


def base_alone() -> Candidate:
    """The base without any adapter."""
    return Candidate(BASE, list)


def adapter_file(path: Path, strength: float = 1.0, title: str = "", step: int | None = None) -> Candidate:
    """An adapter file at a strength; read when it is drawn."""
    shown = title or path.stem
    shown += "" if strength == 1 else f" at {strength:g}"
    return Candidate(shown, lambda: [(read_adapter(path), strength)], step, path)


def checkpoints(adapters: Mapping[int, Path], run_name: str, strength: float = 1.0) -> list[Candidate]:
    """The adapters of a run's checkpoints, by step.

    Args:
        adapters: Step → adapter file, ascending.
        run_name: For people.
        strength: Of each adapter.

    Raises:
        AdapterError: There are none.
    """
    if not adapters:
        raise AdapterError(
            f"The run {run_name} holds no adapter of any checkpoint.",
            "Give the folder of a run that trained a LoRA, below runs/; checkpoint_every sets how often it writes one.",
        )
    return [adapter_file(path, strength, f"{run_name}, step {step}", step) for step, path in adapters.items()]


def compare(
    studio: CachedGenerator,
    evaluation: Evaluation,
    contenders: Sequence[Candidate],
    drawings: Sequence[Drawing],
    *,
    prior: bool = True,
) -> Comparison:
    """Draw every contender in every way, and measure.

    Args:
        studio: Where to draw; closed afterwards.
        evaluation: Prompts, references and judges.
        contenders: What to compare.
        drawings: How to draw.
        prior: Whether to draw the class, too, and measure its drift.

    Raises:
        AdapterError: An adapter can't be read or does not fit the base.
        StorageError: The pictures can't be written.
        OutOfMemoryError: The memory does not suffice.
        CancelledError: The listener asked to stop; what is drawn is kept.
    """
    entries = []
    try:
        for contender in contenders:
            adapters = contender.load()
            for drawing in drawings:
                evaluated = evaluation.draw_and_mark(studio, adapters, drawing, contender.title, prior=prior)
                entries.append(ComparisonRow(contender, drawing, evaluated))
    finally:
        studio.close()
    models = {name: model.name for name, model in evaluation.judges.models.items()}
    return Comparison(entries, evaluation.prompts, evaluation.class_prompts, evaluation.real(), models)
