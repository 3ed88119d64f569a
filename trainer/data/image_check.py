"""What is wrong with a subject's pictures, said before training: look-alikes, small, blurred, dark, empty ones.

Each picture is opened once more, made small, and measured; then only numbers are left of it. Nothing is an error: a
picture may be meant as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core.events import Listener, Note, Phase, stop_if_asked
from .images import Picture

Array = NDArray[np.float32]
MEASURED_SIDE = 640  # longer side, in pixels, at which pictures are measured
MAX_HASH_DISTANCE = 10  # bits of 64 in which the hashes of two look-alikes differ at most
# The next five are from photographs as they are and blurred by a Gaussian of 1 to 5 pixels, and from drawings.
MIN_STEEPNESS = 0.12  # a picture whose steepest edges rise less per pixel is blurred, whatever the others are like
MIN_STEEPNESS_IN_SET = 0.2  # so is one below this and below 0.4 of what its set has
MAX_BLUR = 0.5  # of Crété's measure: sharp photographs have up to 0.45
MIN_BRIGHTNESS = 45  # of 255: almost all of a dark picture is below it
MIN_DETAIL = 0.01  # share of the pixels that have another colour than most
_SCALED_UP = 1.1  # times; less is not seen
_NAMES = 6  # files that a message names
_BATCH, _THREADS = 32, 2


@dataclass(frozen=True)
class PictureMeasurements:
    """What was measured of one picture.

    Attributes:
        name: File name.
        size: Width and height in pixels.
        hash: `perceptual_hash`.
        steepness: `steepness`.
        blur: `blur`.
        light: Grey value, 0 to 255, that 95 % of the pixels are not above.
        detail: `detail`.
    """

    name: str
    size: tuple[int, int]
    hash: int
    steepness: float
    blur: float
    light: float
    detail: float


def check_pictures(pictures: Sequence[Picture], resolution: int, listener: Listener) -> None:
    """Look at a subject's pictures and give advice, as warnings that name the files.

    Args:
        pictures: They are opened. Of several with the same content one is looked at: `load_pictures` has named those.
        resolution: Side of the square that is trained on, in pixels.
        listener: Told the advice, and asked now and then whether to stop.

    Raises:
        CancelledError: The listener asked to stop.
    """
    different = list({picture.digest: picture for picture in reversed(pictures)}.values())[::-1]
    looks: list[PictureMeasurements] = []
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:  # Pillow decodes and scales without Python's lock
        for start in range(0, len(different), _BATCH):
            if start:
                listener.report(Phase("looking at pictures", start, len(different)))
                stop_if_asked(listener)
            found = pool.map(measure_picture, different[start : start + _BATCH])
            looks += [look for look in found if look is not None]
    for text in image_advice(looks, resolution):
        listener.report(Note(text, warning=True))


def measure_picture(picture: Picture) -> PictureMeasurements | None:
    """Measure a picture; None if it can't be opened any more, which whoever needs it will say."""
    try:
        image = picture.open()
    except (ValueError, OSError):
        return None
    scale = min(1.0, MEASURED_SIDE / max(image.size))
    width, height = (max(2, round(side * scale)) for side in image.size)
    small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    grey = np.asarray(small.convert("L"), dtype=np.float32)
    return PictureMeasurements(
        picture.name,
        image.size,
        perceptual_hash(small),
        steepness(grey),
        blur(grey),
        float(np.percentile(grey, 95)),
        detail(np.asarray(small, dtype=np.float32)),
    )


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that look-alikes have in common: which of the 8 × 8 lowest frequencies are above their median.

    The DCT hash of Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1,
    as Krawetz 2011, "Looks Like It", scales it: 32 × 32 pixels of grey. Scaling, compression, a little cropping and
    other brightness change up to 10 bits; other pictures differ in 16 or more, mirrored ones in 28 or more.
    """
    side, kept = 32, 8
    grey = np.asarray(image.convert("L").resize((side, side), Image.Resampling.LANCZOS), dtype=np.float64)
    at = np.arange(side)
    cosines = np.cos(np.pi * (2 * at[None] + 1) * at[:kept, None] / (2 * side))
    frequencies = (cosines @ grey @ cosines.T).round(3)  # else the bits of a flat picture would be rounding errors
    bits = (frequencies > np.median(frequencies)).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def steepness(grey: Array) -> float:
    """How steep the steepest edges are: the 99.9th percentile of the slope per pixel, as a part of the contrast.

    One sharp region is enough, so a blurred background does not count; and neither do contrast and the number of
    edges, so it is the same for photographs and flat drawings.

    Args:
        grey: (height, width), 0 to 255.

    Returns:
        0 for a flat picture; about 1 for one with a hard edge.
    """
    across, down = np.diff(grey, axis=1)[:-1], np.diff(grey, axis=0)[:, :-1]
    contrast = np.percentile(grey, 99) - np.percentile(grey, 1)
    return float(np.percentile(np.hypot(across, down), 99.9) / max(float(contrast), 16.0))


def blur(grey: Array) -> float:
    """How little a picture changes if it is blurred again (Crété et al. 2007, "The Blur Effect").

    Args:
        grey: (height, width), 0 to 255.

    Returns:
        0, sharp, to 1, blurred or flat. Slopes of one grey value per pixel are not counted: they are rounding.
    """
    found = []
    for lines in (grey, grey.T):
        padded = np.pad(lines, ((5, 4), (0, 0)), mode="edge").cumsum(axis=0, dtype=np.float64)
        again = (padded[9:] - padded[:-9]) / 9
        before, after = np.abs(np.diff(lines, axis=0)), np.abs(np.diff(again, axis=0))
        before = np.where(before > 1, before, 0)
        lost, total = np.maximum(before - after, 0).sum(), before.sum()
        found.append(1.0 - float(lost / total) if total else 1.0)
    return max(found)


def detail(pixels: Array) -> float:
    """Share of the pixels whose colour is not that of most.

    Args:
        pixels: (height, width, 3), 0 to 255.

    Returns:
        0 to 1: the pixels of which a channel is more than 12 away from the channel's median.
    """
    middle = np.median(pixels, axis=(0, 1))
    return float((np.abs(pixels - middle).max(axis=2) > 12).mean())


def near_duplicates(hashes: Sequence[int]) -> list[list[int]]:
    """Groups of two or more hashes, by place, each of which is near to another of its group."""
    groups: list[list[int]] = []
    for at, one in enumerate(hashes):
        near = [group for group in groups if any((one ^ hashes[other]).bit_count() <= MAX_HASH_DISTANCE for other in group)]
        groups = [group for group in groups if group not in near]
        groups.append(sorted([at, *(other for group in near for other in group)]))
    return sorted(group for group in groups if len(group) > 1)


def image_advice(looks: Sequence[PictureMeasurements], resolution: int) -> list[str]:
    """What to do about these pictures; a sentence or two for each kind of trouble.

    Args:
        looks: Of every picture.
        resolution: Side of the square that is trained on, in pixels.
    """
    empty = [one for one in looks if one.detail < MIN_DETAIL]
    full = [one for one in looks if one.detail >= MIN_DETAIL]
    found = []
    if empty:
        found.append(f"{_named(empty)} {_is(empty)} nearly empty, of one colour: leave {_it(empty)} out.")
    for group in near_duplicates([one.hash for one in full]):
        alike = [full[at] for at in group]
        found.append(f"{_named(alike)} look almost the same: keep the best one, or the model learns it by heart.")
    if too_small := [one for one in looks if resolution / min(one.size) > _SCALED_UP]:
        found.append(_small(too_small, resolution))
    if blurred := _blurred(full):
        if len(blurred) > 1 and 2 * len(blurred) > len(full):
            text = f"{_named(blurred)} have no sharp edges, and so will what the model draws"
            found.append(f"{text}. If that is not the style you want, take sharper pictures.")
        else:
            found.append(f"{_named(blurred)} {_is(blurred)} blurred: take {_one(blurred, 'sharper')}.")
    if dark := [one for one in full if one.light < MIN_BRIGHTNESS]:
        found.append(f"{_named(dark)} {_is(dark)} very dark: brighten {_it(dark)}, or leave {_it(dark)} out.")
    return found


def _blurred(looks: Sequence[PictureMeasurements]) -> list[PictureMeasurements]:
    usual = float(np.median([one.steepness for one in looks])) if looks else 0.0
    limit = max(MIN_STEEPNESS, min(MIN_STEEPNESS_IN_SET, 0.4 * usual))
    return [one for one in looks if one.steepness < limit and one.blur > MAX_BLUR]


def _small(looks: Sequence[PictureMeasurements], resolution: int) -> str:
    names = _named(looks, lambda one: f"{one.name} ({one.size[0]}×{one.size[1]})")
    most = max(resolution / min(one.size) for one in looks)
    times = f"{most:.1f} times" if len(looks) == 1 else f"up to {most:.1f} times"
    return (
        f"{names} {_is(looks)} smaller than the training resolution {resolution} and will be scaled up {times}, which "
        f"blurs: take {_one(looks, 'larger')}, or lower the resolution."
    )


def _named(looks: Sequence[PictureMeasurements], name: Callable[[PictureMeasurements], str] = lambda one: one.name) -> str:
    names = [name(one) for one in looks[:_NAMES]]
    more = len(looks) - len(names)
    return _listed([*names, f"{more} more"] if more else names)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _is(looks: Sequence[PictureMeasurements]) -> str:
    return "is" if len(looks) == 1 else "are"


def _it(looks: Sequence[PictureMeasurements]) -> str:
    return "it" if len(looks) == 1 else "them"


def _one(looks: Sequence[PictureMeasurements], better: str) -> str:
    return f"a {better} one" if len(looks) == 1 else f"{better} ones"
