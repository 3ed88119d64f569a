"""Adapters compared side by side: adapter × scheduler × steps × prompt, and which checkpoint to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.kohya import read_adapter
from ..core.errors import AdapterError, suggest
from .evaluator import EvaluationResult, Evaluator, best_index
from .generator import Adapters, CachedGenerator, SampleConfig

BASE = "base"


@dataclass(frozen=True)
class Candidate:
    """Adapters to compare, or the base alone.

    Attributes:
        title: Its display name.
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
    """One candidate with one scheduler and number of steps."""

    candidate: Candidate
    config: SampleConfig
    result: EvaluationResult

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metric → value."""
        return self.result.metrics

    @property
    def sampler(self) -> tuple[str, int]:
        """Scheduler and number of steps."""
        return self.config.scheduler, self.config.steps


@dataclass(frozen=True)
class Comparison:
    """What was compared.

    Attributes:
        rows: Candidate by candidate.
        prompts: Prompts of the subject.
        class_prompts: Prompts of its class.
        reference_metrics: The subject's own pictures compared with each other: an upper bound.
        models: Feature extractors: "CLIP", "DINO" → name of the model.
    """

    rows: Sequence[ComparisonRow]
    prompts: Sequence[str]
    class_prompts: Sequence[str]
    reference_metrics: Mapping[str, float]
    models: Mapping[str, str]

    @property
    def samplers(self) -> list[tuple[str, int]]:
        """Every scheduler and number of steps, in the order of the rows."""
        return list(dict.fromkeys(row.sampler for row in self.rows))

    @property
    def best(self) -> ComparisonRow | None:
        """The checkpoint to keep (`evaluator.best_index`); None if there are fewer than two.

        With several schedulers or numbers of steps, a checkpoint's metrics are means over these.
        """
        checkpoints = list(dict.fromkeys(row.candidate for row in self.rows if row.candidate.step is not None))
        if len(checkpoints) < 2:
            return None
        rows_of_each = [[row for row in self.rows if row.candidate == checkpoint] for checkpoint in checkpoints]
        means = [
            {name: sum(row.metrics[name] for row in rows) / len(rows) for name in rows[0].metrics}
            for rows in rows_of_each
        ]
        return rows_of_each[best_index(means)][0]


def base_candidate() -> Candidate:
    """The base without any adapter."""
    return Candidate(BASE, list)


def adapter_candidate(path: Path, strength: float = 1.0, title: str = "", step: int | None = None) -> Candidate:
    """An adapter file at a strength; read when it is needed.

    Args:
        path: The file.
        strength: Of the adapter; named in the title unless it is 1.
        title: Its display name; empty: the file's name.
        step: Of a run's checkpoint; None otherwise.
    """
    full_title = title or path.stem
    if strength != 1:
        full_title += f" at {strength:g}"
    return Candidate(full_title, lambda: [(read_adapter(path), strength)], step, path)


def checkpoint_candidates(adapters: Mapping[int, Path], run_name: str, strength: float = 1.0) -> list[Candidate]:
    """The adapters of a run's checkpoints, by step.

    Args:
        adapters: Step → adapter file, ascending.
        run_name: For titles.
        strength: Of each adapter.

    Raises:
        AdapterError: There are none.
    """
    if not adapters:
        raise AdapterError(
            f"The run {run_name} contains no checkpoint with an adapter.",
            "Use the folder of a LoRA training run, in runs/. "
            f"{suggest('checkpoint_every')} sets how often a run saves one.",
        )
    return [adapter_candidate(path, strength, f"{run_name}, step {step}", step) for step, path in adapters.items()]


def compare_candidates(
    generator: CachedGenerator,
    evaluator: Evaluator,
    candidates: Sequence[Candidate],
    configs: Sequence[SampleConfig],
    *,
    prior: bool = True,
) -> Comparison:
    """Generate pictures with every candidate and every config, and measure them.

    Args:
        generator: Generates the pictures; closed afterwards.
        evaluator: Prompts, references and feature extractors.
        candidates: What to compare.
        configs: How to generate.
        prior: Whether to also generate the class and measure its drift.

    Raises:
        AdapterError: An adapter can't be read or does not fit the base.
        StorageError: The pictures can't be written.
        OutOfMemoryError: The device ran out of memory.
        CancelledError: The listener asked to stop; finished pictures are kept.
    """
    rows = []
    try:
        for candidate in candidates:
            adapters = candidate.load()
            for config in configs:
                result = evaluator.evaluate(generator, adapters, config, candidate.title, prior=prior)
                rows.append(ComparisonRow(candidate, config, result))
    finally:
        generator.close()
    return Comparison(
        rows=rows,
        prompts=evaluator.prompts,
        class_prompts=evaluator.class_prompts,
        reference_metrics=evaluator.reference_metrics(),
        models={name: model.name for name, model in evaluator.extractors.models.items()},
    )
