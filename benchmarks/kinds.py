"""Compares kinds of adapters on the demo world at equal numbers of parameters, and shows two-stage training.

    python benchmarks/kinds.py [--seeds 3] [--out benchmarks/results] [--sheets docs]
    python benchmarks/kinds.py --family flux2    # kinds alone, on the world's FLUX.2 klein
    python benchmarks/kinds.py --smoke --out FOLDER --sheets FOLDER    # only tries it out

Every kind learns the striped dog of demo/subject with the same class pictures, steps and batch; its rank is the
largest that keeps it within the parameters of the first row. Reported, as mean and spread over the seeds:
    fidelity   CLIP-I (the demo's scorer) between generated pictures of the subject in places where no picture showed
               it, and what the world's own program draws there; "base" and "truth" are the ends of the scale
    dog drift, other drift   1 - CLIP-I between the base's and the tuned model's pictures of a plain dog, and of other
               things, from the same noise: 0 is an untouched prior
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
sys.dont_write_bytecode = True

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from world import subject_picture  # noqa: E402

from trainer.adapters.apply import merge_into  # noqa: E402
from trainer.adapters.kohya import Adapter  # noqa: E402
from trainer.cli.demo import BASES  # noqa: E402
from trainer.core.events import SilentListener  # noqa: E402
from trainer.core.figures import SheetRow, contact_sheet  # noqa: E402
from trainer.core.garbage import own_process  # noqa: E402
from trainer.data.class_images import generate_class_images  # noqa: E402
from trainer.data.images import Picture, load_pictures  # noqa: E402
from trainer.dreambooth import TrainResult, train  # noqa: E402
from trainer.models.families.base import BaseWeights, DiffusionModel  # noqa: E402
from trainer.models.open import open_base  # noqa: E402
from trainer.models.sampling import GenerationConfig, generate  # noqa: E402
from trainer.settings.train import PriorSettings, TrainSettings  # noqa: E402
from trainer.training.adapter import StartingPoint, TrainableAdapter  # noqa: E402
from trainer.training.runs.folder import RunPaths  # noqa: E402

DEMO = ROOT / "demo"
PLACES = ("in the snow", "on the beach", "in the water")
OTHERS = ("a photo of a blue cat on the grass", "a photo of a red car on the beach", "a photo of a flower at night")
TWO_STAGES = ("a photo of sks dog", "pixel, a red cat")
PICTURES_PER_PROMPT = 4
RECIPE: dict[str, Any] = {
    "name": "x",
    "steps": 400,
    "batch_size": 2,
    "checkpoint_every": 0,
    "resolution": 64,
    "learning_rate": 4e-4,
}
FIRST = {"rank": 8}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA attention": {"targets": "attention"},
    "LoRA att+MLP": {"targets": "attention-mlp"},
    "LoRA + text": {"targets": "attention-mlp", "text_encoder_lr": 1e-4},
    "LoCon": {"targets": "all"},
    "rsLoRA": {"targets": "attention-mlp", "rank_stabilized": True, "learning_rate": 2e-4},
    "DoRA": {"targets": "attention-mlp", "adapter": "dora"},
    "LoHa": {"targets": "attention-mlp", "adapter": "loha", "learning_rate": 1.2e-3},
    "LoKr": {"targets": "attention-mlp", "adapter": "lokr", "lokr_factor": 4, "learning_rate": 1.2e-3},
}


@dataclass(frozen=True)
class Effort:
    """How much is done of everything.

    Attributes:
        training_steps: At most so many steps are trained.
        sampling_steps: Denoising steps of a picture.
        class_pictures: At most so many pictures of a class.
        tiny: Whether a small base with random weights takes the place of the demo's.
    """

    training_steps: int
    sampling_steps: int
    class_pictures: int
    tiny: bool

    def limited(self, settings: TrainSettings) -> TrainSettings:
        """The settings of a run that trains no more steps than these."""
        steps = min(self.training_steps, settings.steps)
        every = settings.checkpoint_every and max(1, settings.checkpoint_every * steps // settings.steps)
        return settings.model_copy(update={"steps": steps, "checkpoint_every": every})


WITH_TEXT_ENCODER = "LoRA + text"
"""The kind that there is not where a language model encodes prompts."""

FULL = Effort(training_steps=1_000_000, sampling_steps=25, class_pictures=1_000, tiny=False)
SMOKE = Effort(training_steps=2, sampling_steps=1, class_pictures=2, tiny=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where figures and pictures go, and how much is done."""
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--sheets", type=Path, default=ROOT / "docs")
    parser.add_argument(
        "--smoke",
        dest="effort",
        action="store_const",
        const=SMOKE,
        default=FULL,
        help="only try it out: two steps, random weights",
    )


