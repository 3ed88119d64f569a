"""What the commands score, compare and dreambench do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..adapters.kohya import read_adapter
from ..core.devices import pick_device, pick_precision
from ..core.errors import SettingsError
from ..core.events import Listener
from ..core.files import require_writable, write_atomic
from ..core.prompts import split_prompts
from ..data.images import load_pictures
from ..evaluation.comparison import Candidate, Comparison, adapter_file, base_alone, checkpoints, compare
from ..evaluation.comparison_report import write_report
from ..evaluation.evaluator import Evaluation
from ..evaluation.feature_extractors import FeatureExtractors
from ..evaluation.generator import CachedGenerator, drawings
from ..evaluation.score_table import ScoreTable, score_pictures
from ..settings.evaluate import CompareCommand, DreamBenchCommand, ScoreCommand
from ..training.presets import apply_preset
from ..training.runs.checkpoint import RunFolder
from .dreambench import dreambench, read_subjects
from .train import open_settings, parse_strength


def run_score(settings: ScoreCommand, listener: Listener) -> ScoreTable:
    """Score pictures; the table, which is written if a file is given."""
    device = pick_device(settings.device)
    if settings.output is not None:
        require_writable(settings.output.absolute().parent, 1_000_000)
    pictures = load_pictures(settings.pictures, settings.prompt, listener)
    references = load_pictures(settings.subject, "", listener) if settings.subject else []
    judges = FeatureExtractors.open(settings.clip, settings.dino, device, download=settings.download)
    prompts = [picture.caption for picture in pictures]
    table = score_pictures(pictures, prompts if all(prompts) else [], references, judges, listener)
    if settings.output is not None:
        is_csv = settings.output.suffix.lower() == ".csv"
        content = table.as_csv() if is_csv else json.dumps(table.as_json(), indent=1, ensure_ascii=False) + "\n"
        write_atomic(settings.output, content.encode())
    return table


def run_compare(settings: CompareCommand, listener: Listener) -> tuple[Comparison, dict[str, Path]]:
    """Draw and score adapters side by side; the comparison and its files."""
    device = pick_device(settings.device)
    chosen = contenders(settings)
    references = load_pictures(settings.subject, "", listener)
    judges = FeatureExtractors.open(settings.clip, settings.dino, device, download=settings.download)
    evaluation = Evaluation(judges, references, split_prompts(settings.prompts), settings.token, listener)
    precision, base = pick_precision(settings.precision, device), open_settings(settings)
    require_writable(settings.output_dir, 10_000_000)
    studio = CachedGenerator(base, settings.output_dir / "pictures", device, precision, listener)
    comparison = compare(studio, evaluation, chosen, drawings(settings))
    return comparison, write_report(comparison, settings.output_dir)


def run_dreambench(settings: DreamBenchCommand, listener: Listener) -> dict[str, Path]:
    """Train and score every subject of a data set; the files of the table."""
    read_subjects(settings.data, settings.live.split(), settings.subjects.split())  # what is wrong comes first
    judges = FeatureExtractors.open(
        settings.clip, settings.dino, pick_device(settings.device), download=settings.download
    )
    base = open_settings(settings)
    return dreambench(base, apply_preset(settings, base.family, listener), judges, listener)


def contenders(settings: CompareCommand) -> list[Candidate]:
    """The base and the adapters that the settings name.

    Raises:
        SettingsError: A file is not there, or a run has no checkpoint of a wanted step.
        StorageError: A folder is no run's.
        AdapterError: A run has no adapters, or a file is none.
    """
    places = [parse_strength(text) for text in settings.runs]
    folders = sum(path.is_dir() for path, _ in places)
    found = [base_alone()] if settings.with_base else []
    for path, strength in places:
        if path.is_dir():
            found += _of_run(RunFolder.existing(path), strength, settings, folders)
        elif path.is_file():
            read_adapter(path)  # what is wrong comes first
            found.append(adapter_file(path, strength))
        else:
            raise SettingsError(f"{path} is neither a file nor a folder.", "Give a run folder or an adapter file.")
    return _told_apart(found)


def _of_run(run: RunFolder, strength: float, settings: CompareCommand, runs: int) -> list[Candidate]:
    all_steps = checkpoints(run.adapters(), run.name, strength)
    there = [one.step for one in all_steps if one.step is not None]
    wanted = settings.chosen_steps(there, runs)
    missing = [step for step in wanted if step not in there]
    if missing:
        raise SettingsError(
            f"{run.path} has no checkpoint of step {missing[0]}.", f"It has: {', '.join(map(str, there))}."
        )
    return [one for one in all_steps if one.step in wanted]


def _told_apart(found: Sequence[Candidate]) -> list[Candidate]:
    """The same, with a number after titles that occur twice."""
    seen: dict[str, int] = {}
    result = []
    for one in found:
        seen[one.title] = seen.get(one.title, 0) + 1
        result.append(replace(one, title=f"{one.title} ({seen[one.title]})") if seen[one.title] > 1 else one)
    return result
