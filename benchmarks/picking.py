"""Scores every checkpoint of runs on the demo world, with and without class pictures, and compares the one that is
picked with the truth.

    python benchmarks/picking.py [--seeds 3] [--out benchmarks/results] [--sheets docs]
    python benchmarks/picking.py --again    # picks once more, from the figures of the last time
    python benchmarks/picking.py --smoke --out FOLDER --sheets FOLDER    # only tries it out

Every run learns the striped dog of demo/subject for 800 steps and keeps a checkpoint every 100.
`trainer.evaluation.comparison` generates and scores pictures as `python -m trainer compare` does, in places where the
subject never was. Reported, as mean and spread over the seeds:
    CLIP-I, CLIP-T, drift   what the comparison measures, against the five pictures of the subject
    truth      CLIP-I (the demo's scorer) between the generated pictures and what the world's own program draws in those
               places, which nothing that picks has seen
    picked     truth of the picked checkpoint over the truth of the best one
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kinds import DEMO, PICTURES_PER_PROMPT, PLACES, RECIPE, Bench, add_arguments

from trainer.core.events import SilentListener
from trainer.core.figures import figure_as_picture
from trainer.core.garbage import own_process
from trainer.dreambooth import train
from trainer.evaluation.comparison import (
    Comparison,
    ComparisonRow,
    base_candidate,
    checkpoint_candidates,
    compare_candidates,
)
from trainer.evaluation.comparison_report import as_contact_sheet
from trainer.evaluation.evaluator import Evaluator, best_index
from trainer.evaluation.feature_extractors import CLIP, FeatureExtractors
from trainer.evaluation.generator import CachedGenerator, SampleConfig
from trainer.evaluation.metrics import CLIP_T, DRIFT_METRICS, FIDELITY_METRICS
from trainer.settings.train import TrainSettings
from trainer.training.runs.folder import RunFolder, RunPaths

VARIANTS = ("with priors", "without")
SETTINGS: dict[str, Any] = {**RECIPE, "steps": 800, "checkpoint_every": 100, "targets": "attention-mlp", "rank": 8}
METRICS = {FIDELITY_METRICS[CLIP]: "fidelity", CLIP_T: "following", DRIFT_METRICS[CLIP]: "drift"}


def train_and_compare(bench: Bench, extractors: FeatureExtractors, seed: int, variant: str) -> Comparison:
    """Train one run, and score its checkpoints."""
    listener = SilentListener()
    folder = bench.folder
    result = train(
        bench.base,
        subject=bench.subject,
        priors=bench.priors if variant == VARIANTS[0] else [],
        settings=bench.effort.limited(TrainSettings(**SETTINGS, seed=seed)),
        paths=RunPaths(output=folder / "out", runs=folder / "runs"),
        device="cpu",
        listener=listener,
    )
    prompts = [f"a photo of sks dog {place}" for place in PLACES]
    evaluator = Evaluator(extractors, bench.subject, prompts, "sks", listener)
    generator = CachedGenerator(bench.base, folder / "pictures", torch.device("cpu"), "fp32", listener)
    candidates = [base_candidate(), *checkpoint_candidates(RunFolder(result.run).adapters(), "run")]
    config = SampleConfig(
        count=PICTURES_PER_PROMPT, width=64, height=64, steps=bench.effort.sampling_steps, guidance=4.0
    )
    return compare_candidates(generator, evaluator, candidates, [config])


def truth(bench: Bench, row: ComparisonRow) -> float:
    """Likeness of a row's pictures to the world's own."""
    return bench.fidelity([picture.open() for picture in row.result.pictures])


def as_markdown(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The tables for people."""
    names = [f"{variant}: {name}" for variant in VARIANTS for name in (*METRICS.values(), "truth")]
    lines = [f"| step | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for index, step in enumerate(runs[VARIANTS[0]][0]["steps"]):
        cells = [
            spread([run[name][index] for run in runs[variant]]) for variant in VARIANTS for name in (*METRICS, "truth")
        ]
        lines.append(f"| {step or 'base'} | {' | '.join(cells)} |")
    lines += ["", "| | picked step | of the best truth | fidelity | drift |", "|---|---|---|---|---|"]
    for variant in VARIANTS:
        picks = [run["steps"].index(run["picked"]) for run in runs[variant]]
        shares = [run["truth"][pick] / max(run["truth"]) for run, pick in zip(runs[variant], picks, strict=True)]
        fidelity, _, drift = (
            [run[name][pick] for run, pick in zip(runs[variant], picks, strict=True)] for name in METRICS
        )
        steps = ", ".join(str(run["picked"]) for run in runs[variant])
        worst = f"{statistics.mean(shares):.1%} (worst {min(shares):.1%})"
        lines.append(f"| {variant} | {steps} | {worst} | {spread(fidelity)} | {spread(drift)} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    mean = round(statistics.mean(values), 3) + 0.0  # no minus before a zero
    return f"{mean:.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def curves(runs: dict[str, list[dict[str, Any]]]) -> Any:
    """Fidelity and drift over the steps; the picked checkpoints are highlighted."""
    from matplotlib.figure import Figure

    panels = ((FIDELITY_METRICS[CLIP], "fidelity (CLIP-I)"), (DRIFT_METRICS[CLIP], "drift of the class"))
    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    for panel, (name, title) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), panel)
        for variant, color in zip(VARIANTS, ("tab:blue", "tab:orange"), strict=True):
            for number, run in enumerate(runs[variant]):
                axes.plot(run["steps"], run[name], color=color, alpha=0.6, label=None if number else variant)
                index = run["steps"].index(run["picked"])
                axes.plot(run["picked"], run[name][index], "*", color=color, markersize=13)
        axes.set_xlabel("step")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure_as_picture(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    add_arguments(parser)
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    figures = arguments.out / "picking.json"
    if arguments.again:
        runs = pick_again(json.loads(figures.read_text(encoding="utf-8")))
    else:
        runs = train_and_compare_all(arguments)
    table = as_markdown(runs)
    print(table)
    figures.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "picking.md").write_text(table, encoding="utf-8")
    curves(runs).save(arguments.sheets / "picking.png")


def pick_again(runs: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The same figures, with the checkpoint that is picked now."""
    for run in (run for variant in VARIANTS for run in runs[variant]):
        candidates = [{name: run[name][index] for name in METRICS} for index in range(1, len(run["steps"]))]
        run["picked"] = run["steps"][1 + best_index(candidates)]
    return runs


def train_and_compare_all(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The figures of all runs."""
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), arguments.effort)
        extractors = FeatureExtractors.open(str(DEMO / "scorer"), "", torch.device("cpu"))
        for seed in range(arguments.seeds):
            for variant in VARIANTS:
                comparison = train_and_compare(bench, extractors, seed, variant)
                assert comparison.best is not None
                facts: dict[str, Any] = {"steps": [row.candidate.step or 0 for row in comparison.rows]}
                facts |= {name: [row.metrics[name] for row in comparison.rows] for name in METRICS}
                facts["truth"] = [truth(bench, row) for row in comparison.rows]
                facts["picked"] = comparison.best.candidate.step
                runs[variant].append(facts | {"real": dict(comparison.reference_metrics)})
                print(seed, variant, json.dumps(facts), flush=True)
                if not seed and variant == VARIANTS[0]:
                    as_contact_sheet(comparison, 80).save(arguments.sheets / "checkpoints.png")
    return runs


if __name__ == "__main__":
    with own_process():
        main()
