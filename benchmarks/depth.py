"""Shows on the demo world what several subjects, captions, masks and presets do.

    python benchmarks/depth.py [subjects] [style] [masks] [presets] [--out benchmarks/results] [--sheets docs]
    python benchmarks/depth.py --smoke --out FOLDER --sheets FOLDER    # only tries it out

subjects   Two subjects in one run that trains the text encoder, too: the demo's dog and another, red and yellow, and
           the dog and a cat so coloured. "own" and "other" are CLIP-I (the demo's scorer) of a subject's generated
           pictures, in places where it never was, to what the world's program draws of it and of the other one; "told
           apart" is the share of pictures nearer to their own.
style      Pixel art from 24 pictures, with a caption for each and with one word for all. "with the word" and "without"
           are how pixelated generated pictures are (0 smooth, 1 pixel art); "content" is CLIP-I to the true pictures.
masks      The striped dog, photographed on pink fabric alone, with and without masks. "pink of the fabric" is the share
           of pixels of its colour in pictures of "a photo of sks dog"; "fidelity" is CLIP-I to the truth elsewhere.
presets    Every preset (at 64 pixels; the demo's model wants four times the usual rates and a quarter of the steps) on
           the striped dog and on the pixel art: fidelity and drift of plain dogs, pixel art with the word and without.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kinds import DEMO, PLACES, RECIPE, Bench, Effort, add_arguments
from merging import roughness
from palette import CANVAS, COLORS, SIZE
from PIL import Image
from places import background
from things import draw_thing
from world import SUBJECT_COAT, SUBJECT_PLACES, compose, pixelate, stripes

from trainer.adapters.kohya import Adapter
from trainer.core.events import SilentListener
from trainer.core.figures import SheetRow, contact_sheet
from trainer.core.garbage import own_process
from trainer.data.folder import AnnotationOptions
from trainer.data.images import Picture, load_pictures
from trainer.dreambooth import train
from trainer.settings.train import TrainSettings
from trainer.training.presets import load_preset, preset_subjects
from trainer.training.runs.folder import RunPaths

PICTURES_PER_PROMPT = 6
SECOND_TOKEN = "art painting"  # this world's small text encoder hardly distinguishes another rare word from no word
OTHERS = ("a photo of a dog", "a photo of a cat", "a photo of a car", "a photo of a robot", "a photo of a house")
FABRIC = "on pink fabric"
SILENT = SilentListener()
RED_COAT = stripes((200, 50, 60), (250, 225, 110))
TRIED = ("a red cat on the grass", "a blue car on the beach", "a green robot at night", "a yellow dog in the snow")


def write_subject(
    folder: Path, thing: str, pattern: Any, places: Sequence[str], seed: int, *, masks: bool = False
) -> Path:
    """Pictures of a thing with a pattern, one in each place, in a new folder; with files of masks if wanted."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for number, place in enumerate(places):
        picture, mask = picture_and_mask(thing, pattern, place, rng)
        picture.save(folder / f"{number}.png")
        if masks:
            mask.save(folder / f"{number}-masklabel.png")
    return folder


