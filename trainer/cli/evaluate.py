"""What the commands score, compare and dreambench do."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..adapters.kohya import read_adapter
from ..core.devices import pick_device, pick_precision
from ..core.errors import PicturesError, SettingsError
from ..core.events import Listener, Note
from ..core.files import require_writable, require_writable_file, write_atomic
from ..data.images import load_pictures, load_references
from ..evaluation.comparison import (
    Candidate,
    Comparison,
    adapter_candidate,
    base_candidate,
    checkpoint_candidates,
    compare_candidates,
)
from ..evaluation.comparison_report import write_report
from ..evaluation.evaluator import Evaluator
from ..evaluation.feature_extractors import FeatureExtractors
from ..evaluation.generator import CachedGenerator, sample_configs
from ..evaluation.score_table import ScoreTable, score_pictures
from ..settings.evaluate import CompareCommand, DreamBenchCommand, FeatureExtractorSettings, ScoreCommand
from ..training.presets import apply_preset
from ..training.runs.folder import RunFolder
from .dreambench import dreambench, read_subjects
from .train import open_base_model, parse_strength


def run_score(settings: ScoreCommand, listener: Listener) -> ScoreTable:
    """Score pictures; returns the table, which is also written if a file is given."""
    device = pick_device(settings.device)
    if settings.output is not None:
        require_writable_file(settings.output, 1_000_000)
    pictures = load_pictures(settings.pictures, settings.prompt, listener)
    references = load_references(settings.subject, listener) if settings.subject else []
    several = next((picture for picture in pictures if picture.more_captions), None)
    if several is not None:
        raise PicturesError(
            f"{several.name} has {len(several.captions)} prompts, and a score compares with one.",
            "Write the prompt that the picture was generated from on one line, without '|'.",
        )
    extractors = _open_extractors(settings, device)
    prompts = [picture.caption for picture in pictures]
    table = score_pictures(pictures, prompts if all(prompts) else [], references, extractors, listener)
    if settings.output is not None:
        is_csv = settings.output.suffix.lower() == ".csv"
        content = table.as_csv() if is_csv else json.dumps(table.as_json(), indent=1, ensure_ascii=False) + "\n"
        write_atomic(settings.output, content.encode())
    return table


def run_compare(settings: CompareCommand, listener: Listener) -> tuple[Comparison, dict[str, Path]]:
    """Generate and score pictures with adapters side by side; returns the comparison and its files."""
    device = pick_device(settings.device)
    candidates = candidates_of(settings)
    references = load_references(settings.subject, listener)
    extractors = _open_extractors(settings, device)
    evaluator = Evaluator(extractors, references, settings.prompt_list, settings.token, listener)
    precision = pick_precision(settings.precision, device)
    base = open_base_model(settings)
    require_writable(settings.output_dir, 10_000_000)
    generator = CachedGenerator(base, settings.output_dir / "pictures", device, precision, listener)
    comparison = compare_candidates(generator, evaluator, candidates, sample_configs(settings))
    return comparison, write_report(comparison, settings.output_dir)


def run_dreambench(settings: DreamBenchCommand, listener: Listener) -> dict[str, Path]:
    """Train on every subject of a data set, generate and score; returns the files of the table."""
    read_subjects(settings.data, settings.live.split(), settings.subjects.split())  # fails before models are opened
    extractors = _open_extractors(settings, pick_device(settings.device))
    base = open_base_model(settings)
    settings = apply_preset(settings, base.family, listener)
    for text in settings.effect_notes():
        listener.report(Note(text, warning=True))
    return dreambench(base, settings, extractors, listener)


def _open_extractors(settings: FeatureExtractorSettings, device: torch.device) -> FeatureExtractors:
    return FeatureExtractors.open(settings.clip, settings.dino, device, download=settings.download)


def candidates_of(settings: CompareCommand) -> list[Candidate]:
    """The base and the adapters to compare, with unique titles.

    Raises:
        SettingsError: A file does not exist, or a run has no checkpoint of a given step.
        StorageError: A folder is not a run's.
        AdapterError: A run has no adapters, or a file is not an adapter.
    """
    files = [parse_strength(text) for text in settings.runs]
    run_count = sum(os.path.isdir(path) for path, _ in files)
    candidates = [base_candidate()] if settings.with_base else []
    for path, strength in files:
        if os.path.isdir(path):
            candidates += _candidates_of_run(RunFolder.existing(path), strength, settings, run_count)
        elif os.path.isfile(path):
            read_adapter(path)  # fails before any picture is generated
            candidates.append(adapter_candidate(path, strength))
        else:
            raise SettingsError(f"{path} is neither a file nor a folder.", "Give a run folder or an adapter file.")
    return _with_unique_titles(candidates)


def _candidates_of_run(run: RunFolder, strength: float, settings: CompareCommand, run_count: int) -> list[Candidate]:
    candidates = checkpoint_candidates(run.adapters(), run.name, strength)
    steps = [candidate.step for candidate in candidates if candidate.step is not None]
    chosen = settings.chosen_steps(steps, run_count)
    missing = [step for step in chosen if step not in steps]
    if missing:
        raise SettingsError(
            f"{run.path} has no checkpoint of step {missing[0]}.", f"It has: {', '.join(map(str, steps))}."
        )
    return [candidate for candidate in candidates if candidate.step in chosen]


def _with_unique_titles(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The same, with a number after titles that occur again."""
    counts: Counter[str] = Counter()
    unique = []
    for candidate in candidates:
        title = candidate.title
        counts[title] += 1
        unique.append(replace(candidate, title=f"{title} ({counts[title]})") if counts[title] > 1 else candidate)
    return unique