class Scorer:
    """CLIP image features of the demo world."""

    def __init__(self) -> None:
        from transformers import CLIPModel

        self._clip: Any = CLIPModel.from_pretrained(DEMO / "scorer", torch_dtype=torch.float32).eval()

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Normalised features, (images, width)."""
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
        pooled = self._clip.vision_model(pixel_values=pixels).pooler_output
        return torch.nn.functional.normalize(self._clip.visual_projection(pooled), dim=-1)


@dataclass(frozen=True)
class Scores:
    """What one run gives; see the module's description."""

    fidelity: float
    dog_drift: float
    other_drift: float
    seconds: float
    bytes: int


class Bench:
    """The base, its pictures before training, the truth, and the class pictures."""

    def __init__(self, folder: Path, effort: Effort = FULL, family: str = "sd1") -> None:
        self.folder = folder
        self.effort = effort
        self.scorer = Scorer()
        if effort.tiny and family == "sd1":
            self.base = open_base(tiny_base(folder), DEMO / "base" / "tokenizer")
        else:
            self.base = open_base(DEMO / BASES[family][0])
        self.subject = load_pictures(DEMO / "subject", "a photo of sks dog", SilentListener())
        self.priors = self.class_pictures("a photo of a dog", 32)
        rng = random.Random(0)
        truth = [[subject_picture(place, rng) for _ in range(8)] for place in PLACES]
        self.truth = [self.scorer.features(pictures) for pictures in truth]
        self.before = self.generate(self.model(self.base, []))

    def class_pictures(self, prompt: str, count: int) -> list[Picture]:
        """Class pictures of a prompt, by the base."""
        settings = PriorSettings(
            class_prompt=prompt,
            prior_count=min(count, self.effort.class_pictures),
            prior_scheduler="ddim",
            prior_steps=self.effort.sampling_steps,
            prior_guidance=4.0,
            prior_guidance_start=0.0,
            prior_guidance_end=1.0,
        )
        folder = self.folder / "priors"
        cpu = torch.device("cpu")
        return generate_class_images(self.base, settings, 64, folder, cpu, "fp32", SilentListener())

    def model(self, base: BaseWeights, adapters: Sequence[tuple[Adapter, float]]) -> DiffusionModel:
        """A model in float32 with adapters merged into it."""
        built = base.family.build(base)
        for network in (built.denoiser, built.vae, *built.text_encoders.values()):
            torch.nn.Module.float(network)
        for adapter, strength in adapters:
            merge_into(built, adapter, strength)
        return built

    def generate(self, model: DiffusionModel) -> dict[str, list[Image.Image]]:
        """Pictures of the subject, a plain dog, and other things; the same noise for every model."""
        prompts = {
            "subject": [f"a photo of sks dog {place}" for place in PLACES],
            "dog": [f"a photo of a dog {place}" for place in PLACES],
            "other": list(OTHERS),
        }
        return {
            kind: [image for prompt in of_kind for image in self.images(model, prompt)]
            for kind, of_kind in prompts.items()
        }

    def images(self, model: DiffusionModel, prompt: str, count: int = PICTURES_PER_PROMPT) -> list[Image.Image]:
        """Pictures of a prompt; the same noise for every model and prompt."""
        config = GenerationConfig(width=64, height=64, steps=self.effort.sampling_steps, guidance=4.0)
        if self.effort.tiny:  # one picture, as often as many are wanted
            return generate(model, prompt, range(1), config) * count
        return generate(model, prompt, range(count), config)

    def scores(self, result: TrainResult, after: dict[str, list[Image.Image]], seconds: float) -> Scores:
        """The figures of one run."""
        return Scores(
            fidelity=self.fidelity(after["subject"]),
            dog_drift=self.drift(after, "dog"),
            other_drift=self.drift(after, "other"),
            seconds=seconds,
            bytes=result.path.stat().st_size,
        )

    def fidelity(self, images: list[Image.Image]) -> float:
        """Mean CLIP-I to the truth of each place."""
        by_place = self.scorer.features(images).split(PICTURES_PER_PROMPT)
        return statistics.mean(
            float((features @ truth.T).mean()) for features, truth in zip(by_place, self.truth, strict=True)
        )

    def drift(self, after: dict[str, list[Image.Image]], kind: str) -> float:
        """1 - CLIP-I between before and after, pair by pair."""
        features_before = self.scorer.features(self.before[kind])
        features_after = self.scorer.features(after[kind])
        return 1 - float((features_before * features_after).sum(dim=1).mean())

    def train(
        self,
        subject: list[Picture],
        settings: TrainSettings,
        starting_point: StartingPoint | None = None,
        base: BaseWeights | None = None,
    ) -> TrainResult:
        """Train in a folder of its own."""
        out = Path(tempfile.mkdtemp(dir=self.folder))
        return train(
            base or self.base,
            subject=subject,
            priors=self.priors if subject is self.subject else [],
            settings=self.effort.limited(settings),
            paths=RunPaths(output=out, runs=out / "runs"),
            device="cpu",
            starting_point=starting_point,
        )


