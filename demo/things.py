"""The ten things of the world, drawn on a transparent canvas; nothing here is random."""

import math
from collections.abc import Callable

from palette import CANVAS, Color, shade
from PIL import Image, ImageDraw

Pattern = Callable[[int], Image.Image]
"""Given a width in pixels, a square RGB picture to lay over a thing's body."""

INK: Color = (25, 25, 28)
CHALK: Color = (250, 250, 250)
WOOD: Color = (110, 74, 44)
LEAF: Color = (40, 130, 50)
GLASS: Color = (190, 225, 245)
LAMPLIGHT: Color = (250, 230, 140)
CAT_EYE: Color = (60, 200, 90)


class Sprite:
    """A thing that is being drawn on a transparent canvas.

    The methods named after shapes draw on the picture and add to the thing's body, which is what a
    pattern covers; `pen` draws on the picture alone.

    Args:
        color: The thing's own colour.
        pattern: Covers the body once `lay_pattern` is called; None for a plain thing.
    """

    def __init__(self, color: Color, pattern: Pattern | None = None) -> None:
        """Starts with an empty canvas and an empty body."""
        self.image = Image.new("RGBA", (CANVAS, CANVAS), (0, 0, 0, 0))
        self.pen = ImageDraw.Draw(self.image)
        self.color = color
        self.dark = shade(color, 0.62)
        self.light = shade(color, 1.25)
        self._pattern = pattern
        self._body = Image.new("L", (CANVAS, CANVAS), 0)
        self._body_pen = ImageDraw.Draw(self._body)

    def ellipse(self, left: float, top: float, right: float, bottom: float) -> None:
        """Adds an ellipse in the thing's colour to the body."""
        self.pen.ellipse([left, top, right, bottom], fill=self.color)
        self._body_pen.ellipse([left, top, right, bottom], fill=255)

    def rectangle(self, left: int, top: int, right: int, bottom: int, fill: Color | None = None) -> None:
        """Adds a rectangle to the body, in the thing's colour unless `fill` is given."""
        self.pen.rectangle([left, top, right, bottom], fill=fill or self.color)
        self._body_pen.rectangle([left, top, right, bottom], fill=255)

    def rounded_rectangle(self, left: int, top: int, right: int, bottom: int, radius: int) -> None:
        """Adds a rectangle with round corners in the thing's colour to the body."""
        self.pen.rounded_rectangle([left, top, right, bottom], radius, fill=self.color)
        self._body_pen.rounded_rectangle([left, top, right, bottom], radius, fill=255)

    def polygon(self, *points: tuple[int, int], fill: Color | None = None) -> None:
        """Adds a polygon to the body, in the thing's colour unless `fill` is given."""
        self.pen.polygon(points, fill=fill or self.color)
        self._body_pen.polygon(points, fill=255)

    def lay_pattern(self) -> None:
        """Lays the pattern, if there is one, over the body; what is drawn later lies on top of it."""
        if self._pattern is not None:
            self.image.paste(self._pattern(CANVAS).convert("RGBA"), (0, 0), self._body)


def _draw_dog(sprite: Sprite) -> None:
    for x in (82, 104, 148, 170):
        sprite.rectangle(x, 156, x + 14, 206)
    sprite.ellipse(68, 104, 192, 172)
    sprite.polygon((66, 128), (40, 92), (52, 88), (84, 116))
    sprite.ellipse(146, 58, 214, 122)
    sprite.ellipse(190, 88, 228, 116)
    sprite.lay_pattern()
    sprite.pen.ellipse([148, 58, 168, 108], fill=sprite.dark)
    sprite.pen.ellipse([220, 92, 230, 102], fill=INK)
    sprite.pen.ellipse([186, 76, 194, 84], fill=INK)


def _draw_cat(sprite: Sprite) -> None:
    for x in (84, 106, 146, 168):
        sprite.rectangle(x, 162, x + 12, 206)
    sprite.ellipse(70, 114, 186, 176)
    sprite.pen.arc([24, 60, 90, 150], 20, 200, fill=sprite.color, width=12)
    sprite.ellipse(142, 62, 212, 128)
    sprite.polygon((146, 82), (150, 40), (174, 66))
    sprite.polygon((182, 66), (206, 40), (210, 82))
    sprite.lay_pattern()
    sprite.pen.ellipse([160, 84, 170, 96], fill=CAT_EYE)
    sprite.pen.ellipse([186, 84, 196, 96], fill=CAT_EYE)
    sprite.pen.polygon([(173, 102), (183, 102), (178, 108)], fill=(230, 120, 140))


def _draw_fish(sprite: Sprite) -> None:
    sprite.polygon((60, 128), (20, 90), (24, 168))
    sprite.ellipse(48, 84, 214, 172)
    sprite.polygon((110, 92), (140, 56), (160, 90), fill=sprite.dark)
    sprite.lay_pattern()
    sprite.pen.ellipse([176, 108, 194, 126], fill=CHALK)
    sprite.pen.ellipse([182, 112, 192, 122], fill=INK)


