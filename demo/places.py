"""The eight places of the world, painted from random numbers."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from palette import CANVAS, Color, jitter, shade
from PIL import Image, ImageDraw


@dataclass(frozen=True)
class Scene:
    """An empty canvas, and the random values that all places share.

    Attributes:
        pen: Draws on the canvas.
        rng: Source of random numbers.
        horizon: Height of the horizon, in pixels from the top.
        sky: Colour of the sky by day.
    """

    pen: ImageDraw.ImageDraw
    rng: random.Random
    horizon: int
    sky: Color

    def fill(self, color: Color, top: int = 0, bottom: int = CANVAS) -> None:
        """Paints the full width between two heights, in pixels from the top."""
        self.pen.rectangle([0, top, CANVAS, bottom], fill=color)

    def disc(self, x: int, y: int, radius: int, color: Color) -> None:
        """Paints a filled circle."""
        self.pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)


def _paint_grass(scene: Scene) -> None:
    rng = scene.rng
    scene.fill(scene.sky, bottom=scene.horizon)
    scene.fill(jitter((86, 170, 70), rng), top=scene.horizon)
    for _ in range(90):
        x, y = rng.randint(0, CANVAS), rng.randint(scene.horizon, CANVAS)
        tip = (x + rng.randint(-4, 4), y - rng.randint(6, 14))
        scene.pen.line([(x, y), tip], fill=jitter((50, 130, 45), rng), width=3)


def _paint_snow(scene: Scene) -> None:
    rng = scene.rng
    scene.fill(jitter((190, 205, 222), rng), bottom=scene.horizon)
    scene.fill(jitter((236, 241, 248), rng, 6), top=scene.horizon)
    for _ in range(70):
        x, y, radius = rng.randint(0, CANVAS), rng.randint(0, CANVAS), rng.randint(2, 5)
        scene.disc(x, y, radius, (255, 255, 255))


def _paint_beach(scene: Scene) -> None:
    rng = scene.rng
    scene.fill(scene.sky, bottom=scene.horizon)
    scene.fill(jitter((50, 130, 200), rng), top=scene.horizon - 26, bottom=scene.horizon + 14)
    scene.fill(jitter((236, 214, 160), rng), top=scene.horizon + 14)
    if rng.random() < 0.6:
        scene.disc(rng.randint(20, CANVAS - 20), 32, 16, (255, 225, 90))


def _paint_brick_street(scene: Scene) -> None:
    rng = scene.rng
    height, width = 26, 52
    scene.fill(jitter((120, 110, 105), rng))
    brick = jitter((168, 84, 66), rng)
    for row in range(CANVAS // height + 1):
        y = row * height
        for column in range(-1, CANVAS // width + 1):
            x = column * width + (width // 2 if row % 2 else 0)
            box = [x + 2, y + 2, x + width - 3, y + height - 3]
            scene.pen.rectangle(box, fill=jitter(brick, rng, 10))


def _paint_pink_fabric(scene: Scene) -> None:
    color = jitter((240, 150, 190), scene.rng)
    scene.fill(color)
    offset = scene.rng.randint(0, 40)
    for x in range(offset - CANVAS, 2 * CANVAS + offset, 40):
        scene.pen.line([x, 0, x + CANVAS // 3, CANVAS], fill=shade(color, 0.88), width=9)


def _paint_wooden_floor(scene: Scene) -> None:
    rng = scene.rng
    color = jitter((186, 132, 78), rng)
    scene.fill(color)
    joint = shade(color, 0.68)
    offset = rng.randint(0, 30)
    for y in range(offset, CANVAS + 40 + offset, 36):
        scene.pen.line([0, y, CANVAS, y], fill=joint, width=4)
        x = rng.randint(0, CANVAS)
        scene.pen.line([x, y, x, y + 36], fill=joint, width=4)


def _paint_water(scene: Scene) -> None:
    rng = scene.rng
    color = jitter((45, 125, 190), rng)
    scene.fill(color)
    for _ in range(26):
        x, y = rng.randint(-20, CANVAS), rng.randint(0, CANVAS)
        scene.pen.arc([x, y, x + 44, y + 18], 200, 340, fill=shade(color, 1.3), width=4)


def _paint_night(scene: Scene) -> None:
    rng = scene.rng
    scene.fill(jitter((18, 22, 48), rng, 8))
    scene.fill(jitter((26, 40, 38), rng, 6), top=scene.horizon + 20)
    for _ in range(40):
        x, y = rng.randint(0, CANVAS), rng.randint(0, scene.horizon)
        scene.disc(x, y, 2, (250, 250, 220))
    scene.disc(rng.randint(30, CANVAS - 30), 36, 18, (240, 240, 205))


PLACES: dict[str, Callable[[Scene], None]] = {
    "on the grass": _paint_grass,
    "in the snow": _paint_snow,
    "on the beach": _paint_beach,
    "on a brick street": _paint_brick_street,
    "on pink fabric": _paint_pink_fabric,
    "on a wooden floor": _paint_wooden_floor,
    "in the water": _paint_water,
    "at night": _paint_night,
}


def background(place: str, rng: random.Random) -> Image.Image:
    """Paints an empty place.

    Args:
        place: A key of `PLACES`.
        rng: Source of random numbers.

    Returns:
        An RGB picture, `CANVAS` pixels square.
    """
    image = Image.new("RGB", (CANVAS, CANVAS))
    horizon = int(CANVAS * rng.uniform(0.42, 0.58))
    sky = jitter((150, 200, 240), rng)
    PLACES[place](Scene(ImageDraw.Draw(image), rng, horizon, sky))
    return image