def tiny_base(folder: Path) -> Path:
    """A small checkpoint with random weights."""
    sys.path.append(str(ROOT / "tests" / "support"))
    from checkpoints import sd15_checkpoint
    from helpers import TINY

    return sd15_checkpoint(folder / "tiny.safetensors", size=TINY)


def count_parameters(base: BaseWeights, settings: TrainSettings) -> int:
    """How many numbers these settings train."""
    trainable = TrainableAdapter(base.family.build(base), settings)
    return sum(parameter.numel() for parameter in trainable.parameters())


def with_largest_rank(base: BaseWeights, values: dict[str, Any], limit: int) -> TrainSettings:
    """The settings with the largest rank that keeps them within `limit` parameters."""
    largest = TrainSettings(**{**values, "rank": 1})
    for rank in range(2, 65):
        settings = TrainSettings(**{**values, "rank": rank})
        if count_parameters(base, settings) > limit * 1.02:
            break
        largest = settings
    return largest


def compare_kinds(
    bench: Bench, seeds: int, report: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[SheetRow]]:
    """Train every kind with every seed; rows of the table, and of the contact sheet."""
    first = next(iter(KINDS.values()))
    limit = count_parameters(bench.base, TrainSettings(**{**RECIPE, **FIRST, **first}))
    table = []
    sheet_rows = [sheet_row("base", bench.before)]
    for name, values in KINDS.items():
        settings = with_largest_rank(bench.base, {**RECIPE, **values}, limit)
        scores: list[Scores] = []
        for seed in range(seeds):
            began = time.perf_counter()
            result = bench.train(bench.subject, settings.model_copy(update={"seed": seed}))
            seconds = time.perf_counter() - began
            after = bench.generate(bench.model(bench.base, [(result.adapter, 1.0)]))
            scores.append(bench.scores(result, after, seconds))
            if seed == 0:
                sheet_rows.append(sheet_row(name, after))
        row: dict[str, Any] = {
            "kind": name,
            "rank": settings.rank,
            "learning_rate": settings.learning_rate,
            "parameters": count_parameters(bench.base, settings),
        }
        for figure in ("fidelity", "dog_drift", "other_drift", "seconds"):
            by_seed = [getattr(of_seed, figure) for of_seed in scores]
            row[figure] = [statistics.mean(by_seed), statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0]
        table.append(row | {"bytes": scores[0].bytes})
        report(json.dumps(table[-1]))
    return table, sheet_rows


def sheet_row(label: str, images: dict[str, list[Image.Image]]) -> SheetRow:
    """Two pictures of the subject and one of a plain dog in each place."""
    return SheetRow(label, tuple(images["subject"][::2] + images["dog"][::PICTURES_PER_PROMPT]))


