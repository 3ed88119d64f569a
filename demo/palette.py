"""Colours, sizes and the two ways to vary a colour, shared by all drawings of the world."""

import random

Color = tuple[int, int, int]
"""Red, green, blue; 0 to 255."""

SIZE = 64
"""Width and height of a finished picture, in pixels."""

CANVAS = 4 * SIZE
"""Width and height of the canvas on which everything is drawn before it is shrunk, in pixels."""

COLORS: dict[str, Color] = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (41, 98, 220),
    "yellow": (245, 205, 50),
    "purple": (140, 70, 190),
    "orange": (240, 135, 35),
    "white": (240, 240, 240),
    "black": (40, 40, 44),
    "brown": (128, 82, 46),
    "pink": (245, 140, 185),
}


def jitter(color: Color, rng: random.Random, amount: int = 14) -> Color:
    """Moves each channel by a random whole number in [-amount, amount], kept within 0 to 255."""
    red, green, blue = (max(0, min(255, channel + rng.randint(-amount, amount))) for channel in color)
    return red, green, blue


def shade(color: Color, factor: float) -> Color:
    """Multiplies each channel by `factor`, kept within 0 to 255: below 1 is darker, above is lighter."""
    red, green, blue = (int(max(0, min(255, channel * factor))) for channel in color)
    return red, green, blue
