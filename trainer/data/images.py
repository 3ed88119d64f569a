"""Pictures, their captions and masks, from a folder, a zip file or tensors: checked, decoded, cropped."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..core.errors import PicturesError
from ..core.events import Listener, Note
from ..core.prompts import fill_placeholders, split_prompts
from ..core.seeding import generator
from .folder import AnnotationOptions, PictureFile, find_picture_files

MAX_PIXELS = 178_000_000
MIN_SIDE = 32
_ROUNDED = 0.05  # by which the shape of a small mask may differ from its picture's
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Picture:
    """One training picture.

    Attributes:
        name: File name, for messages.
        caption: What it shows.
        digest: Hexadecimal digest of its content.
        open: Decodes it: an upright RGB picture of any size.
        further: Other captions; each sample takes one of all.
        repeats: How often it is taken in an epoch.
        mask: Decodes its mask, a grey picture of any size: white where the subject is. None: no mask.
        mask_digest: Hexadecimal digest of the mask's content.
    """

    name: str
    caption: str
    digest: str
    open: Callable[[], Image.Image]
    further: tuple[str, ...] = ()
    repeats: int = 1
    mask: Callable[[], Image.Image] | None = None
    mask_digest: str = ""

    @property
    def captions(self) -> tuple[str, ...]:
        """All of its captions."""
        return (self.caption, *self.further)

    @property
    def facts(self) -> list[Any]:
        """Everything on which training depends, as JSON values; what is usual is left out."""
        further = {"further": self.further, "repeats": self.repeats - 1, "mask": self.mask_digest}
        return [self.digest, self.caption, *[{name: value} for name, value in further.items() if value]]


def decode(content: bytes) -> Image.Image:
    """Decode a picture file: upright by its EXIF tag, first frame, RGB; transparency on white.

    Args:
        content: The file's bytes; any format and mode that Pillow reads (palette, grey, 16 bit, CMYK …).

    Raises:
        ValueError: It can't be decoded, or is larger than `MAX_PIXELS` or smaller than `MIN_SIDE`; says so.
    """
    return _decoded(content, _as_rgb)


def decode_mask(content: bytes) -> Image.Image:
    """Decode a mask's file: upright, grey, transparency on black; as `decode`."""
    return _decoded(content, lambda image: _as_rgb(image, "black").convert("L"))


def decode_alpha(content: bytes) -> Image.Image:
    """How opaque a picture is, upright, grey; white all over if it has no transparency. As `decode`."""
    return _decoded(content, _opacity)