def as_markdown(table: list[dict[str, Any]], ends: dict[str, float], seeds: int) -> str:
    """The table for people."""
    lines = [
        f"Fidelity of the base {ends['base']:.3f}, of the truth {ends['truth']:.3f}; mean ± spread of {seeds} seeds.",
        "",
        "| kind | rank | lr | parameters | file | fidelity | dog drift | other drift |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        figures = [f"{row[name][0]:.3f} ± {row[name][1]:.3f}" for name in ("fidelity", "dog_drift", "other_drift")]
        lines.append(
            f"| {row['kind']} | {row['rank']} | {row['learning_rate']:g} | {row['parameters'] / 1e3:.0f} k | "
            f"{row['bytes'] / 1e3:.0f} kB | {' | '.join(figures)} |"
        )
    return "\n".join(lines) + "\n"


def two_stages(bench: Bench) -> tuple[dict[str, float], list[SheetRow]]:
    """Pixel art first, then the subject on top of it: the second file stacked on the first, and combined with it."""
    from trainer.adapters.apply import apply_to_base

    style = load_pictures(DEMO / "style", "pixel", SilentListener())
    values = {**RECIPE, "rank": 8, "targets": "attention-mlp", "save_precision": "fp32"}
    concept = bench.train(style, TrainSettings(**values, seed=1)).adapter
    base_with_concept = apply_to_base(bench.base, [(concept, 1.0)])
    starting_point = StartingPoint(stacked=[(concept, 1.0)])
    second = bench.train(bench.subject, TrainSettings(**values), starting_point, base_with_concept).adapter
    combined = bench.train(
        bench.subject, TrainSettings(**values, combine=True), starting_point, base_with_concept
    ).adapter
    adapters_of: dict[str, list[tuple[Adapter, float]]] = {
        "base": [],
        "concept": [(concept, 1.0)],
        "second alone": [(second, 1.0)],
        "stacked": [(concept, 1.0), (second, 1.0)],
        "combined": [(combined, 1.0)],
    }
    prompts = [f"{text} {place}" for text in TWO_STAGES for place in PLACES]
    images: dict[str, list[Image.Image]] = {}
    figures: dict[str, float] = {}
    for name, adapters in adapters_of.items():
        model = bench.model(bench.base, adapters)
        images[name] = [bench.images(model, prompt)[0] for prompt in prompts]
        figures[f"fidelity, {name}"] = bench.fidelity(bench.generate(model)["subject"])
    differences = [
        int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())
        for one, other in zip(images["stacked"], images["combined"], strict=True)
    ]
    figures["largest difference of a pixel, stacked and combined"] = max(differences)
    return figures, [SheetRow(name, tuple(of_name)) for name, of_name in images.items()]


def report_kinds(bench: Bench, arguments: argparse.Namespace) -> None:
    """Write the table and the contact sheet of the kinds."""
    cosines_by_place = [features @ features.T for features in bench.truth]
    off_diagonal = ~torch.eye(8, dtype=torch.bool)
    ends = {
        "base": bench.fidelity(bench.before["subject"]),
        "truth": statistics.mean(float(cosines[off_diagonal].mean()) for cosines in cosines_by_place),
    }
    table, rows = compare_kinds(bench, arguments.seeds, print)
    text = as_markdown(table, ends, arguments.seeds)
    print(text)
    (arguments.out / f"{arguments.stem}.json").write_text(json.dumps({"ends": ends, "table": table}, indent=1) + "\n")
    (arguments.out / f"{arguments.stem}.md").write_text(text, encoding="utf-8")
    places = [place.split()[-1] for place in PLACES]
    titles = [place for place in places for _ in range(2)] + [f"dog, {place}" for place in places]
    caption = "a photo of sks dog …, where it never was; then a photo of a dog …   (first seed)"
    contact_sheet(caption, titles, rows, 80).save(arguments.sheets / f"{arguments.stem}.png")


def report_two_stages(bench: Bench, arguments: argparse.Namespace) -> None:
    """Write the figures and the contact sheet of two-stage training."""
    figures, rows = two_stages(bench)
    print(json.dumps(figures, indent=1))
    (arguments.out / "two-stage.json").write_text(json.dumps(figures, indent=1) + "\n")
    titles = tuple(place.split()[-1] for _ in TWO_STAGES for place in PLACES)
    caption = "left: {} …   right: {} …   (concept: pixel art; second: the dog on top of it)".format(*TWO_STAGES)
    contact_sheet(caption, titles, rows, 96).save(arguments.sheets / "two-stage.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    add_arguments(parser)
    parser.add_argument("--only", nargs="*", help="kinds to run")
    parser.add_argument("--family", choices=BASES, default="sd1", help="of the demo's base")
    parser.add_argument("--part", choices=("both", "kinds", "two-stage"), default="both")
    arguments = parser.parse_args()
    arguments.stem = "kinds" if arguments.family == "sd1" else f"kinds-{arguments.family}"
    if arguments.family != "sd1":
        del KINDS[WITH_TEXT_ENCODER]
        arguments.part = "kinds"  # two stages are shown on Stable Diffusion
    for name in [name for name in KINDS if arguments.only and name not in arguments.only]:
        del KINDS[name]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), arguments.effort, arguments.family)
        if arguments.part != "two-stage":
            report_kinds(bench, arguments)
        if arguments.part != "kinds":
            report_two_stages(bench, arguments)


if __name__ == "__main__":
    with own_process():
        main()
