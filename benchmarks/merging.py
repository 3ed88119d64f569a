"""Compares methods of merging a subject and a style on the demo world.

    python benchmarks/merging.py [--seeds 3] [--out benchmarks/results] [--sheets docs]
    python benchmarks/merging.py --smoke --out FOLDER --sheets FOLDER    # only tries it out

The striped dog of demo/subject and the pixel art of demo/style are trained apart, and merged by every method. Each
result generates from prompts that neither was trained on: the dog as pixel art, in places where it never was. Reported,
as mean and spread over the seeds:
    subject    how far a picture's features (the demo's scorer) lie on the way from plain dogs and other things (0) to
               the subject (1), along the direction that separates them best (Fisher 1936) in the world's pictures
    style      1 - r / r0, where r is how much a picture differs from its own 16 x 16 squares and r0 the same of the
               world's smooth pictures: 0 is smooth, 1 is pixel art
    both       mean over the pictures of the product of the two, each cut to [0, 1]
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
from kinds import DEMO, PLACES, RECIPE, SMOKE, Bench, add_arguments
from palette import COLORS, jitter
from PIL import Image
from things import THINGS
from torch import Tensor
from world import compose, pixelate, subject_picture

from trainer.adapters.kohya import Adapter
from trainer.core.events import SilentListener
from trainer.core.figures import SheetRow, contact_sheet
from trainer.core.garbage import own_process
from trainer.data.images import load_pictures
from trainer.merging.merge import WeightedAdapter, merge
from trainer.merging.ziplora import learned_merge
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
PICTURES_PER_PROMPT = 8
TRUE_PICTURES = 24  # of each kind and place


class WorldScorer:
    """Scores pictures by what the world's own program draws."""

    def __init__(self, scorer: kinds.Scorer) -> None:
        self._scorer = scorer
        rng = random.Random(0)
        subject = [subject_picture(place, rng) for place in PLACES for _ in range(TRUE_PICTURES)]
        others = [
            compose(thing, jitter(COLORS[rng.choice(list(COLORS))], rng), place, rng)
            for place in PLACES
            for thing in ["dog"] * TRUE_PICTURES + list(THINGS) * 3
        ]
        self._smooth = statistics.mean(map(roughness, [*subject, *others]))
        of_subject = scorer.features([*subject, *map(pixelate, subject)])
        of_others = scorer.features([*others, *map(pixelate, others)])
        centred = torch.cat([features - features.mean(dim=0) for features in (of_subject, of_others)])
        covariance = centred.T @ centred / len(centred)
        covariance += 0.1 * covariance.diagonal().mean() * torch.eye(len(covariance))
        self._direction = torch.linalg.solve(covariance, of_subject.mean(dim=0) - of_others.mean(dim=0))
        self._low = float(of_others.mean(dim=0) @ self._direction)
        self._high = float(of_subject.mean(dim=0) @ self._direction)

    def scores(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """Means of subject, style and both over pictures."""
        along = self._scorer.features(pictures) @ self._direction
        subject = ((along - self._low) / (self._high - self._low)).clamp(0, 1)
        style: Tensor = torch.tensor([1 - roughness(picture) / self._smooth for picture in pictures]).clamp(0, 1)
        return {
            "subject": float(subject.mean()),
            "style": float(style.mean()),
            "both": float((subject * style).mean()),
        }


def roughness(picture: Image.Image) -> float:
    """Mean squared difference of a picture, in [0, 1], from its own 16 x 16 squares."""
    pixels = np.asarray(picture, dtype=float) / 255
    squares = np.asarray(pixelate(picture), dtype=float) / 255
    return float(np.square(pixels - squares).mean())


def train_two(bench: Bench, seed: int) -> tuple[Adapter, Adapter]:
    """The subject's adapter, with class pictures, and the style's."""
    common = {**RECIPE, "save_precision": "fp32", "seed": seed}
    style = load_pictures(DEMO / "style", "pixel", SilentListener())
    subject = bench.train(bench.subject, TrainSettings(**{**common, **SUBJECT}))
    return subject.adapter, bench.train(style, TrainSettings(**{**common, **STYLE})).adapter


def merge_all(bench: Bench, subject: Adapter, style: Adapter, seed: int) -> dict[str, list[tuple[Adapter, float]]]:
    """Row of the table → adapters to generate with."""
    inputs = [WeightedAdapter(subject, "subject"), WeightedAdapter(style, "style")]
    rows: dict[str, list[tuple[Adapter, float]]] = {
        "base": [],
        "subject alone": [(subject, 1.0)],
        "style alone": [(style, 1.0)],
    }
    for name, values in METHODS.items():
        rows[name] = [(merge(inputs, MergeSettings(**values)).adapter, 1.0)]
    stronger = [replace(weighted, strength=STRONGER, text_strength=STRONGER) for weighted in inputs]
    rows[f"sum at {STRONGER}"] = [(merge(stronger, MergeSettings()).adapter, 1.0)]
    for name, split in (("learned", {}), ("learned, paper", {"split": 0.0})):
        settings = LearnedMergeSettings(**LEARNED, **split, seed=seed)
        if bench.effort is SMOKE:
            settings = settings.model_copy(update={"steps": 2, "pictures": 2, "sampling_steps": 1})
        learned = learned_merge(bench.base, *inputs, settings, torch.device("cpu"), SilentListener())
        rows[name] = [(learned.adapter, 1.0)]
    return rows


def generate_images(bench: Bench, adapters: list[tuple[Adapter, float]]) -> list[Image.Image]:
    """`PICTURES_PER_PROMPT` pictures of the prompt in each place; the same noise for every result."""
    model = bench.model(bench.base, adapters)
    prompts = [PROMPT.format(place) for place in PLACES]
    return [image for prompt in prompts for image in bench.images(model, prompt, PICTURES_PER_PROMPT)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    add_arguments(parser)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    scores: dict[str, list[dict[str, float]]] = {}
    rows: list[SheetRow] = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), arguments.effort)
        scorer = WorldScorer(bench.scorer)
        for seed in range(arguments.seeds):
            subject, style = train_two(bench, seed)
            for name, adapters in merge_all(bench, subject, style, seed).items():
                images = generate_images(bench, adapters)
                scores.setdefault(name, []).append(scorer.scores(images))
                print(seed, name, json.dumps(scores[name][-1]), flush=True)
                if seed == 0:
                    rows.append(SheetRow(name, tuple(images[::2])))
    table = as_markdown(scores)
    print(table)
    (arguments.out / "merging.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "merging.md").write_text(table, encoding="utf-8")
    titles = tuple(place.split()[-1] for place in PLACES for _ in range(PICTURES_PER_PROMPT // 2))
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
    with own_process():
        main()