def _draw_car(sprite: Sprite) -> None:
    sprite.polygon((74, 120), (98, 78), (166, 78), (194, 120))
    sprite.rounded_rectangle(34, 116, 222, 168, radius=16)
    sprite.lay_pattern()
    sprite.pen.polygon([(88, 116), (104, 88), (128, 88), (128, 116)], fill=GLASS)
    sprite.pen.polygon([(136, 116), (136, 88), (160, 88), (178, 116)], fill=GLASS)
    for x in (58, 154):
        sprite.pen.ellipse([x, 146, x + 44, 190], fill=INK)
        sprite.pen.ellipse([x + 13, 159, x + 31, 177], fill=(190, 190, 190))


def _draw_house(sprite: Sprite) -> None:
    sprite.rectangle(62, 112, 194, 206)
    sprite.pen.polygon([(44, 116), (128, 46), (212, 116)], fill=sprite.dark)
    sprite.lay_pattern()
    sprite.pen.rectangle([114, 156, 142, 206], fill=(90, 60, 40))
    sprite.pen.rectangle([76, 130, 100, 154], fill=LAMPLIGHT)
    sprite.pen.rectangle([156, 130, 180, 154], fill=LAMPLIGHT)


def _draw_tree(sprite: Sprite) -> None:
    sprite.pen.rectangle([116, 140, 140, 210], fill=WOOD)
    sprite.ellipse(62, 92, 140, 162)
    sprite.ellipse(116, 92, 194, 162)
    sprite.ellipse(84, 40, 172, 130)
    sprite.lay_pattern()


def _draw_mug(sprite: Sprite) -> None:
    sprite.pen.arc([156, 94, 220, 168], -90, 90, fill=sprite.color, width=16)
    sprite.rectangle(68, 76, 174, 196)
    sprite.ellipse(68, 180, 174, 212)
    sprite.lay_pattern()
    sprite.pen.ellipse([68, 62, 174, 92], fill=sprite.light)
    sprite.pen.ellipse([78, 68, 164, 88], fill=(70, 45, 30))


def _draw_robot(sprite: Sprite) -> None:
    sprite.rectangle(84, 104, 172, 176)
    sprite.rectangle(98, 52, 158, 100)
    for x in (60, 176):
        sprite.rectangle(x, 108, x + 20, 160, fill=sprite.dark)
    for x in (96, 138):
        sprite.rectangle(x, 178, x + 22, 212, fill=sprite.dark)
    sprite.pen.line([128, 52, 128, 30], fill=INK, width=6)
    sprite.lay_pattern()
    sprite.pen.ellipse([120, 20, 136, 36], fill=(240, 60, 60))
    sprite.pen.ellipse([108, 66, 124, 82], fill=CHALK)
    sprite.pen.ellipse([132, 66, 148, 82], fill=CHALK)
    sprite.pen.rectangle([104, 122, 152, 146], fill=(60, 60, 66))


def _draw_flower(sprite: Sprite) -> None:
    sprite.pen.line([128, 120, 128, 212], fill=LEAF, width=10)
    sprite.pen.polygon([(128, 180), (92, 160), (120, 196)], fill=LEAF)
    for petal in range(6):
        x = 128 + 44 * math.cos(petal * math.pi / 3)
        y = 92 + 44 * math.sin(petal * math.pi / 3)
        sprite.ellipse(x - 28, y - 28, x + 28, y + 28)
    sprite.lay_pattern()
    sprite.pen.ellipse([106, 70, 150, 114], fill=(250, 200, 60))


def _draw_boat(sprite: Sprite) -> None:
    sprite.polygon((36, 150), (220, 150), (190, 200), (66, 200))
    sprite.pen.line([128, 150, 128, 40], fill=WOOD, width=8)
    sprite.pen.polygon([(136, 46), (136, 138), (200, 138)], fill=CHALK)
    sprite.pen.polygon([(120, 62), (120, 138), (72, 138)], fill=CHALK)
    sprite.lay_pattern()


THINGS: dict[str, Callable[[Sprite], None]] = {
    "dog": _draw_dog,
    "cat": _draw_cat,
    "fish": _draw_fish,
    "car": _draw_car,
    "house": _draw_house,
    "tree": _draw_tree,
    "mug": _draw_mug,
    "robot": _draw_robot,
    "flower": _draw_flower,
    "boat": _draw_boat,
}


def _draw_hat(sprite: Sprite, thing: str, color: Color) -> None:
    x, y = (178, 62) if thing in ("dog", "cat") else (128, 52)
    sprite.pen.rectangle([x - 34, y - 6, x + 34, y + 4], fill=color)
    sprite.pen.rectangle([x - 20, y - 40, x + 20, y], fill=color)


def draw_thing(thing: str, color: Color, pattern: Pattern | None = None, hat: Color | None = None) -> Image.Image:
    """Draws one thing.

    Args:
        thing: A key of `THINGS`.
        color: Its colour.
        pattern: Covers its body, and hides its colour there; None for a plain thing.
        hat: Colour of the hat that it wears; None for no hat.

    Returns:
        An RGBA picture, `CANVAS` pixels square, transparent around the thing.
    """
    sprite = Sprite(color, pattern)
    THINGS[thing](sprite)
    if hat is not None:
        _draw_hat(sprite, thing, hat)
    return sprite.image
