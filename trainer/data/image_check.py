"""Checks a subject's pictures before training: near-duplicates, small, blurred, dark, empty and much cropped ones.

Each picture is opened once more, scaled down, and measured; only the measurements are kept. Nothing is an error: a
picture may be as intended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core.errors import suggest
from ..core.events import Listener, Note, Phase, stop_if_asked
from ..core.text import listed
from ..settings.train import TrainSettings
from .buckets import kept_share, nearest_shape, training_shapes
from .images import Picture

Array = NDArray[np.float32]
MEASURED_SIDE = 640  # longer side, in pixels, at which pictures are measured
MAX_HASH_DISTANCE = 10  # bits of 64 in which the hashes of near-duplicates differ at most
# The next five are from photographs as they are and blurred by a Gaussian of 1 to 5 pixels, and from drawings.
MIN_STEEPNESS = 0.12  # a picture whose steepest edges rise less per pixel is blurred, whatever the others are like
MIN_STEEPNESS_IN_SET = 0.2  # so is one below this and below 0.4 of its set's median
MAX_BLUR = 0.5  # of Crété's measure: sharp photographs have up to 0.45
MIN_BRIGHTNESS = 45  # of 255: almost all of a dark picture is below it
MAX_CUT = 0.35  # share of a picture that may be cut away without a word: a third is, of the 3:2 of cameras
MIN_DETAIL = 0.01  # share of the pixels that differ from the picture's median colour
_MAX_UPSCALING = 1.1  # a factor; less is not seen
_MAX_NAMES = 6  # files that a message names
_BATCH = 32
_THREADS = 2


@dataclass(frozen=True)
class PictureMeasurements:
    """What was measured of one picture.

    Attributes:
        name: File name.
        size: Width and height in pixels.
        hash: `perceptual_hash`.
        steepness: `steepness`.
        blur: `blur`.
        brightness: 95th percentile of the grey values, 0 to 255.
        detail: `detail`.
    """

    name: str
    size: tuple[int, int]
    hash: int
    steepness: float
    blur: float
    brightness: float
    detail: float


def check_pictures(pictures: Sequence[Picture], settings: TrainSettings, listener: Listener) -> None:
    """Measure a subject's pictures and report advice, as warnings that name the files.

    Args:
        pictures: They are opened. Of several with the same content one is measured: `load_pictures` has named those.
        settings: Resolution and buckets.
        listener: Gets the advice, and is polled every few pictures for whether to stop.

    Raises:
        CancelledError: The listener asked to stop.
        PicturesError: A picture is missing, or has changed since it was read.
    """
    different = list({picture.digest: picture for picture in reversed(pictures)}.values())[::-1]
    measured: list[PictureMeasurements] = []
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:  # Pillow decodes and scales without Python's lock
        for start in range(0, len(different), _BATCH):
            if start:
                listener.report(Phase("looking at pictures", start, len(different)))
                stop_if_asked(listener)
            batch = pool.map(measure_picture, different[start : start + _BATCH])
            measured += batch
    for note in image_advice(measured, settings.resolution, training_shapes(settings, settings.resolution)):
        listener.report(note)


def measure_picture(picture: Picture) -> PictureMeasurements:
    """Measure a picture. Raises PicturesError if it can no longer be opened."""
    image = picture.open()
    scale = min(1.0, MEASURED_SIDE / max(image.size))
    width, height = (max(2, round(side * scale)) for side in image.size)
    small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    grey = np.asarray(small.convert("L"), dtype=np.float32)
    return PictureMeasurements(
        name=picture.name,
        size=image.size,
        hash=perceptual_hash(small),
        steepness=steepness(grey),
        blur=blur(grey),
        brightness=float(np.percentile(grey, 95)),
        detail=detail(np.asarray(small, dtype=np.float32)),
    )


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that near-duplicates have in common: which of the 8 × 8 lowest frequencies are above their median.

    The DCT hash of Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1,
    as Krawetz 2011, "Looks Like It", scales it: 32 × 32 pixels of grey. Scaling, compression, a little cropping and
    other brightness change up to 10 bits; other pictures differ in 16 or more, mirrored ones in 28 or more.
    """
    side = 32
    kept = 8
    grey = np.asarray(image.convert("L").resize((side, side), Image.Resampling.LANCZOS), dtype=np.float64)
    index = np.arange(side)
    cosines = np.cos(np.pi * (2 * index[None] + 1) * index[:kept, None] / (2 * side))
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
    across = np.diff(grey, axis=1)[:-1]
    down = np.diff(grey, axis=0)[:, :-1]
    contrast = np.percentile(grey, 99) - np.percentile(grey, 1)
    return float(np.percentile(np.hypot(across, down), 99.9) / max(float(contrast), 16.0))


