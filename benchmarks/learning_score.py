"""How well a way has learned: pictures of the demo's world, generated with an adapter, beside the truth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from judge import PLAIN, Judge, JudgeEffort, as_pixels, load_or_train, through_autoencoder
from learning_ways import CLASS_PROMPT, INSTANCE_PROMPT, TOKEN
from PIL import Image
from subjects import SUBJECTS, Subject
from torch import Tensor

from trainer.core.events import SilentListener
from trainer.data.images import Picture, load_pictures
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.feature_extractors import CLIP, FeatureExtractors
from trainer.evaluation.generator import Adapters, CachedGenerator, SampleConfig
from trainer.evaluation.metrics import CLASS_DIVERSITY, CLIP_T, DIVERSITY, DRIFT_METRICS, FIDELITY_METRICS, drift
from trainer.models.families.base import BaseWeights
from trainer.models.sampling import build_on_device

DEMO = Path(__file__).resolve().parents[1] / "demo"
PLACES = ("in the snow", "on the beach", "in the water")
"""Where no training picture shows a subject."""
OTHERS = ("a photo of a fish in the water", "a photo of a red car on the beach", "a photo of a flower at night")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Effort:
    """How much is done of everything.

    Attributes:
        steps: At most so many steps are trained.
        sampling_steps: Denoising steps of a scored picture.
        final: Pictures of each prompt at the end of a training.
        curve: Pictures of each prompt at the checkpoints before.
        class_pictures: At most so many class pictures.
        prior_steps: At most so many denoising steps of a class picture.
        truths: True pictures in each place.
        judge: How the judge is trained.
    """

    steps: int = 1_000_000
    sampling_steps: int = 10
    final: int = 3
    curve: int = 1
    class_pictures: int = 1_000
    prior_steps: int = 1_000
    truths: int = 8
    judge: JudgeEffort = field(default_factory=JudgeEffort)


SMOKE = Effort(
    steps=2,
    sampling_steps=1,
    final=2,
    curve=1,
    class_pictures=2,
    prior_steps=1,
    truths=2,
    judge=JudgeEffort(drawings=16, tested=16, epochs=1),
)


class Scorer:
    """Generates pictures of a subject, its class and other things with an adapter, and measures them.

    Attributes:
        judge: Trained on drawings.
        effort: How much is done.
    """

    def __init__(self, base: BaseWeights, work: Path, judge: Path, effort: Effort) -> None:
        """Open the scorer and the judge.

        Args:
            base: That adapters are for.
            work: Folder for pictures; can be deleted.
            judge: File of the judge; it is trained and written if it isn't there.
            effort: How much is done.
        """
        self.effort = effort
        self._work = work
        self._listener = SilentListener()
        self._vae = build_on_device(base, _CPU, "fp32").vae
        self.judge: Judge = load_or_train(judge, self._vae, effort.judge)
        self._extractors = FeatureExtractors.open(str(DEMO / "scorer"), "", _CPU)
        self._generator = CachedGenerator(base, work / "pictures", _CPU, "fp32", self._listener)

    def score(
        self, subject: Subject, adapters: Adapters, count: int, *, others: bool
    ) -> tuple[dict[str, float], list[Picture]]:
        """Generate and measure.

        Args:
            subject: What was learned.
            adapters: What it was learned as; none: the base.
            count: Pictures of each prompt.
            others: Whether to look at other things, too.

        Returns:
            The metrics, and the first picture of each prompt: of the subject, its class, and others if they were
            generated.
        """
        prompts = [f"{INSTANCE_PROMPT.format(thing=subject.thing)} {place}" for place in PLACES]
        # the class prompt has an article where the subject's has the rare word
        class_prompts = [f"{CLASS_PROMPT.format(thing=subject.thing)} {place}" for place in PLACES]
        config = SampleConfig(
            width=64, height=64, scheduler="dpm++", steps=self.effort.sampling_steps, guidance=4.0, count=count
        )
        evaluator = Evaluator(self._extractors, self._truth(subject), prompts, TOKEN, self._listener)
        evaluator.class_prompts = class_prompts
        result = evaluator.evaluate(self._generator, adapters, config, "subject")
        metrics = self._metrics(subject, result.metrics, _opened(result.pictures), _opened(result.class_pictures))
        shown = [*result.pictures[::count], *result.class_pictures[::count]]
        if others:
            config = replace(config, count=1)
            before, after = (
                self._generator.generate(generated_with, OTHERS, config, "others") for generated_with in ([], adapters)
            )
            features = [self._extractors.image_features(pictures, self._listener)[CLIP] for pictures in (before, after)]
            metrics["other_drift"] = drift(*features)
            shown += after[:: config.count]
        self._generator.close()
        return {name: round(value, 4) for name, value in metrics.items()}, shown

    def truth_metrics(self, subject: Subject) -> dict[str, float]:
        """The ends of the scale: what the world draws itself, through the autoencoder, judged as pictures are."""
        prompts = [f"{INSTANCE_PROMPT.format(thing=subject.thing)} {place}" for place in PLACES]
        evaluator = Evaluator(self._extractors, self._truth(subject), prompts, TOKEN, self._listener)
        evaluator.class_prompts = [f"{CLASS_PROMPT.format(thing=subject.thing)} {place}" for place in PLACES]
        drawn = self._truth(subject, seed=10, decoded=True)
        metrics = self._metrics(subject, evaluator.compute_metrics(drawn, [], []), _opened(drawn), [])
        return {name: round(value, 4) for name, value in metrics.items()}

    def _metrics(
        self,
        subject: Subject,
        measured: dict[str, float] | object,
        pictures: Sequence[Image.Image],
        class_pictures: Sequence[Image.Image],
    ) -> dict[str, float]:
        values = dict(measured)  # type: ignore[call-overload]
        places = [place for place in PLACES for _ in range(len(pictures) // len(PLACES))]
        recognised = self.judge.shows(pictures, subject.thing, _coat_name(subject))
        in_place = self.judge.is_in(pictures, places)
        metrics = {
            "clip_i": values[FIDELITY_METRICS[CLIP]],
            "recognised": _share(recognised),
            "recognised_mean": float(recognised.mean()),
            "clip_t": values[CLIP_T],
            "place": _share(in_place),
            "place_mean": float(in_place.mean()),
        }
        if DIVERSITY in values:
            metrics["diversity"] = values[DIVERSITY]
        if class_pictures:
            taken = self.judge.shows(class_pictures, subject.thing, _coat_name(subject))
            plain = self.judge.shows(class_pictures, subject.thing, PLAIN)
            metrics |= {
                "drift": values[DRIFT_METRICS[CLIP]],
                "taken": _share(taken),
                "plain": _share(plain),
                "plain_mean": float(plain.mean()),
            }
        if CLASS_DIVERSITY in values:
            metrics["class_diversity"] = values[CLASS_DIVERSITY]
        return metrics

    def _truth(self, subject: Subject, seed: int = 9, *, decoded: bool = False) -> list[Picture]:
        """What the world draws of a subject where no training picture shows it, place by place."""
        folder = self._work / "truth" / f"{_coat_name(subject)}-{seed}"
        if not folder.is_dir():
            rng = random.Random(seed)
            drawn = [subject.picture(place, rng) for place in PLACES for _ in range(self.effort.truths)]
            if decoded:
                drawn = as_images(through_autoencoder(self._vae, as_pixels(drawn)))
            folder.mkdir(parents=True)
            for number, picture in enumerate(drawn):
                picture.save(folder / f"{number:03d}.png")
        return load_pictures(folder, "truth", self._listener)


def objective(metrics: dict[str, float]) -> float:
    """What `search` maximises: geometric mean of recognised, in its place, and the class still plain, in [0, 1]."""
    product: float = metrics["recognised_mean"] * metrics["place_mean"] * metrics["plain_mean"]
    return product ** (1 / 3)


def as_images(pixels: Tensor) -> list[Image.Image]:
    """Pictures of (images, 3, height, width) in [-1, 1]."""
    values = ((pixels + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in values]


def _coat_name(subject: Subject) -> str:
    return next(name for name, known in SUBJECTS.items() if known is subject)


def _opened(pictures: Sequence[Picture]) -> list[Image.Image]:
    return [picture.open() for picture in pictures]


def _share(probabilities: Tensor) -> float:
    return float((probabilities > 0.5).float().mean())
