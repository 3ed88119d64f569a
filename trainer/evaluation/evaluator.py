"""Evaluation of an adapter: generates pictures of the subject and of its class and measures them.

Fidelity, prompt following and prior drift (Ruiz et al. 2023, section 4), on pictures from the same noise for every
adapter, so that differences come from the adapters.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import PicturesError, SettingsError, suggest
from ..core.events import Listener
from ..core.prompts import without_token
from ..data.images import Picture
from .feature_extractors import CLIP, DINO, FeatureExtractors
from .generator import Adapters, CachedGenerator, SampleConfig
from .metrics import (
    CLASS_DIVERSITY,
    CLIP_SCORE,
    CLIP_T,
    DIVERSITY,
    DRIFT_METRICS,
    FIDELITY_METRICS,
    clip_score,
    clip_t,
    diversity,
    drift,
    leave_one_out_score,
    subject_score,
)

_AS_GOOD = 0.01  # relative differences of a hundredth are the noise of a few pictures


@dataclass(frozen=True)
class EvaluationResult:
    """One adapter, or the base alone.

    Attributes:
        metrics: Metric → value.
        by_prompt: The per-picture metrics as means for each prompt.
        pictures: Of the subject, prompt by prompt.
        class_pictures: Of the class, likewise; empty if they were not generated.
    """

    metrics: Mapping[str, float]
    by_prompt: Sequence[Mapping[str, float]]
    pictures: Sequence[Picture]
    class_pictures: Sequence[Picture]


class Evaluator:
    """Prompts, the subject's real pictures, and feature extractors.

    Attributes:
        extractors: The models.
        references: Real pictures of the subject.
        listener: Gets the progress; may stop the work.
        prompts: Of the subject.
        class_prompts: The same without the rare word.
    """

    def __init__(
        self,
        extractors: FeatureExtractors,
        references: Sequence[Picture],
        prompts: Sequence[str],
        token: str,
        listener: Listener,
    ) -> None:
        """Take what all adapters are measured by.

        Args:
            extractors: The models.
            references: Real pictures of the subject.
            prompts: Of the subject, with its rare word.
            token: The rare word. CLIP-T and the class pictures leave it out, since CLIP does not know it.
            listener: Gets the progress; may stop the work.

        Raises:
            SettingsError: There is no prompt, or one does not hold the rare word.
            PicturesError: There is no picture of the subject.
        """
        if not prompts:
            raise SettingsError("There are no prompts to generate from.", "Provide one or more, separated by '|'.")
        if not references:
            raise PicturesError("There are no pictures of the subject to compare with.", "Provide their folder.")
        self.extractors = extractors
        self.references = list(references)
        self.listener = listener
        self.prompts = list(prompts)
        self.class_prompts = [without_token(prompt, token) for prompt in prompts]
        for prompt, class_prompt in zip(self.prompts, self.class_prompts, strict=True):
            if prompt == class_prompt:
                raise SettingsError(
                    f"The prompt '{prompt}' does not contain the rare word '{token}', so it would not show the "
                    "subject.",
                    f"Put the rare word into every prompt, or set {suggest('token')} to the one that the adapter was "
                    "trained with.",
                )

    def evaluate(
        self,
        generator: CachedGenerator,
        adapters: Adapters,
        config: SampleConfig,
        title: str,
        *,
        prior: bool = True,
    ) -> EvaluationResult:
        """Generate the subject and its class with adapters, and the class with the base alone, and measure.

        Args:
            generator: Generates the pictures.
            adapters: Applied to the base; none: the base alone.
            config: How many pictures of each prompt, and how they are generated.
            title: What the progress is called.
            prior: Whether to generate the class, with and without the adapters, to measure the drift.
        """
        before: list[Picture] = []
        after: list[Picture] = []
        if prior:
            before = generator.generate([], self.class_prompts, config, "class pictures of the base")
        pictures = generator.generate(adapters, self.prompts, config, title)
        if prior:
            after = generator.generate(adapters, self.class_prompts, config, f"{title}, class")
        metrics = self.compute_metrics(pictures, before, after)
        return EvaluationResult(metrics, self.by_prompt(pictures), pictures, after)

    def compute_metrics(
        self, pictures: Sequence[Picture], before: Sequence[Picture], after: Sequence[Picture]
    ) -> dict[str, float]:
        """Measure pictures.

        Args:
            pictures: Of the subject, prompt by prompt, the same number of each.
            before: Of the class, generated without the adapter; may be empty.
            after: Of the class, generated with it from the same noise; in the same order.

        Returns:
            Metric → mean over the pictures; diversities are means over the prompts.
        """
        all_pictures = [*pictures, *before, *after, *self.references]
        self.extractors.image_features(all_pictures, self.listener)  # all at once is fastest
        metrics = {name: float(values.mean()) for name, values in self._metrics_by_picture(pictures).items()}
        if before:
            features_before = self.extractors.image_features(before, self.listener)
            features_after = self.extractors.image_features(after, self.listener)
            metrics |= {
                DRIFT_METRICS[name]: drift(features, features_after[name]) for name, features in features_before.items()
            }
        per_prompt = self._per_prompt(pictures)
        if per_prompt > 1:
            metrics[DIVERSITY] = self._mean_diversity(pictures, per_prompt)
            if after:
                metrics[CLASS_DIVERSITY] = self._mean_diversity(after, per_prompt)
        return metrics

    def by_prompt(self, pictures: Sequence[Picture]) -> list[dict[str, float]]:
        """Per-picture metrics as means over each prompt, in the order of the prompts."""
        per_prompt = self._per_prompt(pictures)
        by_picture = self._metrics_by_picture(pictures)
        return [
            {name: float(values[start : start + per_prompt].mean()) for name, values in by_picture.items()}
            for start in range(0, len(pictures), per_prompt)
        ]

    def reference_metrics(self) -> dict[str, float]:
        """The subject's pictures compared with each other (leave-one-out): an upper bound."""
        if len(self.references) < 2:
            return {}
        features = self.extractors.image_features(self.references, self.listener)
        return {FIDELITY_METRICS[name]: leave_one_out_score(rows) for name, rows in features.items()}

    def _per_prompt(self, pictures: Sequence[Picture]) -> int:
        return len(pictures) // len(self.prompts)

    def _metrics_by_picture(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """Metric → one value for each picture of the subject, (pictures,)."""
        features = self.extractors.image_features(pictures, self.listener)
        reference_features = self.extractors.image_features(self.references, self.listener)
        by_picture: dict[str, Tensor] = {}
        if self.extractors.reads_text:
            per_prompt = self._per_prompt(pictures)
            prompt_of_each = [prompt for prompt in self.class_prompts for _ in range(per_prompt)]
            text_features = self.extractors.text_features(prompt_of_each)
            by_picture[CLIP_T] = clip_t(features[CLIP], text_features)
            by_picture[CLIP_SCORE] = clip_score(features[CLIP], text_features)
        for name, rows in features.items():
            by_picture[FIDELITY_METRICS[name]] = subject_score(rows, reference_features[name])
        return by_picture

    def _mean_diversity(self, pictures: Sequence[Picture], per_prompt: int) -> float:
        """Diversity of each prompt's pictures, by DINO if there is one, as a mean over the prompts."""
        name = DINO if DINO in self.extractors.models else CLIP
        features = self.extractors.image_features(pictures, self.listener)[name]
        return statistics.mean(diversity(part) for part in torch.split(features, per_prompt))


def fidelity_and_drift(metrics: Mapping[str, float]) -> tuple[float, float]:
    """Fidelity and drift by DINO, the paper's first choice, else by CLIP. Without class pictures the drift is 0."""
    name = DINO if FIDELITY_METRICS[DINO] in metrics else CLIP
    return metrics[FIDELITY_METRICS[name]], metrics.get(DRIFT_METRICS[name], 0.0)


def overall_score(metrics: Mapping[str, float]) -> float:
    """Geometric mean of fidelity and prompt following, with double weight on fidelity, the purpose of training.

    Gaining one by losing the other does not improve it and, unlike a sum, it does not depend on the metrics' scales.
    Without CLIP-T it is the fidelity.
    """
    fidelity, _ = fidelity_and_drift(metrics)
    fidelity = max(0.0, fidelity)
    if CLIP_T not in metrics:
        return fidelity
    score: float = (fidelity**2 * max(0.0, metrics[CLIP_T])) ** (1 / 3)
    return score


def best_index(candidates: Sequence[Mapping[str, float]]) -> int:
    """The one to keep: of those with an `overall_score` as good as the best, the one with the least drift.

    Args:
        candidates: Metrics of each, from `Evaluator.compute_metrics`; at least one.

    Returns:
        Its index.
    """
    scores = [overall_score(metrics) for metrics in candidates]
    as_good = [index for index, score in enumerate(scores) if score >= (1 - _AS_GOOD) * max(scores)]
    return min(as_good, key=lambda index: fidelity_and_drift(candidates[index])[1])


def best_step(history: Mapping[int, Mapping[str, float]]) -> int:
    """Step of the highest fidelity after the first step; 0 if there is none.

    Args:
        history: Step → metrics.
    """
    return max((step for step in history if step), key=lambda step: fidelity_and_drift(history[step])[0], default=0)


def early_stop_step(history: Mapping[int, Mapping[str, float]], patience: int) -> int | None:
    """Step to go back to, if fidelity has not risen since then while the prior kept drifting; else None.

    Args:
        history: Step → metrics.
        patience: Number of previews that must have followed it.
    """
    best = best_step(history)
    later = sorted(step for step in history if step > best)
    if len(later) < patience or not best:
        return None
    _, drift_now = fidelity_and_drift(history[later[-1]])
    _, drift_then = fidelity_and_drift(history[best])
    return best if drift_now > drift_then else None