def blur(grey: Array) -> float:
    """How little a picture changes if it is blurred again (Crété et al. 2007, "The Blur Effect").

    Args:
        grey: (height, width), 0 to 255.

    Returns:
        0, sharp, to 1, blurred or flat. Slopes of one grey value per pixel are not counted: they are rounding.
    """
    by_axis = []
    for pixels in (grey, grey.T):
        sums = np.pad(pixels, ((5, 4), (0, 0)), mode="edge").cumsum(axis=0, dtype=np.float64)
        blurred = (sums[9:] - sums[:-9]) / 9  # a box filter of nine pixels
        slopes = np.abs(np.diff(pixels, axis=0))
        slopes = np.where(slopes > 1, slopes, 0)
        lost = np.maximum(slopes - np.abs(np.diff(blurred, axis=0)), 0).sum()
        total = slopes.sum()
        by_axis.append(1.0 - float(lost / total) if total else 1.0)
    return max(by_axis)


def detail(pixels: Array) -> float:
    """Share of the pixels that differ from the picture's median colour.

    Args:
        pixels: (height, width, 3), 0 to 255.

    Returns:
        0 to 1: the share of pixels with a channel more than 12 away from that channel's median.
    """
    median = np.median(pixels, axis=(0, 1))
    return float((np.abs(pixels - median).max(axis=2) > 12).mean())


def near_duplicates(hashes: Sequence[int]) -> list[list[int]]:
    """Groups of two or more hashes, by index, each close to another of its group."""
    groups: list[list[int]] = []
    for index, value in enumerate(hashes):
        near = [
            group
            for group in groups
            if any((value ^ hashes[other]).bit_count() <= MAX_HASH_DISTANCE for other in group)
        ]
        groups = [group for group in groups if group not in near]
        groups.append(sorted([index, *(other for group in near for other in group)]))
    return sorted(group for group in groups if len(group) > 1)


def image_advice(
    measured: Sequence[PictureMeasurements], resolution: int, shapes: Sequence[tuple[int, int]] = ()
) -> list[Note]:
    """What to do about these pictures: a warning for each kind of problem, which names the picture if it is about one.

    Args:
        measured: Measurements of every picture.
        resolution: Side of the square that is trained on, in pixels.
        shapes: Widths and heights to which pictures are cropped; none: the square alone.
    """
    shapes = shapes or [(resolution, resolution)]
    cropped = [picture for picture in measured if _cut_share(picture, shapes) > MAX_CUT]
    empty = [picture for picture in measured if picture.detail < MIN_DETAIL]
    full = [picture for picture in measured if picture.detail >= MIN_DETAIL]
    small = [picture for picture in measured if resolution / min(picture.size) > _MAX_UPSCALING]
    blurred = _blurred(full)
    dark = [picture for picture in full if picture.brightness < MIN_BRIGHTNESS]
    advice = []
    if empty:
        text = f"{_names(empty)} {_is_or_are(empty)} almost a single colour: leave {_it_or_them(empty)} out."
        advice.append(_warning(text, empty))
    for group in near_duplicates([picture.hash for picture in full]):
        similar = [full[index] for index in group]
        text = f"{_names(similar)} look almost the same: keep only the best one, or the model will overfit to it."
        advice.append(_warning(text, similar))
    if cropped:
        advice.append(_too_much_cropped(cropped, shapes))
    if small:
        advice.append(_warning(_too_small(small, resolution), small))
    if len(blurred) > 1 and 2 * len(blurred) > len(full):
        text = (
            f"{_names(blurred)} have no sharp edges, and neither will the generated pictures. Unless you want that "
            "style, use sharper pictures."
        )
        advice.append(_warning(text, blurred))
    elif blurred:
        text = f"{_names(blurred)} {_is_or_are(blurred)} blurred: use {_better(blurred, 'sharper')}."
        advice.append(_warning(text, blurred))
    if dark:
        pronoun = _it_or_them(dark)
        text = f"{_names(dark)} {_is_or_are(dark)} very dark: brighten {pronoun}, or leave {pronoun} out."
        advice.append(_warning(text, dark))
    return advice


