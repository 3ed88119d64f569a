"""Draws docs/icon.png and docs/banner.png, what ComfyUI's registry shows of the pack, from the demo's world.

python tools/make_registry_pictures.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "demo"))

from palette import CANVAS, COLORS  # noqa: E402
from places import background  # noqa: E402
from things import draw_thing  # noqa: E402
from world import SUBJECT_COAT  # noqa: E402

ICON = 400  # pixels, the registry's limit
BANNER = (1260, 540)  # 21:9
INK = (38, 44, 58)
PAPER = (247, 245, 238)


def subject(place: str, seed: int, size: int, hat: str | None = None) -> Image.Image:
    """The striped dog in the middle of a place, in as many pixels as are asked for.

    Args:
        place: A key of `PLACES`.
        seed: Of the place's details.
        size: Side of the picture, in pixels.
        hat: A key of `COLORS`; None for no hat.
    """
    picture = background(place, random.Random(seed))
    sprite = draw_thing("dog", (0, 0, 0), SUBJECT_COAT, None if hat is None else COLORS[hat])
    picture.paste(sprite, (0, CANVAS // 24), sprite)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def rounded(picture: Image.Image, radius: int) -> Image.Image:
    """With round corners, transparent outside."""
    mask = Image.new("L", (picture.width * 4, picture.height * 4))
    ImageDraw.Draw(mask).rounded_rectangle([0, 0, mask.width - 1, mask.height - 1], 4 * radius, fill=255)
    result = picture.convert("RGBA")
    result.putalpha(mask.resize(picture.size, Image.Resampling.LANCZOS))
    return result


def photograph(place: str, seed: int, angle: float) -> Image.Image:
    """A picture of the subject as a print with a white border, turned by so many degrees."""
    inner = subject(place, seed, 150)
    card = Image.new("RGBA", (inner.width + 20, inner.height + 20), "white")
    card.paste(inner, (10, 10))
    ImageDraw.Draw(card).rectangle([0, 0, card.width - 1, card.height - 1], outline=(205, 203, 196), width=2)
    return card.rotate(angle, resample=Image.Resampling.BICUBIC, expand=True)


def icon() -> Image.Image:
    """The subject where no photograph showed it."""
    return rounded(subject("on the beach", 3, ICON, hat="red"), 72)


def banner() -> Image.Image:
    """Photographs on the left, an arrow, and what is generated on the right; the name above them."""
    result = Image.new("RGB", BANNER, PAPER)
    pen = ImageDraw.Draw(result)
    pen.text((56, 36), "DreamBooth LoRA", font=ImageFont.load_default(66), fill=INK)
    pen.text((58, 122), "Train your subject inside the graph", font=ImageFont.load_default(31), fill=INK)
    prints = (
        ("on the grass", 1, 7.0, (44, 206)),
        ("on a brick street", 2, -5.0, (196, 196)),
        ("on a wooden floor", 4, 4.0, (350, 210)),
        ("on pink fabric", 5, -6.0, (122, 330)),
        ("at night", 6, 5.0, (280, 336)),
    )
    for place, seed, angle, corner in prints:
        card = photograph(place, seed, angle)
        result.paste(card, corner, card)
    pen.line([(574, 350), (664, 350)], fill=INK, width=14)
    pen.polygon([(660, 318), (660, 382), (712, 350)], fill=INK)
    large = rounded(subject("on the beach", 3, 460, hat="red"), 36)
    result.paste(large, (756, 40), large)
    return result


def main() -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="FOLDER", help="default: docs")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    icon().save(folder / "icon.png", optimize=True)
    banner().quantize(256).save(folder / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
