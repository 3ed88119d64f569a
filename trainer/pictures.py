"""Pictures and their captions, from a folder, a zip file or tensors: found, checked, decoded, cropped."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import PicturesError
from .events import Listener, Note

MAX_PIXELS = 178_000_000
MIN_SIDE = 32
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_FILE_BYTES = 512 * 1024 * 1024
_FOREIGN_ENDINGS = {".heic", ".heif", ".avif", ".jxl", ".raw", ".cr2", ".nef", ".dng"}


@dataclass(frozen=True)
class Picture:
    """One training picture.

    Attributes:
        name: File name, for messages.
        caption: What it shows.
        digest: Hexadecimal digest of its content.
        open: Decodes it: an upright RGB picture of any size.
    """

    name: str
    caption: str
    digest: str
    open: Callable[[], Image.Image]


def decode(content: bytes) -> Image.Image:
    """Decode a picture file: upright by its EXIF tag, first frame, RGB; transparency on white.

    Args:
        content: The file's bytes; any format and mode that Pillow reads (palette, grey, 16 bit, CMYK …).

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
            return _as_rgb(_upright(image))
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


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float32)
        return Image.fromarray((values / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.asarray(image)
        scale = 255 if values.max() <= 1 else 1
        return Image.fromarray((values * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale (Lanczos) until `image` covers width × height pixels, then cut the centre out."""
    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def crop_place(size: tuple[int, int], width: int, height: int) -> tuple[int, int, int, int, int, int]:
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


def load_pictures(source: Path | Sequence[Tensor], prompt: str, listener: Listener) -> list[Picture]:
    """Find and check the pictures of a subject; every one is decoded once, here.

    Args:
        source: A folder, a zip file, or tensors of shape (height, width, 3 or 4) in [0, 1]. In folders and zip
            files a text file of the same name is a picture's caption.
        prompt: Caption of pictures without one.
        listener: Told what was skipped and what looks wrong.

    Returns:
        The pictures, ordered by name.

    Raises:
        PicturesError: The place is missing, empty or unreadable, a zip entry points outside, or no picture is good.
    """
    found = _from_path(source, prompt, listener) if isinstance(source, Path) else _from_tensors(source, prompt)
    good: list[Picture] = []
    bad: list[str] = []
    for picture in found:
        try:
            picture.open()
        except ValueError as error:
            bad.append(f"{picture.name}: {error}")
            listener.tell(Note(f"{picture.name} is left out: {error}.", warning=True))
        else:
            good.append(picture)
    if not good:
        detail = f" ({'; '.join(bad[:3])})" if bad else ""
        raise PicturesError(
            f"There is no usable picture in {_place(source)}{detail}.",
            "Give 3 to 20 pictures of the subject as JPEG, PNG or WebP.",
        )
    _advise(good, listener)
    return good


def _advise(pictures: Sequence[Picture], listener: Listener) -> None:
    if len(pictures) < 3:
        listener.tell(
            Note(
                f"Only {len(pictures)} picture(s): 3 to 20 from several sides and in several places teach better.", True
            )
        )
    first: dict[str, str] = {}
    for picture in pictures:
        if picture.digest in first:
            listener.tell(Note(f"{picture.name} is the same picture as {first[picture.digest]}.", warning=True))
        first.setdefault(picture.digest, picture.name)


def _place(source: Path | Sequence[Tensor]) -> str:
    return str(source) if isinstance(source, Path) else "the connected images"


def is_picture(name: str) -> bool:
    """Whether a file's name ends like a picture's, also of a format that can't be read."""
    ending = PurePosixPath(name).suffix.lower()
    return ending in _FOREIGN_ENDINGS or ending in Image.registered_extensions()


def _from_path(path: Path, prompt: str, listener: Listener) -> Iterator[Picture]:
    path = Path(str(path).strip().strip("\"'"))
    if not os.path.exists(path) and "\\" in str(path):  # unlike Path.exists, no error for a path that no system takes
        path = Path(str(path).replace("\\", "/"))
    try:
        if os.path.isdir(path):
            return iter(_from_folder(path, prompt, listener))
        if os.path.isfile(path) and (zipfile.is_zipfile(path) or path.suffix.lower() == ".zip"):
            return iter(_from_zip(path, prompt, listener))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise PicturesError(f"The zip file {path} is damaged: {error}.", "Make the zip file anew.") from error
    except RuntimeError as error:
        raise PicturesError(f"The zip file {path} can't be opened: {error}.", "Make it without a password.") from error
    except OSError as error:
        reason = error.strerror or error
        raise PicturesError(f"{path} can't be read: {reason}.", "Check the path, and that you may read it.") from error
    if os.path.isfile(path):
        raise PicturesError(
            f"{path} is neither a folder nor a zip file.", "Give the folder or zip file that holds the pictures."
        )
    raise PicturesError(f"The picture folder {path} does not exist.", "Check the path for a typing error.")


def _from_folder(folder: Path, prompt: str, listener: Listener) -> list[Picture]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and is_picture(file.name))
    if not files:
        filled = [
            sub.name
            for sub in sorted(folder.iterdir())
            if sub.is_dir() and any(is_picture(f.name) for f in sub.iterdir())
        ]
        hint = (
            f"Did you mean its subfolder {', '.join(filled[:5])}?"
            if filled
            else "Put 3 to 20 pictures of the subject into it."
        )
        raise PicturesError(f"The folder {folder} holds no pictures.", hint)
    pictures = []
    for file in files:
        sidecar = file.with_suffix(".txt")
        try:
            content = file.read_bytes()
            text = sidecar.read_bytes() if sidecar.is_file() else None
        except OSError as error:
            listener.tell(Note(f"{file.name} is left out: it can't be read ({error.strerror}).", warning=True))
            continue
        caption = prompt if text is None else _caption(sidecar.name, text, prompt, listener)
        pictures.append(_picture(file.name, caption, content, file.read_bytes))
    return pictures


def _from_zip(path: Path, prompt: str, listener: Listener) -> list[Picture]:
    pictures = []
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
        for name, entry in entries.items():
            parts = PurePosixPath(name.replace("\\", "/"))
            if parts.is_absolute() or ".." in parts.parts or ":" in name:
                raise PicturesError(
                    f"{path.name} holds an entry that points outside: {name}.", "Make the zip file anew."
                )
            if entry.file_size > _MAX_FILE_BYTES:
                raise PicturesError(f"{path.name}: {name} unpacks to {entry.file_size / 1e6:.0f} MB.", "Leave it out.")
        for name in sorted(entries):
            if name.startswith("__MACOSX/") or not is_picture(name):
                continue
            content = archive.read(name)
            sidecar = str(PurePosixPath(name).with_suffix(".txt"))
            caption = prompt if sidecar not in entries else _caption(sidecar, archive.read(sidecar), prompt, listener)
            pictures.append(_picture(name, caption, content, partial(bytes, content)))
    return pictures


def _picture(name: str, caption: str, content: bytes, read: Callable[[], bytes]) -> Picture:
    return Picture(name, caption, hashlib.sha256(content).hexdigest(), lambda: decode(read()))


def _from_tensors(tensors: Sequence[Tensor], prompt: str) -> Iterator[Picture]:
    for number, tensor in enumerate(tensors, start=1):
        name = f"connected image {number}"
        if tensor.ndim != 3 or tensor.shape[2] not in (1, 3, 4):
            raise PicturesError(f"{name} has the shape {tuple(tensor.shape)}.", "Connect pictures: (height, width, 3).")
        values = (tensor.detach().float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        image = Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)
        stream = io.BytesIO()
        image.save(stream, "PNG", compress_level=1)
        content = stream.getvalue()
        digest = hashlib.sha256(values.tobytes() + str(values.shape).encode()).hexdigest()
        yield Picture(name, prompt, digest, partial(decode, content))


def _caption(name: str, content: bytes, prompt: str, listener: Listener) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
        listener.tell(
            Note(f"{name} is not UTF-8; it was read as Windows-1252. Caption: {text.strip()[:60]}", warning=True)
        )
    text = " ".join(text.split())
    if not text:
        listener.tell(Note(f"{name} is empty; the prompt '{prompt}' is used.", warning=True))
    return text or prompt