def _warning(text: str, pictures: Sequence[PictureMeasurements]) -> Note:
    return Note(text, warning=True, picture=pictures[0].name if len(pictures) == 1 else "")


def _blurred(measured: Sequence[PictureMeasurements]) -> list[PictureMeasurements]:
    median = float(np.median([picture.steepness for picture in measured])) if measured else 0.0
    limit = max(MIN_STEEPNESS, min(MIN_STEEPNESS_IN_SET, 0.4 * median))
    return [picture for picture in measured if picture.steepness < limit and picture.blur > MAX_BLUR]


def _cut_share(picture: PictureMeasurements, shapes: Sequence[tuple[int, int]]) -> float:
    """The share of a picture that is cut away, so that the shape nearest to it is left."""
    return 1 - kept_share(picture.size, nearest_shape(picture.size, list(shapes)))


def _too_much_cropped(pictures: Sequence[PictureMeasurements], shapes: Sequence[tuple[int, int]]) -> Note:
    is_square = len(shapes) == 1
    names = _names(pictures, lambda picture: f"{picture.name} ({100 * _cut_share(picture, shapes):.0f} %)")
    shape = "a square" if is_square else "an aspect ratio of at most 4:1"
    buckets = f"set {suggest('aspect_buckets', True)}, or " if is_square else ""
    pronoun = _it_or_them(pictures)
    return _warning(
        f"Cropping to {shape} removes much of {names}: {buckets}crop {pronoun} around the subject yourself.", pictures
    )


def _too_small(pictures: Sequence[PictureMeasurements], resolution: int) -> str:
    names = _names(pictures, lambda picture: f"{picture.name} ({picture.size[0]}×{picture.size[1]})")
    largest = max(resolution / min(picture.size) for picture in pictures)
    factor = f"{largest:.1f} times" if len(pictures) == 1 else f"up to {largest:.1f} times"
    return (
        f"{names} {_is_or_are(pictures)} smaller than the training resolution {resolution} and will be upscaled "
        f"{factor}, which blurs {_it_or_them(pictures)}: use {_better(pictures, 'larger')}, or lower the resolution."
    )


def _names(
    pictures: Sequence[PictureMeasurements],
    name: Callable[[PictureMeasurements], str] = lambda picture: picture.name,
) -> str:
    return listed([name(picture) for picture in pictures], _MAX_NAMES)


def _is_or_are(pictures: Sequence[PictureMeasurements]) -> str:
    return "is" if len(pictures) == 1 else "are"


def _it_or_them(pictures: Sequence[PictureMeasurements]) -> str:
    return "it" if len(pictures) == 1 else "them"


def _better(pictures: Sequence[PictureMeasurements], adjective: str) -> str:
    return f"a {adjective} one" if len(pictures) == 1 else f"{adjective} ones"
