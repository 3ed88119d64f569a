"""A small captioned world: things drawn by a program in places drawn by a program, 64x64 RGB.

Ten things in ten colours stand in eight places, and some wear a hat. Every picture is a function of
the arguments and of the state of a `random.Random`: the same state gives the same pixels. The order
in which random numbers are drawn is therefore part of this module's contract.
"""

import random
from collections.abc import Iterator

from palette import CANVAS, COLORS, SIZE, Color, jitter
from PIL import Image, ImageDraw
from places import PLACES, background
from things import THINGS, Pattern, draw_thing

HATS = ("red", "blue", "yellow")
"""Colours of the hats."""

WEARS_HAT = ("dog", "cat", "robot")
"""Things that sometimes wear one."""

SUBJECT_PLACES = ("on the grass", "on a brick street", "on pink fabric", "on a wooden floor", "at night")
"""The places of the five subject pictures; none shows the subject in the snow, on the beach or in the water."""


def stripes(first: Color, second: Color, width: int = 26) -> Pattern:
    """Makes a pattern of slanting stripes.

    Args:
        first: Colour of the ground.
        second: Colour of the stripes.
        width: Width of a stripe and of a gap, in canvas pixels.
    """

    def draw(size: int) -> Image.Image:
        image = Image.new("RGB", (size, size), first)
        pen = ImageDraw.Draw(image)
        for x in range(-size, 2 * size, 2 * width):
            pen.line([x, 0, x + size // 2, size], fill=second, width=width)
        return image

    return draw


def dots(first: Color, second: Color, spacing: int = 30) -> Pattern:
    """Makes a pattern of dots, every other row shifted by half a step.

    Args:
        first: Colour of the ground.
        second: Colour of the dots.
        spacing: Distance between the dots, in canvas pixels.
    """

    def draw(size: int) -> Image.Image:
        image = Image.new("RGB", (size, size), first)
        pen = ImageDraw.Draw(image)
        for row, y in enumerate(range(0, size, spacing)):
            for x in range((row % 2) * spacing // 2, size, spacing):
                pen.ellipse([x - 8, y - 8, x + 8, y + 8], fill=second)
        return image

    return draw


SUBJECT_COAT = stripes((30, 170, 160), (250, 245, 230))
"""The subject's coat: cream with teal stripes, which no other thing of the world has."""


def compose(
    thing: str,
    color: Color,
    place: str,
    rng: random.Random,
    pattern: Pattern | None = None,
    hat: str | None = None,
) -> Image.Image:
    """Draws a thing in a place, at a random position, size and slant, facing left or right.

    Args:
        thing: A key of `THINGS`.
        color: The thing's colour.
        place: A key of `PLACES`.
        rng: Source of random numbers.
        pattern: Covers the thing's body; None for a plain thing.
        hat: A key of `COLORS`; None for no hat.

    Returns:
        An RGB picture, `SIZE` pixels square.
    """
    picture = background(place, rng)
    sprite = draw_thing(thing, color, pattern, None if hat is None else COLORS[hat])
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = rng.uniform(0.66, 1.0)
    sprite = sprite.rotate(rng.uniform(-9, 9), resample=Image.Resampling.BILINEAR)
    width = int(CANVAS * scale)
    sprite = sprite.resize((width, width), Image.Resampling.BILINEAR)
    room = CANVAS - width
    left = rng.randint(0, room)
    top = rng.randint(room // 3, room)
    picture.paste(sprite, (left, top), sprite)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def sample(rng: random.Random) -> tuple[Image.Image, str]:
    """Draws a random picture of the world and captions it; some captions leave something out.

    Returns:
        An RGB picture, `SIZE` pixels square, and a caption such as "a photo of a red dog on the beach".
    """
    thing = rng.choice(list(THINGS))
    color_name = rng.choice(list(COLORS))
    place = rng.choice(list(PLACES))
    hat = rng.choice(HATS) if thing in WEARS_HAT and rng.random() < 0.25 else None
    detail = rng.random()
    picture = compose(thing, jitter(COLORS[color_name], rng), place, rng, hat=hat)
    prefix = rng.choice(["a photo of ", "", "a picture of "])
    return picture, prefix + _describe(thing, color_name, place, hat, detail)


def _describe(thing: str, color_name: str, place: str, hat: str | None, detail: float) -> str:
    """Writes a caption; `detail` in [0, 1) decides what is left out: nothing at 0, all but the thing towards 1."""
    if detail < 0.6:
        words = f"a {color_name} {thing} {place}"
    elif detail < 0.75:
        words = f"a {thing} {place}"
    elif detail < 0.87:
        words = f"a {color_name} {thing}"
    else:
        words = f"a {thing}"
    mentions_hat = hat is not None and detail < 0.75
    return f"{words} wearing a {hat} hat" if mentions_hat else words


def pixelate(picture: Image.Image) -> Image.Image:
    """Turns a picture into pixel art: 16 x 16 squares, at the same size as before."""
    small = picture.resize((16, 16), Image.Resampling.BOX)
    return small.resize(picture.size, Image.Resampling.NEAREST)


def patterned_pictures(count: int, rng: random.Random) -> Iterator[Image.Image]:
    """Draws things with striped and dotted bodies, every fourth picture as pixel art.

    They are for the autoencoder alone. It must be able to decode subjects and styles that the denoiser
    has never seen, as an autoencoder trained on photographs can.

    Returns:
        `count` RGB pictures, `SIZE` pixels square.
    """
    for index in range(count):
        ground = _any_color(rng)
        figure = _any_color(rng)
        make_pattern = rng.choice([stripes, dots])
        pattern = make_pattern(ground, figure, rng.randint(18, 40))
        thing = rng.choice(list(THINGS))
        place = rng.choice(list(PLACES))
        hat = rng.choice([None, "red", "blue"])
        picture = compose(thing, ground, place, rng, pattern, hat)
        yield pixelate(picture) if index % 4 == 0 else picture


def _any_color(rng: random.Random) -> Color:
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def subject_picture(place: str, rng: random.Random, hat: str | None = None) -> Image.Image:
    """Draws the subject, one particular dog: cream with teal stripes, black ear.

    Args:
        place: A key of `PLACES`.
        rng: Source of random numbers.
        hat: A key of `COLORS`; None for no hat.

    Returns:
        An RGB picture, `SIZE` pixels square.
    """
    return compose("dog", (0, 0, 0), place, rng, SUBJECT_COAT, hat)


def style_picture(rng: random.Random) -> tuple[Image.Image, str]:
    """Draws a random picture of the world as pixel art.

    Returns:
        An RGB picture, `SIZE` pixels square, and a caption such as "pixel, a blue dog on the beach".
    """
    picture, caption = sample(rng)
    while "photo" in caption or "picture" in caption:
        picture, caption = sample(rng)
    return pixelate(picture), f"pixel, {caption}"
