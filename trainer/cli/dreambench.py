"""DreamBench (Ruiz et al. 2023, section 4): every subject of a data set is learned, drawn by the prompts, and scored.

What was begun goes on: a run is found by its fingerprint, a drawn picture by its own.
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
from ..core.prompts import without_token
from ..data.class_images import generate_class_images
from ..data.images import load_pictures
from ..dreambooth import train
from ..evaluation.evaluator import DRIFT, FIDELITY, FOLLOWING, Evaluation
from ..evaluation.feature_extractors import CLIP, DINO, FeatureExtractors
from ..evaluation.generator import CachedGenerator, Drawing
from ..models.families.base import BaseWeights
from ..settings.evaluate import DreamBenchCommand
from ..settings.train import PriorSettings, TrainSettings
from ..training.adapter import StartingPoint
from ..training.preflight import require_trainable

PROMPTS_FILE = "prompts_and_classes.txt"
PUBLISHED = {  # Ruiz et al. 2023, table 1: 30 subjects, DINO ViT-S/16 and CLIP ViT-B/32
    "real pictures, as published": {"DINO": 0.774, "CLIP-I": 0.885},
    "DreamBooth on Stable Diffusion, as published": {"DINO": 0.668, "CLIP-I": 0.803, "CLIP-T": 0.305},
}
_TRAINING = set(TrainSettings.model_fields)


@dataclass(frozen=True)
class BenchSubject:
    """One subject of the data set.

    Attributes:
        name: Of its folder.
        noun: Its class.
        prompts: With "{0}" for the rare word and "{1}" for the class.
    """

    name: str
    noun: str
    prompts: Sequence[str]

    def prompts_with(self, token: str) -> list[str]:
        """What to draw."""
        return [prompt.replace("{0}", token).replace("{1}", self.noun) for prompt in self.prompts]


def read_subjects(data: Path, live: Sequence[str], only: Sequence[str] = ()) -> list[BenchSubject]:
    """The subjects of a data set as the DreamBooth paper published it.

    Args:
        data: Its folder: a folder of pictures for each subject, and `prompts_and_classes.txt`.
        live: Classes that get the prompts for live subjects.
        only: Names of the wanted subjects; empty: all that have a folder.

    Raises:
        StorageError: The file can't be read.
        SettingsError: It names no subjects or prompts, or one that is wanted has no folder.
    """
    path = data / PROMPTS_FILE
    with explained_os_errors(path):
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    nouns = dict(re.findall(r"^([\w-]+),([^\n'(]+)$", text, re.MULTILINE))
    nouns.pop("subject_name", None)
    objects, _, living = text.partition("Live Subject Prompts")
    kinds = [re.findall(r"^\s*'(.+)'\.format\(", part, re.MULTILINE) for part in (objects, living)]
    unknown = [name for name in only if name not in nouns or not (data / name).is_dir()]
    if unknown:
        raise SettingsError(
            f"{data} has no subject {unknown[0]}.",
            f"Choose from: {', '.join(n for n in nouns if (data / n).is_dir())}.",
        )
    found = [
        BenchSubject(name, noun.strip(), kinds[1] if noun.strip() in live else kinds[0])
        for name, noun in nouns.items()
        if (data / name).is_dir() and (not only or name in only)
    ]
    empty = next((one for one in found if not one.prompts), None)
    if not found or empty:
        raise SettingsError(
            f"{path} names {f'no prompts for a {empty.noun}' if empty else 'no subject that has a folder beside it'}.",
            "Take the file of the DreamBooth data set, with its classes, object prompts and live subject prompts.",
        )
    return found


def dreambench(
    base: BaseWeights, settings: DreamBenchCommand, judges: FeatureExtractors, listener: Listener
) -> dict[str, Path]:
    """Train, draw and score every subject; the table is written anew after each.

    Args:
        base: The opened base model.
        settings: What to train and draw.
        judges: The models.
        listener: Told of everything; may stop the work.

    Returns:
        "table.md" and "table.json" → file.

    Raises:
        TrainerError: As `dreambooth.train` and `comparison.compare` raise.
        CancelledError: The listener asked to stop; the same call goes on.
    """
    subjects = read_subjects(settings.data, settings.live.split(), settings.subjects.split())
    start = read_adapter(settings.start_from) if settings.start_from else None
    require_trainable(base, _training(settings), start, settings.output_dir, settings.output_dir / "runs")
    for subject in subjects:
        _evaluation(subject, settings, judges, SilentListener())  # what is wrong comes first
    rows: dict[str, dict[str, float]] = {}
    real: dict[str, dict[str, float]] = {}
    files: dict[str, Path] = {}
    for number, subject in enumerate(subjects, 1):
        listener.report(Note(f"{subject.name}, {number} of {len(subjects)}"))
        evaluation = _evaluation(subject, settings, judges, listener)
        rows[subject.name] = _bench(base, subject, evaluation, start, settings, listener)
        real[subject.name] = evaluation.real()
        files = _write(settings.output_dir, subjects, rows, real, judges)
    return files


def _training(settings: DreamBenchCommand, **changes: str) -> TrainSettings:
    return TrainSettings.checked({name: getattr(settings, name) for name in _TRAINING} | changes)


def _evaluation(
    subject: BenchSubject, settings: DreamBenchCommand, judges: FeatureExtractors, listener: Listener
) -> Evaluation:
    """What a subject is measured by; its references are what it is learned from."""
    pictures = load_pictures(settings.data / subject.name, f"a photo of {settings.token} {subject.noun}", listener)
    return Evaluation(judges, pictures, subject.prompts_with(settings.token), settings.token, listener)


def _bench(
    base: BaseWeights,
    subject: BenchSubject,
    evaluation: Evaluation,
    start: Adapter | None,
    settings: DreamBenchCommand,
    listener: Listener,
) -> dict[str, float]:
    """Train and draw one subject; its marks."""
    device, output = pick_device(settings.device), settings.output_dir
    precision = pick_precision(settings.precision, device)
    priors = []
    if settings.prior_count:
        wanted = PriorSettings.checked(
            {
                "class_prompt": without_token(f"a photo of {settings.token} {subject.noun}", settings.token),
                "prior_count": settings.prior_count,
                "prior_scheduler": settings.prior_scheduler,
                "prior_steps": settings.prior_steps,
                "prior_guidance": settings.prior_guidance,
            }
        )
        root = output / "class-pictures"
        priors = generate_class_images(base, wanted, settings.resolution, root, device, precision, listener)
    training, runs = _training(settings, name=subject.name), output / "runs"
    pictures, stage = evaluation.references, StartingPoint(start)
    result = train(base, pictures, priors, training, output, runs, settings.device, listener, stage=stage)
    studio = CachedGenerator(base, output / "pictures", device, precision, listener)
    with torch.no_grad():
        adapters = [(result.adapter, 1.0)]
        found = evaluation.draw_and_mark(studio, adapters, _drawing(settings), subject.name, prior=settings.drift)
    studio.close()
    return dict(found.marks)


def _drawing(settings: DreamBenchCommand) -> Drawing:
    return Drawing(
        settings.count,
        settings.picture_seed,
        settings.resolution,
        settings.resolution,
        settings.scheduler,
        settings.picture_steps,
        settings.guidance,
        settings.picture_batch_size,
    )


def _write(
    folder: Path,
    subjects: Sequence[BenchSubject],
    rows: Mapping[str, Mapping[str, float]],
    real: Mapping[str, Mapping[str, float]],
    judges: FeatureExtractors,
) -> dict[str, Path]:
    nouns = {one.name: one.noun for one in subjects}
    table: dict[str, Mapping[str, float]] = {f"{name} ({nouns[name]})": marks for name, marks in rows.items()}
    table["mean"] = _means(rows)
    table["real pictures, each left out of its own"] = _means(real)
    wanted = [FIDELITY[DINO], FIDELITY[CLIP], FOLLOWING, *DRIFT.values()]
    measures = [name for name in wanted if name in table["mean"]]
    lines = [f"| {' | '.join(['subject', *measures])} |", "|---" * (1 + len(measures)) + "|"]
    for title, marks in {**table, **PUBLISHED}.items():
        cells = [f"{marks[name]:.3f}" if name in marks else "–" for name in measures]
        lines.append(f"| {' | '.join([title, *cells])} |")
    models = {name: model.name for name, model in judges.models.items()}
    lines += ["", *(f"{name}: {model}." for name, model in models.items())]
    facts = {"subjects": rows, "real": real, "mean": table["mean"], "models": models}
    files = {"table.md": "\n".join(lines) + "\n", "table.json": json.dumps(facts, indent=1) + "\n"}
    for name, content in files.items():
        write_atomic(folder / name, content.encode())
    return {name: folder / name for name in files}


def _means(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean over the subjects of every measure, over those that have it."""
    measures = dict.fromkeys(name for marks in rows.values() for name in marks)
    return {name: statistics.mean(marks[name] for marks in rows.values() if name in marks) for name in measures}
