"""Pictures, their captions and masks, from a folder, a zip file or tensors: checked, cropped."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..core.errors import PicturesError, suggest
from ..core.events import Listener, Note
from ..core.seeding import generator
from ..core.text import listed
from .decoding import decode, decode_alpha, decode_mask
from .folder import AnnotationOptions, PictureFile, find_picture_files
from .tree import shown_name

_ASPECT_TOLERANCE = 0.05  # rounding: by how much the aspect ratio of a small mask may differ from its picture's


@dataclass(frozen=True)
class Picture:
    """One training picture.

    Attributes:
        name: File name, for messages.
        caption: What it shows.
        digest: Hexadecimal digest of its content.
        open: Decodes it: an upright RGB image of any size. Raises PicturesError if its file is missing or has changed.
        more_captions: Other captions; each sample uses one of all of them.
        repeats: How often it is taken in an epoch.
        mask: Decodes its mask, a grey image of any size: white where the subject is. None: no mask.
        mask_digest: Hexadecimal digest of the mask's content.
        class_captions: What it shows to a model that doesn't know the subject; empty: unknown.
    """

    name: str
    caption: str
    digest: str
    open: Callable[[], Image.Image]
    more_captions: tuple[str, ...] = ()
    repeats: int = 1
    mask: Callable[[], Image.Image] | None = None
    mask_digest: str = ""
    class_captions: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """All of its captions."""
        return (self.caption, *self.more_captions)

    @property
    def fingerprint_values(self) -> list[Any]:
        """Everything on which training depends, as JSON values for a run's fingerprint; defaults are left out."""
        optional = {"further": self.more_captions, "repeats": self.repeats - 1, "mask": self.mask_digest}
        return [self.digest, self.caption, *({name: value} for name, value in optional.items() if value)]


def crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale (Lanczos) until `image` covers width × height pixels, then crop the centre."""
    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def size_conditioning(size: tuple[int, int], width: int, height: int) -> tuple[int, int, int, int, int, int]:
    """What `crop` does to an image, as SDXL is conditioned on it (Podell et al. 2023, section 2.2).

    Args:
        size: The image's width and height.
        width: Of the crop.
        height: Of the crop.

    Returns:
        Original height and width, top and left of the crop in the scaled image, height and width of the crop.
    """
    original_width, original_height = size
    scale = max(width / original_width, height / original_height)
    top = round((original_height * scale - height) / 2)
    left = round((original_width * scale - width) / 2)
    return original_height, original_width, top, left, height, width


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as the autoencoder takes it: (3, height, width), float32, in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def mask_weights(mask: Image.Image, width: int, height: int) -> Tensor | None:
    """The share of each latent pixel that lies within a mask: (1, height, width) in [0, 1]; None if all are 0.

    Args:
        mask: Grey, cropped as its picture is.
        width: Of the latents.
        height: Of the latents.
    """
    weights = torch.from_numpy(np.array(mask.resize((width, height), Image.Resampling.BOX))).float()[None] / 255
    return weights if weights.any() else None


def load_pictures(
    source: Path | Sequence[Tensor],
    prompt: str,
    listener: Listener,
    options: AnnotationOptions | None = None,
    *,
    captions: Sequence[str] = (),
    masks: Sequence[Tensor] = (),
) -> list[Picture]:
    """Find and check the pictures of a subject; every one is decoded once.

    Args:
        source: A folder, a zip file, or tensors of shape (height, width, 3 or 4) in [0, 1].
        prompt: Caption of pictures without one; of several (`parse_prompts`), each sample uses one at random.
        listener: Gets warnings about pictures that were skipped or look wrong.
        options: Where captions and masks come from; None: the defaults.
        captions: Of tensors, one each, if there are any.
        masks: Of tensors, (height, width) in [0, 1], 1 where the subject is, one each, if there are any.

    Returns:
        The pictures, ordered by name.

    Raises:
        PicturesError: The path does not exist, is empty or unreadable, a caption or mask can't be used, no picture can
            be used, or there are more or fewer captions or masks than pictures.
    """
    options = options or AnnotationOptions()
    prompts = options.prompts(prompt, "The prompt") or [""]
    problems: list[str] = []
    if isinstance(source, Path):
        files, problems = find_picture_files(source, options, prompts[0], listener)
        pictures = iter([_from_file(file, prompts, options) for file in files])
    else:
        _require_one_each("captions", captions, source)
        _require_one_each("masks", masks, source)
        pictures = _from_tensors(source, prompts, options, captions, masks)
    usable: list[Picture] = []
    ignored: dict[str, list[str]] = {}
    for picture, decode_first in pictures:
        notes: list[str] = []
        try:
            size = decode_first(notes).size
        except ValueError as error:
            problems.append(f"{picture.name}: {error}")
            listener.report(Note(f"{picture.name} is skipped: {error}.", warning=True, picture=picture.name))
        else:
            usable.append(_with_checked_mask(picture, size, listener))
        for note in notes:
            ignored.setdefault(note, []).append(picture.name)
    for note, names in ignored.items():
        listener.report(Note(f"{listed(names)}: {note}.", warning=True, picture=names[0] if len(names) == 1 else ""))
    if not usable:
        location = shown_name(str(source)) if isinstance(source, Path) else "the connected images"
        detail = f" ({'; '.join(problems[:3])})" if problems else ""
        raise PicturesError(
            f"There are no usable pictures in {location}{detail}.",
            "Provide 3 to 20 pictures of the subject as JPEG, PNG or WebP.",
        )
    _warn_of_few_pictures(usable, listener)
    _warn_of_duplicates(usable, listener)
    return usable


def load_references(source: Path, listener: Listener) -> list[Picture]:
    """Pictures that others are compared with; captions and masks are not needed. Raises as `load_pictures`."""
    return load_pictures(source, "", listener, AnnotationOptions(captions="prompt", masks="off"))


def split_validation(pictures: Sequence[Picture], count: int, seed: int) -> tuple[list[Picture], list[Picture]]:
    """Pictures to train on, and `count` others, chosen at random, that are held out; both in their order.

    Raises:
        PicturesError: None would be left to train on.
    """
    if count >= len(pictures):
        raise PicturesError(
            f"validation_pictures is {count}, but there are only {len(pictures)} pictures.",
            f"Lower {suggest('validation_pictures')}, so that some are left to train on.",
        )
    held_out = set(torch.randperm(len(pictures), generator=generator(seed, "validation"))[:count].tolist())
    training = [picture for index, picture in enumerate(pictures) if index not in held_out]
    validation = [picture for index, picture in enumerate(pictures) if index in held_out]
    return training, validation


def _require_one_each(kind: str, annotations: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Check that there are as many captions or masks as tensors, or none.

    Raises:
        PicturesError: There are more or fewer.
    """
    if len(annotations) not in (0, len(tensors)):
        raise PicturesError(
            f"There are {len(tensors)} connected images, but {len(annotations)} {kind}.",
            f"Connect as many {kind} as images, or none.",
        )


def _with_checked_mask(picture: Picture, size: tuple[int, int], listener: Listener) -> Picture:
    """The picture; without its mask if that is all white or all black, which says nothing about the subject.

    Args:
        picture: To check.
        size: Its width and height.
        listener: Gets warnings.

    Raises:
        PicturesError: The mask can't be decoded.
    """
    if picture.mask is None:
        return picture
    try:
        mask = picture.mask()
    except ValueError as error:
        raise PicturesError(
            f"The mask of {picture.name} can't be used: {error}.",
            f"Save it again, or ignore masks with {suggest('masks', 'off')}.",
        ) from error
    width, height = size
    stretch = (mask.width * height) / (mask.height * width)
    if max(stretch, 1 / stretch) > 1 + _ASPECT_TOLERANCE:
        text = f"The mask of {picture.name} is {mask.width}×{mask.height} but the picture is {width}×{height}; "
        listener.report(Note(f"{text}the mask is stretched.", warning=True, picture=picture.name))
    darkest, brightest = mask.getextrema()
    if brightest == 0:
        text = f"The mask of {picture.name} is entirely black; it is ignored."
        listener.report(Note(text, warning=True, picture=picture.name))
    is_uniform = darkest == 255 or brightest == 0
    return replace(picture, mask=None, mask_digest="") if is_uniform else picture


