"""Writes the pictures of docs/tutorials: what the demo's small world shows of each of them.

python tools/make_tutorial_pictures.py [PART ...] [--out docs/tutorials]
python tools/make_tutorial_pictures.py --smoke --out FOLDER    # only tries it out

photos   Five pictures of the striped dog in five places, and five in one place. Nothing is trained.
dog      The striped dog is learned without class pictures; the run's own previews, over its steps.
face     The world has no people: its chequered robot is learned with the preset "person".
style    Pixel art is learned with the class preserved, and without; with the style's word and without it.
two      The dog and the robot, trained apart and merged.

Every run has seed 0, and pictures side by side begin with the same noise. The presets' steps are a quarter and their
rates four times as large, which is what so small a model wants (benchmarks/depth.py).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

from kinds import DEMO, FULL, SMOKE, Effort, tiny_base  # noqa: E402
from PIL import Image  # noqa: E402
from subjects import SUBJECTS  # noqa: E402
from world import SUBJECT_PLACES, subject_picture  # noqa: E402

from trainer.adapters.apply import merge_into  # noqa: E402
from trainer.adapters.kohya import Adapter  # noqa: E402
from trainer.core.events import SilentListener  # noqa: E402
from trainer.core.figures import SheetRow, contact_sheet  # noqa: E402
from trainer.core.garbage import own_process  # noqa: E402
from trainer.data.folder import AnnotationOptions  # noqa: E402
from trainer.data.images import Picture, load_pictures  # noqa: E402
from trainer.dreambooth import TrainResult, train  # noqa: E402
from trainer.merging.merge import WeightedAdapter, merge  # noqa: E402
from trainer.models.open import open_base  # noqa: E402
from trainer.models.sampling import GenerationConfig, generate  # noqa: E402
from trainer.settings.merge import MergeSettings  # noqa: E402
from trainer.settings.train import TrainSettings  # noqa: E402
from trainer.training.presets import load_preset  # noqa: E402
from trainer.training.runs.folder import RunPaths  # noqa: E402
from trainer.training.runs.layout import RunLayout, preview_name  # noqa: E402

PLACES = ("in the snow", "on the beach", "in the water")  # where no training picture shows a subject
STYLED = (
    "a red cat on the grass",
    "a blue car on the beach",
    "a green robot at night",
    "a yellow dog in the snow",
)
PREVIEWED = ("a photo of sks dog on the beach", "a photo of sks dog in the snow", "a photo of a dog on the beach")
PREVIEWED_STEPS = 50
DOG: dict[str, Any] = {"steps": 400, "batch_size": 2, "learning_rate": 4e-4, "rank": 16}
PIXEL_ART: dict[str, Any] = {
    **{"steps": 600, "batch_size": 4, "rank": 16, "targets": "all"},
    **{"learning_rate": 6e-4, "text_encoder_lr": 1e-4},
}
CELL = 80  # pixels
SILENT = SilentListener()
Strengths = Sequence[tuple[Adapter, float]]


class Studio:
    """The demo's base, and what it was taught; each training takes place once, when it is first asked for."""

    def __init__(self, folder: Path, effort: Effort) -> None:
        self._folder = folder
        self._effort = effort
        small = effort.tiny
        self._base = open_base(tiny_base(folder), DEMO / "base" / "tokenizer") if small else open_base(DEMO / "base")

    def generate(self, adapters: Strengths, prompts: Sequence[str], count: int = 1) -> list[Image.Image]:
        """Pictures of every prompt; the same noise for all prompts and adapters."""
        model = self._base.family.build(self._base)
        for network in (model.denoiser, model.vae, *model.text_encoders.values()):
            network.float()
        for adapter, strength in adapters:
            merge_into(model, adapter, strength)
        config = GenerationConfig(width=64, height=64, steps=self._effort.sampling_steps, guidance=4.0)
        return [picture for prompt in prompts for picture in generate(model, prompt, range(count), config)]

    @cached_property
    def dog(self) -> TrainResult:
        """The striped dog, with previews."""
        pictures = self._pictures(DEMO / "subject", "a photo of sks dog", "sks", "dog")
        previews: dict[str, Any] = {"preview_prompts": " | ".join(PREVIEWED), "preview_guidance": 4.0}
        return self._train(pictures, **DOG, preview_every=self.previewed_steps[1], **previews)

    @property
    def previewed_steps(self) -> list[int]:
        """Steps of the dog's run of which there are previews."""
        steps = min(DOG["steps"], self._effort.training_steps)
        every = min(PREVIEWED_STEPS, steps)
        return list(range(0, steps + 1, every))

    def robot(self, token: str) -> Adapter:
        """The chequered robot, with the values of the preset "person" for so small a model."""
        folder = self._folder / f"robot {token}"
        SUBJECTS["robot"].write(folder)
        values = dict(load_preset("person", self._base.family).settings)
        values |= {"steps": values["steps"] // 4, "resolution": 64}
        values |= {rate: 4 * values[rate] for rate in ("learning_rate", "text_encoder_lr")}
        return self._train(self._pictures(folder, f"a photo of {token} robot", token, "robot"), **values).adapter

    @cached_property
    def named_style(self) -> Adapter:
        """Pixel art, with everything else preserved."""
        return self._train(self._pictures(DEMO / "style", "pixel", "pixel", ""), **PIXEL_ART).adapter

    @cached_property
    def style(self) -> Adapter:
        """Pixel art, with nothing preserved."""
        return self._train(self._pictures(DEMO / "style", "pixel", "pixel", ""), prior="none", **PIXEL_ART).adapter

    def _pictures(self, folder: Path, prompt: str, token: str, noun: str) -> list[Picture]:
        return load_pictures(folder, prompt, SILENT, AnnotationOptions(token=token, class_noun=noun))

    def _train(self, pictures: Sequence[Picture], **values: Any) -> TrainResult:
        out = Path(tempfile.mkdtemp(dir=self._folder))
        settings = TrainSettings(**{"name": "tutorial", "resolution": 64, "checkpoint_every": 0, **values})
        return train(
            self._base,
            subject=pictures,
            priors=[],
            settings=self._effort.limited(settings),
            paths=RunPaths(output=out, runs=out / "runs"),
            device="cpu",
            listener=SILENT,
        )


def photos(studio: Studio) -> Image.Image:
    """What to photograph, and what not to."""
    rng = random.Random(4)
    alike = tuple(subject_picture("on pink fabric", rng) for _ in SUBJECT_PLACES)
    varied = tuple(Image.open(path).convert("RGB") for path in sorted((DEMO / "subject").glob("*.png")))
    rows = [SheetRow("good: five places", varied), SheetRow("bad: one place", alike)]
    return sheet("The subject's pictures", rows)


def dog(studio: Studio) -> Image.Image:
    """The previews of a run."""
    run = RunLayout(studio.dog.run)
    steps = studio.previewed_steps
    rows = []
    for number, prompt in enumerate(PREVIEWED):
        files = [run.preview_path(step) / preview_name("subject", number, 0) for step in steps]
        rows.append(SheetRow(prompt.removeprefix("a photo of "), tuple(Image.open(file) for file in files)))
    return sheet("Previews, a photo of …", rows, [f"step {step}" for step in steps])


def face(studio: Studio) -> Image.Image:
    """The robot: its pictures, and what was learned of them."""
    adapter = studio.robot("sks")
    places = (*PLACES, "on the grass", "at night")
    rows = [SheetRow("its photos", tuple(SUBJECTS["robot"].training_pictures()))]
    for name in ("sks robot", "a robot"):
        prompts = [f"a photo of {name} {place}" for place in places]
        rows.append(SheetRow(f"{name}, before", tuple(studio.generate([], prompts))))
        rows.append(SheetRow(f"{name}, after", tuple(studio.generate([(adapter, 1.0)], prompts))))
    return sheet("A photo of …", rows)


def style(studio: Studio) -> Image.Image:
    """Pixel art, with its word and without."""
    samples = tuple(Image.open(DEMO / "style" / f"{number:02d}.png").convert("RGB") for number in range(8))
    with_word = [f"pixel, {prompt}" for prompt in STYLED]
    rows = [SheetRow("its pictures", samples), SheetRow("before", tuple(studio.generate([], with_word, 2)))]
    for name, adapter in (("prior none", studio.style), ("prior model", studio.named_style)):
        for title, prompts in (("with the word", with_word), ("without", STYLED)):
            rows.append(SheetRow(f"{name}, {title}", tuple(studio.generate([(adapter, 1.0)], prompts, 2))))
    half = tuple(studio.generate([(studio.style, 0.5)], with_word, 2))
    return sheet("pixel, …", [*rows, SheetRow("prior none, with the word, at 0.5", half)])


def two(studio: Studio) -> Image.Image:
    """Two subjects, trained apart and merged."""
    both = [WeightedAdapter(studio.dog.adapter, "dog"), WeightedAdapter(studio.robot("rraj"), "robot")]
    prompts = [f"a photo of {subject} {place}" for subject in ("sks dog", "rraj robot") for place in PLACES]
    variants = {
        "the dog's alone": both[0].adapter,
        "the robot's alone": both[1].adapter,
        "merged, sum": merge(both, MergeSettings()).adapter,
        "merged, orthogonal": merge(both, MergeSettings(method="orthogonal")).adapter,
    }
    rows = [SheetRow(name, tuple(studio.generate([(adapter, 1.0)], prompts))) for name, adapter in variants.items()]
    return sheet("Two LoRAs", rows, ["sks dog"] * len(PLACES) + ["rraj robot"] * len(PLACES))


def sheet(caption: str, rows: Sequence[SheetRow], titles: Sequence[str] = ()) -> Image.Image:
    """A contact sheet in few colours, so that the file is small."""
    picture = contact_sheet(caption, titles or [""] * len(rows[0].pictures), rows, CELL)
    return picture.quantize(200)


PARTS: dict[str, Callable[[Studio], Image.Image]] = {
    "photos": photos,
    "dog": dog,
    "face": face,
    "style": style,
    "two": two,
}


def main() -> None:
    """Write the pictures of the named parts, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "tutorials", metavar="FOLDER")
    parser.add_argument(
        "--smoke", dest="effort", action="store_const", const=SMOKE, default=FULL, help="only try it out"
    )
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}. There are {', '.join(PARTS)}.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        studio = Studio(Path(scratch), arguments.effort)
        for name in arguments.parts or PARTS:
            path = arguments.out / f"{name}.png"
            PARTS[name](studio).save(path, optimize=True)
            print(path, flush=True)


if __name__ == "__main__":
    with own_process():
        main()
