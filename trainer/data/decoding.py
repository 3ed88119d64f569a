"""Picture files as pixels: upright, in sRGB, whatever the format, the bit depth and the metadata."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from .colour import ColourProfileError, to_srgb
from .metadata_blocks import without_metadata

MAX_PIXELS = 178_000_000
MIN_SIDE = 32
_TRANSPOSITIONS = {  # EXIF orientation → what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF 6.0
_WHITE_IS_ZERO, _SIGNED = 0, 2
_SAVE_OTHERWISE = "save it with 8 or 16 bits per channel"


class _RefusedError(ValueError):
    """A picture that is read as it should be, and can't be used."""


def decode(content: bytes, notes: list[str] | None = None) -> Image.Image:
    """Decode a picture file: upright by its EXIF tag, first frame, RGB; transparency on white.

    Args:
        content: The file's bytes; any format and mode that Pillow reads (palette, grey, 16 bit, CMYK …). With a colour
            profile, colours are converted to sRGB; without one, they are used unchanged.
        notes: Gets what was ignored in the file; each note completes a sentence that begins "<name>: ".

    Raises:
        ValueError: It can't be decoded, or is above `MAX_PIXELS` or below `MIN_SIDE`; the text gives the reason.
    """
    notes = [] if notes is None else notes
    return _decoded(content, lambda image: _as_rgb(_in_srgb(image, notes)), notes)


def decode_mask(content: bytes) -> Image.Image:
    """Decode a mask's file: upright, grey, transparency on black. Raises as `decode`."""
    return _decoded(content, lambda image: _as_rgb(image, "black").convert("L"), [])


def decode_alpha(content: bytes) -> Image.Image:
    """A picture's opacity, upright, grey; entirely white if it has no transparency. Raises as `decode`."""
    return _decoded(content, _opacity, [])


def _decoded(content: bytes, convert: Callable[[Image.Image], Image.Image], notes: list[str]) -> Image.Image:
    """Decode a picture file and convert it; if its metadata stands in the way, without that.

    Args:
        content: The file's bytes.
        convert: Gets the upright image, with 8 bits a channel in the file's own colours.
        notes: Gets what was ignored.

    Raises:
        ValueError: It can't be decoded, or is too large or too small; its text says why.
    """
    try:
        return _attempt(content, convert)
    except _RefusedError:
        raise
    except ValueError as error:
        for less in without_metadata(content):
            if less == content:
                continue
            try:
                image = _attempt(less, convert)
            except ValueError:
                continue
            notes.append("its metadata is damaged or too large and was ignored")
            return image
        raise error


def _attempt(content: bytes, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Decode a picture file and convert it; see `_decoded`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(content))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise _RefusedError(f"{width}×{height} is too large; scale it down to at most 8000 pixels per side")
            if min(width, height) < MIN_SIDE:
                raise _RefusedError(f"{width}×{height} is too small; at least {MIN_SIDE} pixels per side are needed")
            image.draft("RGB", (4096, 4096))  # lets the JPEG decoder skip detail that no resolution uses
            image.seek(0)
            image.load()
            transposition = _TRANSPOSITIONS.get(_orientation(image))
            image = _in_eight_bits(image)
            return convert(image if transposition is None else image.transpose(transposition))
    except _RefusedError:
        raise
    except Image.DecompressionBombError as error:
        raise _RefusedError("it is too large; scale it down to at most 8000 pixels per side") from error
    except UnidentifiedImageError as error:
        raise ValueError("it is not a picture in a supported format; save it as JPEG or PNG") from error
    except Exception as error:  # Pillow's readers fail on damaged files in many ways
        raise ValueError(f"it can't be decoded ({error})") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, if the tag block is damaged, which viewers ignore.

    `ImageOps.exif_transpose` would also rewrite the block, and fail on a damaged one.
    """
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged block can fail in any way, and the pixels are good
        return 1
    return value if isinstance(value, int) else 1


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 or 32 bits a pixel as one of 8, scaled so that white stays white; others as they are.

    Raises:
        ValueError: It is not known which number is white.
    """
    if image.mode.startswith("I"):
        grey = _integers_in_eight_bits(image)
    elif image.mode == "F":
        grey = _reals_in_eight_bits(np.asarray(image, dtype=np.float64))
    else:
        return image
    if _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:
        grey = 255 - grey
    scaled = Image.fromarray(grey)
    scaled.info = image.info
    return scaled


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """A number in a TIFF file's tags; the default in other files."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _integers_in_eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    bits = _tag(image, _BITS, 16)  # other formats have 16 bits, whatever Pillow keeps them in
    values = np.asarray(image)
    if _tag(image, _SAMPLE_FORMAT, 1) == _SIGNED:
        if values.min() < 0:
            raise _RefusedError(f"it has negative values; {_SAVE_OTHERWISE}")
        bits -= 1
    white = 2**bits - 1
    if bits > 16:
        values = values.view(np.uint32)  # Pillow keeps them as signed numbers
        if 0 < values.max() < white / 256:
            raise _RefusedError(f"its brightest pixel is {values.max()} of {white}, so it is black; {_SAVE_OTHERWISE}")
    scaled: NDArray[Any] = values.astype(np.float32 if bits <= 16 else np.float64) / (white / 255)
    return scaled.clip(0, 255).astype(np.uint8)


def _reals_in_eight_bits(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Real numbers in 8 bits: white is 1, or 255, or 65535, whichever the brightest pixel comes near to."""
    if not np.isfinite(values).all():
        raise _RefusedError(f"it has NaN or infinite values; {_SAVE_OTHERWISE}")
    brightest = values.max()
    ranges = {1: (0, 1.01), 255: (16, 257), 65535: (4096, 66_000)}  # with some room for what resampling adds
    white = next((white for white, (above, most) in ranges.items() if above < brightest <= most), int(brightest == 0))
    if not white or values.min() < -0.01 * white:
        text = f"its values range from {values.min():g} to {brightest:g}, so its white level is unknown"
        raise _RefusedError(f"{text}; {_SAVE_OTHERWISE}")
    return (values * (255 / white)).clip(0, 255).astype(np.uint8)


def _is_transparent(image: Image.Image) -> bool:
    return "A" in image.mode or "transparency" in image.info


def _opacity(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").getchannel("A") if _is_transparent(image) else Image.new("L", image.size, 255)


def _in_srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """The image in sRGB by its colour profile, with its transparency; as it is if it has none that can be used.

    Raises:
        ValueError: It is Lab, which can't be shown without conversion.
    """
    profile: bytes = image.info.get("icc_profile") or b""
    if not profile and image.mode != "LAB":
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.mode != "LAB" and _is_transparent(image) else None
    opaque = image
    if image.mode in ("1", "LA", "La"):
        opaque = image.convert("L")
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        opaque = image.convert("RGBA").convert("RGB")
    try:
        converted = to_srgb(opaque, b"" if image.mode == "LAB" else profile)
    except ColourProfileError as error:
        if image.mode == "LAB":
            raise ValueError(
                "it is in the Lab colour space, which this version of Pillow can't convert; save it as RGB"
            ) from error
        notes.append(f"its colour profile {error}")
        return image
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _as_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    if _is_transparent(image):
        foreground = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", foreground.size, background), foreground).convert("RGB")
    return image.convert("RGB")
