"""Scores every checkpoint of runs on the demo world, with and without class pictures, and holds the picked one against
the truth.

    python benchmarks/picking.py [--seeds 3] [--out benchmarks/results] [--sheets docs]
    python benchmarks/picking.py --again    # picks anew from the figures of the last time

Every run learns the striped dog of demo/subject for 800 steps and keeps a checkpoint every 100.
`trainer.evaluation.comparison` draws and scores them as `python -m trainer compare` does, in places where the subject never was. Reported, as mean and
spread over the seeds:
    CLIP-I, CLIP-T, drift   what the comparison measures, against the five pictures of the subject
    truth      CLIP-I (the demo's scorer) between the drawings and what the world's own program draws in those places,
               which nothing that picks has seen
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
from kinds import DEMO, DRAWN, PLACES, RECIPE, ROOT, Bench

from trainer.core.events import SilentListener
from trainer.core.figures import figure_as_picture
from trainer.dreambooth import train
from trainer.evaluation.comparison import Comparison, ComparisonRow, base_alone, checkpoints, compare
from trainer.evaluation.comparison_report import sheet
from trainer.evaluation.evaluator import DRIFT, FIDELITY, FOLLOWING, Evaluation, best_of
from trainer.evaluation.feature_extractors import CLIP, FeatureExtractors
from trainer.evaluation.generator import CachedGenerator, Drawing
from trainer.settings.train import TrainSettings
from trainer.training.runs.checkpoint import RunFolder

WAYS = ("with priors", "without")
SETTINGS: dict[str, Any] = {**RECIPE, "steps": 800, "checkpoint_every": 100, "targets": "attention-mlp", "rank": 8}
MEASURES = {FIDELITY[CLIP]: "fidelity", FOLLOWING: "following", DRIFT[CLIP]: "drift"}


def compared(bench: Bench, judges: FeatureExtractors, seed: int, way: str) -> Comparison:
    """Train one run, and score its checkpoints."""
    quiet, cpu, folder = SilentListener(), torch.device("cpu"), bench.folder
    settings, priors = TrainSettings(**SETTINGS, seed=seed), bench.priors if way == WAYS[0] else []
    result = train(bench.base, bench.subject, priors, settings, folder / "out", folder / "runs", "cpu", quiet)
    evaluation = Evaluation(judges, bench.subject, [f"a photo of sks dog {place}" for place in PLACES], "sks", quiet)
    studio = CachedGenerator(bench.base, folder / "pictures", cpu, "fp32", quiet)
    how = Drawing(count=DRAWN, width=64, height=64, steps=25, guidance=4.0)
    return compare(studio, evaluation, [base_alone(), *checkpoints(RunFolder(result.run).adapters(), "run")], [how])


def truth(bench: Bench, entry: ComparisonRow) -> float:
    """Likeness of an entry's pictures to the world's own."""
    return bench.fidelity([one.open() for one in entry.evaluated.pictures])


def as_markdown(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The tables for people."""
    lines = [f"| step | {' | '.join(f'{way}: {name}' for way in WAYS for name in (*MEASURES.values(), 'truth'))} |"]
    lines.append("|---" * (1 + len(WAYS) * (1 + len(MEASURES))) + "|")
    for place, step in enumerate(runs[WAYS[0]][0]["steps"]):
        cells = []
        for way in WAYS:
            for name in (*MEASURES, "truth"):
                cells.append(spread([run[name][place] for run in runs[way]]))
        lines.append(f"| {step or 'base'} | {' | '.join(cells)} |")
    lines += ["", "| | picked step | of the best truth | fidelity | drift |", "|---|---|---|---|---|"]
    for way in WAYS:
        picks = [run["steps"].index(run["picked"]) for run in runs[way]]
        shares = [run["truth"][pick] / max(run["truth"]) for run, pick in zip(runs[way], picks, strict=True)]
        columns = [[run[name][pick] for run, pick in zip(runs[way], picks, strict=True)] for name in MEASURES]
        steps = ", ".join(str(run["picked"]) for run in runs[way])
        worst = f"{statistics.mean(shares):.1%} (worst {min(shares):.1%})"
        lines.append(f"| {way} | {steps} | {worst} | {spread(columns[0])} | {spread(columns[2])} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    mean = round(statistics.mean(values), 3) + 0.0  # no minus before a zero
    return f"{mean:.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def curves(runs: dict[str, list[dict[str, Any]]]) -> Any:
    """Fidelity and drift over the steps; the picked checkpoints are marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    for place, (name, title) in enumerate(((FIDELITY[CLIP], "fidelity (CLIP-I)"), (DRIFT[CLIP], "drift of the class"))):
        axes = figure.add_subplot(1, 2, 1 + place)
        for way, color in zip(WAYS, ("tab:blue", "tab:orange"), strict=True):
            for number, run in enumerate(runs[way]):
                axes.plot(run["steps"], run[name], color=color, alpha=0.6, label=None if number else way)
                at = run["steps"].index(run["picked"])
                axes.plot(run["picked"], run[name][at], "*", color=color, markersize=13)
        axes.set_xlabel("step")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure_as_picture(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--sheets", type=Path, default=ROOT / "docs")
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    figures = arguments.out / "picking.json"
    runs = picked_again(json.loads(figures.read_text(encoding="utf-8"))) if arguments.again else drawn(arguments)
    table = as_markdown(runs)
    print(table)
    figures.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "picking.md").write_text(table, encoding="utf-8")
    curves(runs).save(arguments.sheets / "picking.png")


def picked_again(runs: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The same figures, the checkpoint picked anew."""
    for run in (run for way in WAYS for run in runs[way]):
        marks = [{name: run[name][place] for name in MEASURES} for place in range(1, len(run["steps"]))]
        run["picked"] = run["steps"][1 + best_of(marks)]
    return runs


def drawn(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Train, draw and score all runs."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        bench, judges = Bench(Path(scratch)), FeatureExtractors.open(str(DEMO / "scorer"), "", torch.device("cpu"))
        for seed in range(arguments.seeds):
            for way in WAYS:
                found = compared(bench, judges, seed, way)
                assert found.best is not None
                facts: dict[str, Any] = {"steps": [entry.contender.step or 0 for entry in found.entries]}
                facts |= {name: [entry.marks[name] for entry in found.entries] for name in MEASURES}
                facts |= {
                    "truth": [truth(bench, entry) for entry in found.entries],
                    "picked": found.best.contender.step,
                }
                runs[way].append(facts | {"real": dict(found.real)})
                print(seed, way, json.dumps(facts), flush=True)
                if not seed and way == WAYS[0]:
                    sheet(found, 80).save(arguments.sheets / "checkpoints.png")
    return runs


if __name__ == "__main__":
    main()
