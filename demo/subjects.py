"""Subjects of the world beside the demo's dog: four things with coats of their own, for comparisons.

Their colours and patterns are not those of `world.SUBJECT_COAT`, and the denoiser has seen neither. Pictures are
functions of a `random.Random`, as everywhere in this world.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from palette import Color
from PIL import Image, ImageDraw
from things import Pattern
from world import SUBJECT_PLACES, compose, stripes


def spots(first: Color, second: Color, spacing: int = 48, radius: int = 15) -> Pattern:
    """Makes a pattern of large dots, every other row shifted by half a step.

    Args:
        first: Colour of the ground.
        second: Colour of the dots.
        spacing: Distance between the dots, in canvas pixels.
        radius: Of a dot, in canvas pixels.
    """

    def draw(size: int) -> Image.Image:
        image = Image.new("RGB", (size, size), first)
        pen = ImageDraw.Draw(image)
        for row, y in enumerate(range(0, size, spacing // 2)):
            for x in range((row % 2) * spacing // 2, size, spacing):
                pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=second)
        return image

    return draw


def hoops(first: Color, second: Color, width: int = 20) -> Pattern:
    """Makes a pattern of level stripes.

    Args:
        first: Colour of the ground.
        second: Colour of the stripes.
        width: Width of a stripe and of a gap, in canvas pixels.
    """

    def draw(size: int) -> Image.Image:
        image = Image.new("RGB", (size, size), first)
        pen = ImageDraw.Draw(image)
        for y in range(0, size, 2 * width):
            pen.rectangle([0, y, size, y + width - 1], fill=second)
        return image

    return draw


def checks(first: Color, second: Color, width: int = 24) -> Pattern:
    """Makes a chessboard.

    Args:
        first: Colour of the ground.
        second: Colour of every other square.
        width: Side of a square, in canvas pixels.
    """

    def draw(size: int) -> Image.Image:
        image = Image.new("RGB", (size, size), first)
        pen = ImageDraw.Draw(image)
        for row, y in enumerate(range(0, size, width)):
            for x in range((row % 2) * width, size, 2 * width):
                pen.rectangle([x, y, x + width - 1, y + width - 1], fill=second)
        return image

    return draw


@dataclass(frozen=True)
class Subject:
    """One particular thing.

    Attributes:
        thing: A key of `THINGS`; the noun of its class.
        coat: The pattern that covers its body.
        seed: Of its training pictures.
    """

    thing: str
    coat: Pattern
    seed: int

    def picture(self, place: str, rng: random.Random, hat: str | None = None) -> Image.Image:
        """Draws the subject.

        Args:
            place: A key of `PLACES`.
            rng: Source of random numbers.
            hat: A key of `COLORS`; None for no hat.

        Returns:
            An RGB picture, `SIZE` pixels square.
        """
        return compose(self.thing, (0, 0, 0), place, rng, self.coat, hat)

    def training_pictures(self, places: Sequence[str] = SUBJECT_PLACES) -> list[Image.Image]:
        """Draws what a training gets to see, one picture in each place; the same ones every time."""
        rng = random.Random(self.seed)
        return [self.picture(place, rng) for place in places]

    def write(self, folder: Path, places: Sequence[str] = SUBJECT_PLACES) -> None:
        """Writes the training pictures as 0.png, 1.png, … into a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(self.training_pictures(places)):
            picture.save(folder / f"{number}.png")


SUBJECTS: dict[str, Subject] = {
    "dog": Subject("dog", spots((40, 35, 110), (250, 240, 200)), seed=101),
    "cat": Subject("cat", hoops((45, 40, 45), (250, 215, 60)), seed=102),
    "robot": Subject("robot", checks((245, 245, 235), (170, 30, 60)), seed=103),
    "mug": Subject("mug", stripes((20, 80, 60), (245, 175, 195), width=20), seed=104),
}
"""Name → subject: an indigo dog with cream spots, a black cat with yellow hoops, a robot in white and crimson checks, a
dark green mug with pink stripes."""
