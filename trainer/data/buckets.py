"""Aspect-ratio buckets: the shapes in which pictures are trained."""

from __future__ import annotations

import math

from ..settings.data import DataSettings

_MAX_ASPECT_RATIO = 4.0  # width over height, or height over width


def training_shapes(settings: DataSettings, resolution: int) -> list[tuple[int, int]]:
    """The widths and heights in which pictures are trained: the square alone, or all buckets; the square first."""
    if settings.aspect_buckets:
        return bucket_shapes(resolution, settings.bucket_step)
    return [(resolution, resolution)]


def bucket_shapes(resolution: int, step: int) -> list[tuple[int, int]]:
    """Widths and heights with at most as many pixels as a square; the square first, then from narrow to wide.

    Args:
        resolution: Side of the square in pixels.
        step: Sides are multiples of it, except the square's.

    Returns:
        (width, height) pairs: for each width the largest height that the number of pixels allows.
    """
    shapes: set[tuple[int, int]] = set()
    for width in range(step, int(resolution * math.sqrt(_MAX_ASPECT_RATIO)) + 1, step):
        height = resolution * resolution // width // step * step
        if height and max(width / height, height / width) <= _MAX_ASPECT_RATIO:
            shapes |= {(width, height), (height, width)}
    return [(resolution, resolution), *sorted(shape for shape in shapes if shape[0] != shape[1])]


def nearest_shape(size: tuple[int, int], shapes: list[tuple[int, int]]) -> tuple[int, int]:
    """The shape that crops the least of a picture; of several, the one with the most pixels.

    Args:
        size: Width and height of the picture.
        shapes: Widths and heights to choose from.
    """
    return max(shapes, key=lambda shape: (kept_share(size, shape), shape[0] * shape[1]))


def kept_share(size: tuple[int, int], shape: tuple[int, int]) -> float:
    """The share of a picture that is left when it covers `shape` without being distorted: in (0, 1]."""
    picture_ratio = size[0] / size[1]
    shape_ratio = shape[0] / shape[1]
    return min(picture_ratio / shape_ratio, shape_ratio / picture_ratio)
