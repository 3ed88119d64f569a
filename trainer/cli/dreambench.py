"""DreamBench (Ruiz et al. 2023, section 4): an adapter for every subject of a data set, its pictures, their scores.

Unfinished work continues: a run is found by its fingerprint, a generated picture by its own.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters.kohya import Adapter, read_adapter
from ..core.devices import pick_device, pick_precision
from ..core.errors import SettingsError
from ..core.events import Listener, Note, SilentListener
from ..core.files import explained_os_errors, write_atomic
from ..core.prompts import PromptWords, without_token
from ..data.class_images import generate_class_images
from ..data.images import Picture, load_pictures
from ..dreambooth import train
from ..evaluation.evaluator import Evaluator
from ..evaluation.feature_extractors import CLIP, DINO, FeatureExtractors
from ..evaluation.generator import CachedGenerator, SampleConfig
from ..evaluation.metrics import CLIP_I, CLIP_T, DINO_I, DRIFT_METRICS, FIDELITY_METRICS
from ..models.families.base import BaseWeights
from ..settings.evaluate import DreamBenchCommand
from ..settings.train import PriorSettings, TrainSettings
from ..training.adapter import StartingPoint
from ..training.preflight import require_trainable
from ..training.runs.folder import RunPaths

PROMPTS_FILE = "prompts_and_classes.txt"
PUBLISHED = {  # Ruiz et al. 2023, table 1: 30 subjects, DINO ViT-S/16 and CLIP ViT-B/32
    "real pictures, as published": {DINO_I: 0.774, CLIP_I: 0.885},
    "DreamBooth on Stable Diffusion, as published": {DINO_I: 0.668, CLIP_I: 0.803, CLIP_T: 0.305},
}
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class BenchSubject:
    """One subject of the data set.

    Attributes:
        name: Name of its folder.
        noun: Its class.
        prompts: With "{0}" for the rare word and "{1}" for the class.
    """

    name: str
    noun: str
    prompts: Sequence[str]

    def prompts_with(self, token: str) -> list[str]:
        """The prompts of its pictures."""
        return [prompt.replace("{0}", token).replace("{1}", self.noun) for prompt in self.prompts]


def read_subjects(data: Path, live: Sequence[str], only: Sequence[str] = ()) -> list[BenchSubject]:
    """The subjects of a data set as the DreamBooth paper published it.

    Args:
        data: Its folder: a folder of pictures for each subject, and `prompts_and_classes.txt`.
        live: Classes that get the prompts for live subjects.
        only: Names of the wanted subjects; empty: all that have a folder.

    Raises:
        StorageError: The file can't be read.
        SettingsError: It names no subjects or prompts, or a wanted subject has no folder.
    """
    path = data / PROMPTS_FILE
    with explained_os_errors(path):
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    nouns = dict(re.findall(r"^([\w-]+),([^\n'(]+)$", text, re.MULTILINE))
    nouns.pop("subject_name", None)
    with_folder = {name: noun.strip() for name, noun in nouns.items() if (data / name).is_dir()}
    missing = [name for name in only if name not in with_folder]
    if missing:
        raise SettingsError(f"{data} has no subject {missing[0]}.", f"Choose from: {', '.join(with_folder)}.")
    object_part, _, live_part = text.partition("Live Subject Prompts")
    object_prompts = _prompts_in(object_part)
    live_prompts = _prompts_in(live_part)
    subjects = [
        BenchSubject(name, noun, live_prompts if noun in live else object_prompts)
        for name, noun in with_folder.items()
        if not only or name in only
    ]
    without_prompts = next((subject for subject in subjects if not subject.prompts), None)
    if not subjects or without_prompts:
        lack = (
            f"no prompts for a {without_prompts.noun}" if without_prompts else "no subject that has a folder beside it"
        )
        raise SettingsError(
            f"{path} names {lack}.",
            "Use the file of the DreamBooth dataset, with its classes, object prompts and live subject prompts.",
        )
    return subjects


def _prompts_in(text: str) -> list[str]:
    return re.findall(r"^\s*'(.+)'\.format\(", text, re.MULTILINE)


def dreambench(
    base: BaseWeights, settings: DreamBenchCommand, extractors: FeatureExtractors, listener: Listener
) -> dict[str, Path]:
    """Train on every subject, generate and score; the table is written again after each.

    Args:
        base: The opened base model.
        settings: What to train and generate.
        extractors: The models that the scores come from.
        listener: Gets every event; may stop the work.

    Returns:
        "table.md" and "table.json" → file.

    Raises:
        TrainerError: See `dreambooth.train` and `comparison.compare_candidates`.
        CancelledError: The listener asked to stop; the same call continues.
    """
    subjects = read_subjects(settings.data, settings.live.split(), settings.subjects.split())
    start = read_adapter(settings.start_from) if settings.start_from else None
    require_trainable(
        base,
        _train_settings(settings),
        _run_paths(settings),
        StartingPoint(start),
        words=[PromptWords(settings.token)],
        captions=[_caption(settings, "subject")],
    )
    for subject in subjects:
        _evaluator(subject, settings, extractors, SilentListener())  # fails before the first training
    scores: dict[str, Metrics] = {}
    real: dict[str, Metrics] = {}
    files: dict[str, Path] = {}
    for number, subject in enumerate(subjects, 1):
        listener.report(Note(f"{subject.name}, {number} of {len(subjects)}"))
        evaluator = _evaluator(subject, settings, extractors, listener)
        scores[subject.name] = _train_and_score(base, subject, evaluator, start, settings, listener)
        real[subject.name] = evaluator.reference_metrics()
        files = _write_table(settings.output_dir, subjects, scores, real, extractors)
    return files


def _caption(settings: DreamBenchCommand, noun: str) -> str:
    return f"a photo of {settings.token} {noun}"


def _train_settings(settings: DreamBenchCommand, **changes: str) -> TrainSettings:
    return TrainSettings.checked({name: getattr(settings, name) for name in TrainSettings.model_fields} | changes)


def _run_paths(settings: DreamBenchCommand) -> RunPaths:
    return RunPaths(output=settings.output_dir, runs=settings.output_dir / "runs")


def _evaluator(
    subject: BenchSubject, settings: DreamBenchCommand, extractors: FeatureExtractors, listener: Listener
) -> Evaluator:
    """The evaluator of a subject; its references are the training pictures."""
    pictures = load_pictures(settings.data / subject.name, _caption(settings, subject.noun), listener)
    return Evaluator(extractors, pictures, subject.prompts_with(settings.token), settings.token, listener)


def _train_and_score(
    base: BaseWeights,
    subject: BenchSubject,
    evaluator: Evaluator,
    start: Adapter | None,
    settings: DreamBenchCommand,
    listener: Listener,
) -> Metrics:
    """Train on one subject and generate pictures of it; returns their scores."""
    device = pick_device(settings.device)
    precision = pick_precision(settings.precision, device)
    result = train(
        base,
        subject=evaluator.references,
        priors=_class_pictures(base, subject, settings, listener) if settings.prior_count else [],
        settings=_train_settings(settings, name=subject.name),
        paths=_run_paths(settings),
        device=settings.device,
        listener=listener,
        starting_point=StartingPoint(start),
        words=[PromptWords(settings.token, subject.noun)],
    )
    config = SampleConfig(
        width=settings.resolution,
        height=settings.resolution,
        scheduler=settings.scheduler,
        steps=settings.picture_steps,
        guidance=settings.guidance,
        count=settings.count,
        seed=settings.picture_seed,
        batch_size=settings.picture_batch_size,
    )
    generator = CachedGenerator(base, settings.output_dir / "pictures", device, precision, listener)
    with torch.no_grad():
        evaluation = evaluator.evaluate(generator, [(result.adapter, 1.0)], config, subject.name, prior=settings.drift)
    generator.close()
    return evaluation.metrics


def _class_pictures(
    base: BaseWeights, subject: BenchSubject, settings: DreamBenchCommand, listener: Listener
) -> Sequence[Picture]:
    device = pick_device(settings.device)
    class_prompt = without_token(_caption(settings, subject.noun), settings.token)
    given = settings.model_dump(include=set(PriorSettings.model_fields), exclude_unset=True)
    priors = PriorSettings.checked({**given, "class_prompt": class_prompt})
    return generate_class_images(
        base,
        priors,
        resolution=settings.resolution,
        root=settings.output_dir / "class-pictures",
        device=device,
        precision=pick_precision(settings.precision, device),
        listener=listener,
    )


def _write_table(
    folder: Path,
    subjects: Sequence[BenchSubject],
    scores: Mapping[str, Metrics],
    real: Mapping[str, Metrics],
    extractors: FeatureExtractors,
) -> dict[str, Path]:
    """Write the table as Markdown and as JSON.

    Args:
        folder: Where to.
        subjects: All of them.
        scores: Name of a subject → the scores of its generated pictures, as far as it is trained.
        real: Name of a subject → the scores of its real pictures, each compared with the others.
        extractors: The models that the scores come from.

    Returns:
        "table.md" and "table.json" → file.
    """
    nouns = {subject.name: subject.noun for subject in subjects}
    table: dict[str, Metrics] = {f"{name} ({nouns[name]})": metrics for name, metrics in scores.items()}
    table["mean"] = _means(scores)
    table["real pictures, each left out of its own"] = _means(real)
    order = [FIDELITY_METRICS[DINO], FIDELITY_METRICS[CLIP], CLIP_T, *DRIFT_METRICS.values()]
    columns = [name for name in order if name in table["mean"]]
    lines = [f"| {' | '.join(['subject', *columns])} |", "|---" * (1 + len(columns)) + "|"]
    for title, metrics in {**table, **PUBLISHED}.items():
        cells = [f"{metrics[name]:.3f}" if name in metrics else "–" for name in columns]
        lines.append(f"| {' | '.join([title, *cells])} |")
    models = {name: model.name for name, model in extractors.models.items()}
    lines += ["", *(f"{name}: {model}." for name, model in models.items())]
    facts = {
        "subjects": {name: dict(metrics) for name, metrics in scores.items()},
        "real": {name: dict(metrics) for name, metrics in real.items()},
        "mean": table["mean"],
        "models": models,
    }
    contents = {"table.md": "\n".join(lines) + "\n", "table.json": json.dumps(facts, indent=1) + "\n"}
    for name, content in contents.items():
        write_atomic(folder / name, content.encode())
    return {name: folder / name for name in contents}


def _means(rows: Mapping[str, Metrics]) -> dict[str, float]:
    """Mean of every metric over the subjects that have it."""
    names = dict.fromkeys(name for metrics in rows.values() for name in metrics)
    return {name: statistics.mean(metrics[name] for metrics in rows.values() if name in metrics) for name in names}
