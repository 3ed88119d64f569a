"""Compares methods of merging a subject and a style on the demo world.

    python benchmarks/merging.py [--seeds 3] [--out benchmarks/results] [--sheets docs]

The striped dog of demo/subject and the pixel art of demo/style are trained apart, and merged by every method. Each
result draws prompts that neither was trained on: the dog as pixel art, in places where it never was. Reported, as mean
and spread over the seeds:
    subject    how far the drawing's features (the demo's scorer) lie on the way from plain dogs and other things (0) to
               the subject (1), along the direction that tells them apart best (Fisher 1936) in the world's pictures
    style      1 - r / r0, where r is how much a picture differs from its own 16 x 16 squares and r0 the same of the
               world's smooth pictures: 0 is smooth, 1 is pixel art
    both       mean over the drawings of the product of the two, each cut to [0, 1]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import kinds
import numpy as np
import torch
from kinds import DEMO, PLACES, RECIPE, ROOT, Bench
from palette import COLORS, jitter
from PIL import Image
from things import THINGS
from torch import Tensor
from world import compose, pixelate, subject_picture

from trainer.adapters.kohya import Adapter
from trainer.core.events import SilentListener
from trainer.core.figures import SheetRow, contact_sheet
from trainer.data.images import load_pictures
from trainer.merging.merge import WeightedAdapter, merge
from trainer.merging.ziplora import learned_merge
from trainer.models.sampling import GenerationConfig, generate
from trainer.settings.merge import LearnedMergeSettings, MergeSettings
from trainer.settings.train import TrainSettings

PROMPT = "pixel, a sks dog {}"
SUBJECT: dict[str, Any] = {"rank": 8, "targets": "attention-mlp"}
STYLE: dict[str, Any] = {"rank": 16, "targets": "all", "steps": 800, "batch_size": 4, "learning_rate": 6e-4}
STRONGER = 1.3
METHODS: dict[str, dict[str, Any]] = {
    "sum": {},
    "svd 16": {"method": "svd", "rank": 16},
    "ties": {"method": "ties"},
    "dare": {"method": "dare"},
    "orthogonal": {"method": "orthogonal"},
}
LEARNED: dict[str, Any] = {
    "subject_prompt": "a photo of sks dog",
    "style_prompt": "pixel, a red cat on the grass | pixel, a house at night | pixel, a blue car | pixel, a tree",
    "resolution": 64,
    "guidance": 4.0,
}
DRAWN, KNOWN = 8, 24  # drawings of each prompt, true pictures of each kind and place


class Judge:
    """Scores drawings by what the world's own program draws."""

    def __init__(self, scorer: kinds.Scorer) -> None:
        self._scorer, rng = scorer, random.Random(0)
        subject = [subject_picture(place, rng) for place in PLACES for _ in range(KNOWN)]
        others = [
            compose(thing, jitter(COLORS[rng.choice(list(COLORS))], rng), place, rng)
            for place in PLACES
            for thing in ["dog"] * KNOWN + list(THINGS) * 3
        ]
        self._smooth = statistics.mean(map(roughness, [*subject, *others]))
        first, second = (scorer.features([*known, *map(pixelate, known)]) for known in (subject, others))
        inside = torch.cat([one - one.mean(dim=0) for one in (first, second)])
        covariance = inside.T @ inside / len(inside)
        covariance += 0.1 * covariance.diagonal().mean() * torch.eye(len(covariance))
        self._direction = torch.linalg.solve(covariance, first.mean(dim=0) - second.mean(dim=0))
        self._ends = [float(one.mean(dim=0) @ self._direction) for one in (second, first)]

    def scores(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """Means of subject, style and both over pictures."""
        low, high = self._ends
        subject = ((self._scorer.features(pictures) @ self._direction - low) / (high - low)).clamp(0, 1)
        style: Tensor = torch.tensor([1 - roughness(one) / self._smooth for one in pictures]).clamp(0, 1)
        return {
            "subject": float(subject.mean()),
            "style": float(style.mean()),
            "both": float((subject * style).mean()),
        }


def roughness(picture: Image.Image) -> float:
    """Mean squared difference of a picture, in [0, 1], from its own 16 x 16 squares."""
    pixels, squares = (np.asarray(one, dtype=float) / 255 for one in (picture, pixelate(picture)))
    return float(np.square(pixels - squares).mean())


def train_two(bench: Bench, seed: int) -> tuple[Adapter, Adapter]:
    """The subject's adapter, with class pictures, and the style's."""
    common = {**RECIPE, "save_precision": "fp32", "seed": seed}
    style = load_pictures(DEMO / "style", "pixel", SilentListener())
    subject = bench.train(bench.subject, TrainSettings(**{**common, **SUBJECT}))
    return subject.adapter, bench.train(style, TrainSettings(**{**common, **STYLE})).adapter


def results(bench: Bench, subject: Adapter, style: Adapter, seed: int) -> dict[str, list[tuple[Adapter, float]]]:
    """Row of the table → adapters to draw with."""
    parts = [WeightedAdapter(subject, "subject"), WeightedAdapter(style, "style")]
    found = {"base": [], "subject alone": [(subject, 1.0)], "style alone": [(style, 1.0)]}
    for name, values in METHODS.items():
        found[name] = [(merge(parts, MergeSettings(**values)).adapter, 1.0)]
    strong = [replace(part, strength=STRONGER, text_strength=STRONGER) for part in parts]
    found[f"sum at {STRONGER}"] = [(merge(strong, MergeSettings()).adapter, 1.0)]
    for name, split in (("learned", {}), ("learned, paper", {"split": 0.0})):
        settings = LearnedMergeSettings(**LEARNED, **split, seed=seed)
        learned = learned_merge(bench.base, *parts, settings, torch.device("cpu"), SilentListener())
        found[name] = [(learned.adapter, 1.0)]
    return found


def drawings(bench: Bench, adapters: list[tuple[Adapter, float]]) -> list[Image.Image]:
    """`DRAWN` pictures of the prompt in each place; the same noise for every result."""
    model = bench.model(bench.base, adapters)
    texts = [PROMPT.format(place) for place in PLACES]
    config = GenerationConfig(width=64, height=64, steps=25, guidance=4.0)
    return [one for text in texts for one in generate(model, text, range(DRAWN), config)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--sheets", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    scores: dict[str, list[dict[str, float]]] = {}
    rows: list[SheetRow] = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        judge = Judge(bench.scorer)
        for seed in range(arguments.seeds):
            for name, adapters in results(bench, *train_two(bench, seed), seed).items():
                drawn = drawings(bench, adapters)
                scores.setdefault(name, []).append(judge.scores(drawn))
                print(seed, name, json.dumps(scores[name][-1]), flush=True)
                if seed == 0:
                    rows.append(SheetRow(name, tuple(drawn[::2])))
    table = as_markdown(scores)
    print(table)
    (arguments.out / "merging.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "merging.md").write_text(table, encoding="utf-8")
    titles = tuple(place.split()[-1] for place in PLACES for _ in range(DRAWN // 2))
    sheet = contact_sheet(f"{PROMPT.format('…')}, where it never was   (first seed)", titles, rows, 80)
    sheet.save(arguments.sheets / "merging.png")


def as_markdown(scores: dict[str, list[dict[str, float]]]) -> str:
    """The table for people."""
    lines = ["| | subject | style | both |", "|---|---|---|---|"]
    for name, runs in scores.items():
        cells = []
        for figure in ("subject", "style", "both"):
            values = [run[figure] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