def _decoded(content: bytes, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Decode a picture file and convert it.

    Args:
        content: The file's bytes.
        convert: Of the upright picture.

    Raises:
        ValueError: It can't be decoded, or is larger than `MAX_PIXELS` or smaller than `MIN_SIDE`; says so.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}×{height} is too large; scale it down to at most 8000 pixels a side")
            if min(width, height) < MIN_SIDE:
                raise ValueError(f"{width}×{height} is too small; at least {MIN_SIDE} pixels a side are needed")
            image.draft("RGB", (4096, 4096))  # lets the JPEG decoder skip detail that no resolution uses
            image.seek(0)
            return convert(_upright(image))
    except Image.DecompressionBombError as error:
        raise ValueError("it is too large; scale it down to at most 8000 pixels a side") from error
    except UnidentifiedImageError as error:
        raise ValueError("it is no picture of a known format; save it as JPEG or PNG") from error
    except (OSError, SyntaxError, EOFError, MemoryError, OverflowError, TypeError, LookupError, RuntimeError) as error:
        raise ValueError(f"it can't be decoded ({error})") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turn by the EXIF tag; a damaged tag block is ignored, as viewers do.

    `ImageOps.exif_transpose` would also write the block anew, and fail on a damaged one.
    """
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (struct.error, ValueError, TypeError, SyntaxError, LookupError, ArithmeticError, OSError):
        return image
    return image if turn is None else image.transpose(turn)


def _is_transparent(image: Image.Image) -> bool:
    return "A" in image.mode or "transparency" in image.info


def _opacity(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").getchannel("A") if _is_transparent(image) else Image.new("L", image.size, 255)


def _as_rgb(image: Image.Image, ground: str = "white") -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float32)
        return Image.fromarray((values / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.asarray(image)
        scale = 255 if values.max() <= 1 else 1
        return Image.fromarray((values * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if _is_transparent(image):
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, ground), layer).convert("RGB")
    return image.convert("RGB")


def crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale (Lanczos) until `image` covers width × height pixels, then cut the centre out."""
    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def size_conditioning(size: tuple[int, int], width: int, height: int) -> tuple[int, int, int, int, int, int]:
    """What `crop` does to a picture, as SDXL is told it.

    Args:
        size: The picture's width and height.
        width: Of the cut.
        height: Of the cut.

    Returns:
        Original height and width, top and left of the cut in the scaled picture, height and width of the cut.
    """
    scale = max(width / size[0], height / size[1])
    top, left = (round((side * scale - cut) / 2) for side, cut in ((size[1], height), (size[0], width)))
    return size[1], size[0], top, left, height, width


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture as the autoencoder takes it: (3, height, width), float32, in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def mask_weights(mask: Image.Image, width: int, height: int) -> Tensor | None:
    """How much of each place lies within a mask: (1, height, width) in [0, 1]; None if nothing does."""
    weights = torch.from_numpy(np.array(mask.resize((width, height), Image.Resampling.BOX))).float()[None] / 255
    return weights if weights.any() else None


def load_pictures(
    source: Path | Sequence[Tensor],
    prompt: str,
    listener: Listener,
    reading: AnnotationOptions | None = None,
    *,
    captions: Sequence[str] = (),
    masks: Sequence[Tensor] = (),
) -> list[Picture]:
    """Find and check the pictures of a subject; every one is decoded once, here.

    Args:
        source: A folder, a zip file, or tensors of shape (height, width, 3 or 4) in [0, 1].
        prompt: Caption of pictures without one; several, separated by "|", are used in turn by chance.
        listener: Told what was skipped and what looks wrong.
        reading: Where captions and masks come from.
        captions: Of tensors, one each, if there are any.
        masks: Of tensors, (height, width) in [0, 1], 1 where the subject is, one each, if there are any.

    Returns:
        The pictures, ordered by name.

    Raises:
        PicturesError: The place is missing, empty or unreadable, a zip entry points outside, no picture is good, or
            there are more or fewer captions or masks than pictures.
    """
    reading = reading or AnnotationOptions()
    prompts = split_prompts(fill_placeholders(prompt, reading.token, reading.noun)) or [""]
    if isinstance(source, Path):
        files = find_picture_files(source, reading, prompts[0], listener)
        found = iter([_from_file(file, prompts, reading) for file in files])
    else:
        for kind, several in (("captions", captions), ("masks", masks)):
            if len(several) not in (0, len(source)):
                raise PicturesError(
                    f"There are {len(source)} connected images, but {len(several)} {kind}.",
                    f"Connect as many {kind} as images, or none.",
                )
        found = _from_tensors(source, prompts, reading, captions, masks)
    good: list[Picture] = []
    bad: list[str] = []
    for picture in found:
        try:
            size = picture.open().size
        except ValueError as error:
            bad.append(f"{picture.name}: {error}")
            listener.report(Note(f"{picture.name} is left out: {error}.", warning=True))
        else:
            good.append(_with_good_mask(picture, size, listener))
    if not good:
        detail = f" ({'; '.join(bad[:3])})" if bad else ""
        raise PicturesError(
            f"There is no usable picture in {_place(source)}{detail}.",
            "Give 3 to 20 pictures of the subject as JPEG, PNG or WebP.",
        )
    _advise(good, listener)
    return good


def split_validation(pictures: Sequence[Picture], count: int, seed: int) -> tuple[list[Picture], list[Picture]]:
    """Pictures to train on, and `count` others by chance that are held out, both in their order.

    Raises:
        PicturesError: None would be left to train on.
    """
    if count >= len(pictures):
        raise PicturesError(
            f"validation_pictures is {count}, but there are only {len(pictures)} pictures.",
            "Lower validation_pictures, so that some are left to learn from.",
        )
    chosen = set(torch.randperm(len(pictures), generator=generator(seed, "validation"))[:count].tolist())
    return (
        [one for number, one in enumerate(pictures) if number not in chosen],
        [one for number, one in enumerate(pictures) if number in chosen],
    )


def _with_good_mask(picture: Picture, size: tuple[int, int], listener: Listener) -> Picture:
    """The picture, which has that size, without a mask that says nothing.

    Raises:
        PicturesError: The mask can't be read.
    """
    if picture.mask is None:
        return picture
    try:
        mask = picture.mask()
    except ValueError as error:
        raise PicturesError(
            f"The mask of {picture.name} can't be used: {error}.", "Make it anew, or turn masks off."
        ) from error
    darkest, brightest = mask.getextrema()
    (width, height), stretched = mask.size, mask.width * size[1] / (mask.height * size[0])
    if max(stretched, 1 / stretched) > 1 + _ROUNDED:
        text = f"The mask of {picture.name} is {width}×{height}, the picture {size[0]}×{size[1]}: it is stretched."
        listener.report(Note(text, warning=True))
    if brightest == 0:
        listener.report(Note(f"The mask of {picture.name} is black all over; it is left out.", warning=True))
    return replace(picture, mask=None, mask_digest="") if darkest == 255 or brightest == 0 else picture


def _advise(pictures: Sequence[Picture], listener: Listener) -> None:
    if len(pictures) < 3:
        listener.report(
            Note(
                f"Only {len(pictures)} picture(s): 3 to 20 from several sides and in several places teach better.", True
            )
        )
    first: dict[str, str] = {}
    for picture in pictures:
        if picture.digest in first:
            listener.report(Note(f"{picture.name} is the same picture as {first[picture.digest]}.", warning=True))
        first.setdefault(picture.digest, picture.name)


def _place(source: Path | Sequence[Tensor]) -> str:
    return str(source) if isinstance(source, Path) else "the connected images"


def _from_file(file: PictureFile, prompts: Sequence[str], reading: AnnotationOptions) -> Picture:
    captions = [file.caption] if file.caption else prompts
    read, mask_digest = file.read, ""
    mask: Callable[[], Image.Image] | None = None
    if file.mask is not None:
        mask_content = file.mask()
        mask, mask_digest = partial(decode_mask, mask_content), hashlib.sha256(mask_content).hexdigest()
    elif reading.masks == "alpha":
        mask, mask_digest = (lambda: decode_alpha(read())), "alpha"
    return Picture(
        file.name,
        captions[0],
        file.digest,
        lambda: decode(read()),
        tuple(captions[1:]),
        file.repeats,
        mask,
        mask_digest,
    )


def _from_tensors(
    tensors: Sequence[Tensor],
    prompts: Sequence[str],
    reading: AnnotationOptions,
    captions: Sequence[str],
    masks: Sequence[Tensor],
) -> Iterator[Picture]:
    for number, tensor in enumerate(tensors):
        name = f"connected image {number + 1}"
        if tensor.ndim != 3 or tensor.shape[2] not in (1, 3, 4):
            raise PicturesError(f"{name} has the shape {tuple(tensor.shape)}.", "Connect pictures: (height, width, 3).")
        content, digest = _as_png(tensor)
        own = fill_placeholders(captions[number].strip(), reading.token, reading.noun) if captions else ""
        said = [own] if own else prompts
        mask: Callable[[], Image.Image] | None = None
        mask_digest = ""
        if masks and reading.masks != "off":
            if masks[number].ndim != 2:
                shape = tuple(masks[number].shape)
                raise PicturesError(f"The mask of {name} has the shape {shape}.", "Connect masks: (height, width).")
            mask_content, mask_digest = _as_png(masks[number][:, :, None])
            mask = partial(decode_mask, mask_content)
        elif reading.masks == "alpha" and tensor.shape[2] == 4:
            mask, mask_digest = partial(decode_alpha, content), "alpha"
        opened = partial(decode, content)
        yield Picture(name, said[0], digest, opened, tuple(said[1:]), reading.repeats, mask, mask_digest)


def _as_png(tensor: Tensor) -> tuple[bytes, str]:
    """A tensor, (height, width, 1, 3 or 4) in [0, 1], as a PNG file and the digest of its values."""
    values = (tensor.detach().float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    image = Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue(), hashlib.sha256(values.tobytes() + str(values.shape).encode()).hexdigest()