def _warn_of_few_pictures(pictures: Sequence[Picture], listener: Listener) -> None:
    if len(pictures) < 3:
        text = f"Only {len(pictures)} picture(s): 3 to 20, from different angles and in different places, work better."
        listener.report(Note(text, warning=True))


def _warn_of_duplicates(pictures: Sequence[Picture], listener: Listener) -> None:
    first: dict[str, str] = {}
    for picture in pictures:
        if picture.digest in first:
            text = f"{picture.name} is the same picture as {first[picture.digest]}."
            listener.report(Note(text, warning=True, picture=picture.name))
        first.setdefault(picture.digest, picture.name)


_FirstDecode = Callable[[list[str]], Image.Image]
"""Decodes a picture for the first time: gets a list for what was ignored, raises ValueError; see `decode`."""


def _from_file(file: PictureFile, prompts: Sequence[str], options: AnnotationOptions) -> tuple[Picture, _FirstDecode]:
    captions = file.captions or tuple(prompts)
    mask: Callable[[], Image.Image] | None = None
    mask_digest = ""
    if file.mask is not None:
        mask = partial(decode_mask, file.mask)
        mask_digest = hashlib.sha256(file.mask).hexdigest()
    elif options.masks == "alpha":
        mask = _decoder(file.read, decode_alpha)
        mask_digest = "alpha"
    picture = Picture(
        name=file.name,
        caption=captions[0],
        digest=file.digest,
        open=_decoder(file.read, decode),
        more_captions=captions[1:],
        repeats=file.repeats,
        mask=mask,
        mask_digest=mask_digest,
        class_captions=options.class_captions(captions),
    )
    return picture, lambda notes: decode(file.read(), notes)


def _decoder(read: Callable[[], bytes], decode: Callable[[bytes], Image.Image]) -> Callable[[], Image.Image]:
    """Reads and decodes a file whenever it is called, so that no content is held."""
    return lambda: decode(read())


def _from_tensors(
    tensors: Sequence[Tensor],
    prompts: Sequence[str],
    options: AnnotationOptions,
    captions: Sequence[str],
    masks: Sequence[Tensor],
) -> Iterator[tuple[Picture, _FirstDecode]]:
    for index, tensor in enumerate(tensors):
        name = f"connected image {index + 1}"
        if tensor.ndim != 3 or tensor.shape[2] not in (1, 3, 4):
            raise PicturesError(f"{name} has the shape {tuple(tensor.shape)}.", "Connect pictures: (height, width, 3).")
        content, digest = _as_png(tensor)
        own_captions = options.prompts(captions[index], f"The caption of {name}") if captions else []
        all_captions = own_captions or prompts
        mask: Callable[[], Image.Image] | None = None
        mask_digest = ""
        if masks and options.masks != "off":
            if masks[index].ndim != 2:
                shape = tuple(masks[index].shape)
                raise PicturesError(f"The mask of {name} has the shape {shape}.", "Connect masks: (height, width).")
            mask_content, mask_digest = _as_png(masks[index][:, :, None])
            mask = partial(decode_mask, mask_content)
        elif options.masks == "alpha" and tensor.shape[2] == 4:
            mask = partial(decode_alpha, content)
            mask_digest = "alpha"
        picture = Picture(
            name=name,
            caption=all_captions[0],
            digest=digest,
            open=partial(decode, content),
            more_captions=tuple(all_captions[1:]),
            repeats=options.repeats,
            mask=mask,
            mask_digest=mask_digest,
            class_captions=options.class_captions(all_captions),
        )
        yield picture, partial(decode, content)


def _as_png(tensor: Tensor) -> tuple[bytes, str]:
    """A tensor, (height, width, 1, 3 or 4) in [0, 1], as a PNG file and the digest of its values."""
    values = (tensor.detach().float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    image = Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue(), hashlib.sha256(values.tobytes() + str(values.shape).encode()).hexdigest()
