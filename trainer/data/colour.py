"""Colours as viewers show them: pictures with a colour profile become sRGB, which models are trained on."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms

_SAME = 2  # grey values of 255: a profile that changes less is sRGB itself, and its pictures stay to the bit
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # colour space of a profile → mode of its pictures


class ColourProfileError(ValueError):
    """A colour profile can't be used; the text completes a sentence: "its colour profile …"."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """A picture in sRGB, as littleCMS converts it with the intent "perceptual", which is what viewers do.

    Args:
        image: RGB, L, CMYK or LAB.
        profile: Its ICC profile; empty for LAB, which is Lab by itself.

    Returns:
        RGB; the picture itself, in mode RGB, if its profile is sRGB.

    Raises:
        ColourProfileError: The profile is damaged or for other pictures, or Pillow lacks littleCMS.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        space = source.profile.xcolor_space.strip()
        if space == "RGB" and image.mode == "L":  # as programs write greyscale pictures without changing the profile
            image = image.convert("RGB")
        if _MODES.get(space) != image.mode:
            raise ColourProfileError(f"is for {space} pictures and was ignored")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
        if image.mode in ("RGB", "L") and _changes_nothing(transform, image.mode):
            return image.convert("RGB")
        converted = ImageCms.applyTransform(image, transform)
    except ImportError as error:
        raise ColourProfileError("was ignored: this Pillow was built without littleCMS") from error
    except (ImageCms.PyCMSError, OSError, TypeError, AttributeError, MemoryError) as error:
        raise ColourProfileError("is damaged and was ignored") from error
    assert converted is not None  # it is not changed in place
    return converted


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a conversion leaves all colours, or all shades of grey, as they are."""
    levels = np.arange(0, 256, 32 if mode == "RGB" else 1, dtype=np.uint8)
    if mode == "RGB":
        probe = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        expected = probe
    else:
        probe = levels[None]
        expected = np.repeat(probe[:, :, None], 3, axis=2)
    converted = ImageCms.applyTransform(Image.fromarray(probe), transform)
    return bool(np.abs(np.asarray(converted, dtype=int) - expected).max() <= _SAME)