def picture_and_mask(thing: str, pattern: Any, place: str, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """A picture as `world.compose` draws it, and where its thing is, white on black."""
    picture = background(place, rng)
    sprite = draw_thing(thing, (0, 0, 0), pattern, None)
    width = int(CANVAS * rng.uniform(0.66, 1.0))
    sprite = sprite.rotate(rng.uniform(-9, 9), resample=Image.Resampling.BILINEAR).resize((width, width))
    room = CANVAS - width
    corner = rng.randint(0, room), rng.randint(room // 3, room)
    mask = Image.new("L", picture.size)
    mask.paste(sprite.getchannel("A"), corner)
    picture.paste(sprite, corner, sprite)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS), mask.resize((SIZE, SIZE))


class Depth:
    """The base, the scorer, and where runs take place."""

    def __init__(self, folder: Path, effort: Effort) -> None:
        self.folder = folder
        self.bench = Bench(folder, effort)
        self.scorer = self.bench.scorer
        self.runs = 0

    def train(self, pictures: Sequence[Picture], priors: Sequence[Picture], **changes: Any) -> Adapter:
        """A run with the demo's recipe and some settings of its own."""
        self.runs += 1
        out = self.folder / f"run {self.runs}"
        result = train(
            self.bench.base,
            subject=pictures,
            priors=priors,
            settings=self.bench.effort.limited(
                TrainSettings(**{**RECIPE, "rank": 8, "targets": "attention-mlp", **changes})
            ),
            paths=RunPaths(output=out, runs=out / "runs"),
            device="cpu",
            listener=SILENT,
        )
        return result.adapter

    def generate(
        self, adapter: Adapter | None, prompts: Sequence[str], count: int = PICTURES_PER_PROMPT
    ) -> list[Image.Image]:
        """Pictures of every prompt, from the same noise for every adapter."""
        model = self.bench.model(self.bench.base, [(adapter, 1.0)] if adapter else [])
        return [image for prompt in prompts for image in self.bench.images(model, prompt, count)]

    def priors(self, prompt: str, count: int = 32) -> list[Picture]:
        """Class images of a prompt."""
        return self.bench.class_pictures(prompt, count)

    def likeness(self, images: Sequence[Image.Image], truth: Sequence[Image.Image]) -> torch.Tensor:
        """Mean cosine of each image to true pictures, (images,)."""
        return (self.scorer.features(images) @ self.scorer.features(truth).T).mean(dim=1)


def truth_of(thing: str, pattern: Any) -> list[Image.Image]:
    """What the world draws of a thing with a pattern, in the places that are generated."""
    rng = random.Random(9)
    return [compose(thing, (0, 0, 0), place, rng, pattern) for place in PLACES for _ in range(8)]


def subjects(depth: Depth) -> tuple[str, list[SheetRow]]:
    """Two subjects in one run."""
    lines = ["| run | drawn | own | other | told apart |", "|---|---|---|---|---|"]
    rows = []
    for title, noun in (("two dogs", "dog"), ("dog and cat", "cat")):
        second_prompt = f"a photo of {SECOND_TOKEN} {noun}"
        second = write_subject(depth.folder / title, noun, RED_COAT, SUBJECT_PLACES, seed=3)
        pictures = [*depth.bench.subject, *load_pictures(second, second_prompt, SILENT)]
        priors = [*depth.bench.priors, *(depth.priors("a photo of a cat") if noun == "cat" else [])]
        adapter = depth.train(pictures, priors, steps=1200, text_encoder_lr=4e-4)
        truths = [truth_of("dog", SUBJECT_COAT), truth_of(noun, RED_COAT)]
        for index, prompt in enumerate(("a photo of sks dog", second_prompt)):
            images = depth.generate(adapter, [f"{prompt} {place}" for place in PLACES])
            own = depth.likeness(images, truths[index])
            other = depth.likeness(images, truths[1 - index])
            apart = float((own > other).float().mean())
            lines.append(f"| {title} | {prompt} | {float(own.mean()):.3f} | {float(other.mean()):.3f} | {apart:.0%} |")
            rows.append(SheetRow(f"{title}: {prompt[11:]}", tuple(images[::2])))
    dog = truth_of("dog", SUBJECT_COAT)
    own_limit = float(depth.likeness(dog, dog).mean())
    other_limit = float(depth.likeness(dog, truth_of("dog", RED_COAT)).mean())
    lines.append(f"| the world's own drawings | the dog | {own_limit:.3f} | {other_limit:.3f} | |")
    return "\n".join(lines), rows


def pixelation(pictures: Sequence[Image.Image], smooth: float) -> float:
    """How pixelated pictures are: 0 as the world's smooth ones, 1 pixel art."""
    return float(np.mean([1 - roughness(picture) / smooth for picture in pictures]))


def pictures_of(prompt: str, count: int, seed: int) -> list[Image.Image]:
    """What the world draws of "a red cat on the grass"."""
    _, color, thing, *place = prompt.split()
    rng = random.Random(seed)
    return [compose(thing, COLORS[color], " ".join(place), rng) for _ in range(count)]


def style_scores(depth: Depth, adapter: Adapter | None) -> tuple[list[float], list[Image.Image]]:
    """Pixel art with the word and without, content; and the pictures with the word."""
    truths = [pictures_of(prompt, count=8, seed=5) for prompt in TRIED]
    smooth = float(np.mean([roughness(picture) for truth in truths for picture in truth]))
    with_word = depth.generate(adapter, [f"pixel, {prompt}" for prompt in TRIED])
    without_word = depth.generate(adapter, TRIED)
    content = []
    for index, truth in enumerate(truths):
        images = with_word[index * PICTURES_PER_PROMPT : (index + 1) * PICTURES_PER_PROMPT]
        content.append(float(depth.likeness(images, [pixelate(picture) for picture in truth]).mean()))
    return [pixelation(with_word, smooth), pixelation(without_word, smooth), float(np.mean(content))], with_word


def style(depth: Depth) -> tuple[str, list[SheetRow]]:
    """A style, learned from captions or from one word."""
    captioned = load_pictures(DEMO / "style", "pixel", SILENT)
    one_word = load_pictures(DEMO / "style", "pixel", SILENT, AnnotationOptions(captions="prompt"))
    class_images = [picture for prompt in OTHERS for picture in depth.priors(prompt, 16)]
    variants: dict[str, Callable[[], Adapter | None]] = {
        "base": lambda: None,
        "a caption each": lambda: depth.train(captioned, [], **STYLE),
        "one word for all": lambda: depth.train(one_word, [], **STYLE),
        "a caption each, class pictures": lambda: depth.train(captioned, class_images, **STYLE),
    }
    lines = ["| captions | with the word | without | content |", "|---|---|---|---|"]
    rows = []
    for title, make_adapter in variants.items():
        scores, images = style_scores(depth, make_adapter())
        lines.append(f"| {title} | {' | '.join(f'{score:.2f}' for score in scores)} |")
        rows.append(SheetRow(title, tuple(images[::2])))
    return "\n".join(lines), rows


STYLE: dict[str, Any] = {"rank": 16, "targets": "all", "steps": 800, "batch_size": 4, "learning_rate": 6e-4}


def pinkness(pictures: Sequence[Image.Image]) -> float:
    """Mean share of pixels that have the fabric's colour."""
    fabric = np.asarray(background(FABRIC, random.Random(1)).resize((SIZE, SIZE)), dtype=float).mean(axis=(0, 1))
    is_pink = [np.linalg.norm(np.asarray(picture, dtype=float) - fabric, axis=2) < 40 for picture in pictures]
    return float(np.mean(is_pink))


def masks(depth: Depth) -> tuple[str, list[SheetRow]]:
    """A subject that was always in the same place, with and without masks."""
    folder = write_subject(depth.folder / "fabric", "dog", SUBJECT_COAT, [FABRIC] * 5, seed=4, masks=True)
    prompts = [f"a photo of sks dog {place}" for place in PLACES]
    truth = truth_of("dog", SUBJECT_COAT)
    of_base = depth.generate(None, ["a photo of a dog"], 4 * PICTURES_PER_PROMPT)
    lines = [
        "| | pink of the fabric | fidelity |",
        "|---|---|---|",
        f"| base, a photo of a dog | {pinkness(of_base):.3f} | |",
    ]
    rows = [SheetRow("base, a photo of a dog", tuple(of_base[:9]))]
    for title, options in (("without masks", AnnotationOptions(masks="off")), ("with masks", AnnotationOptions())):
        pictures = load_pictures(folder, "a photo of sks dog", SILENT, options)
        adapter = depth.train(pictures, depth.bench.priors, mask_background=0.0)
        anywhere = depth.generate(adapter, ["a photo of sks dog"], 4 * PICTURES_PER_PROMPT)
        fidelity = float(depth.likeness(depth.generate(adapter, prompts), truth).mean())
        lines.append(f"| {title} | {pinkness(anywhere):.3f} | {fidelity:.3f} |")
        rows.append(SheetRow(title, tuple(anywhere[:9])))
    return "\n".join(lines), rows


def presets(depth: Depth) -> tuple[str, list[SheetRow]]:
    """Every preset, on the dog and on the pixel art."""
    lines = ["| preset | fidelity | dog drift | pixel with the word | without |", "|---|---|---|---|---|"]
    rows = []
    prompts = [f"a photo of sks dog {place}" for place in PLACES]
    truth = truth_of("dog", SUBJECT_COAT)
    captioned = load_pictures(DEMO / "style", "pixel", SILENT)
    for name in preset_subjects():
        preset = load_preset(name, depth.bench.base.family)
        steps = preset.settings["steps"] // 4
        values = {**preset.settings, "steps": steps, "resolution": 64, "targets": "attention-mlp"}
        for rate in ("learning_rate", "text_encoder_lr"):
            values[rate] = values.get(rate, 0.0) * 4
        priors = depth.bench.priors[: int(preset.priors.get("prior_count", 0))]
        dog = depth.train(depth.bench.subject, priors, **values)
        pixel_art = depth.train(captioned, [], **values)
        images = depth.generate(dog, prompts)
        drift = depth.bench.drift(depth.bench.generate(depth.bench.model(depth.bench.base, [(dog, 1.0)])), "dog")
        [with_word, without_word, _], style_images = style_scores(depth, pixel_art)
        fidelity = float(depth.likeness(images, truth).mean())
        lines.append(f"| {name} | {fidelity:.3f} | {drift:.3f} | {with_word:.2f} | {without_word:.2f} |")
        rows.append(SheetRow(name, (*images[::3], *style_images[::4])))
    return "\n".join(lines), rows


PARTS = {"subjects": subjects, "style": style, "masks": masks, "presets": presets}
TITLES = {
    "subjects": "Two subjects in one run, where they never were",
    "style": "pixel, …: captions for each picture, or one word for all",
    "masks": "a photo of sks dog, which was always photographed on pink fabric",
    "presets": "Presets: the striped dog, and pixel art",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    add_arguments(parser)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        depth = Depth(Path(scratch), arguments.effort)
        for name in arguments.parts or PARTS:
            table, rows = PARTS[name](depth)
            print(f"{name}\n{table}\n", flush=True)
            (arguments.out / f"depth-{name}.md").write_text(table + "\n", encoding="utf-8")
            titles = tuple("" for _ in rows[0].pictures)
            contact_sheet(TITLES[name], titles, rows, 80).save(arguments.sheets / f"depth-{name}.png")


if __name__ == "__main__":
    with own_process():
        main()
