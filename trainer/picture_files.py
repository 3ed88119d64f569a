"""Picture files and what lies beside them, in a folder or a zip file: captions, masks, repeats."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image

from .errors import PicturesError
from .events import Listener, Note
from .prompts import filled

CaptionSource = Literal["files", "file-names", "prompt"]
MaskSource = Literal["files", "alpha", "off"]
_MAX_FILE_BYTES = 512 * 1024 * 1024
_FOREIGN_ENDINGS = {".heic", ".heif", ".avif", ".jxl", ".raw", ".cr2", ".nef", ".dng"}
_REPEATED = re.compile(r"(\d+)_(.*\S)")  # kohya's folders: "10_sks dog"
_COUNTED = re.compile(r"[\s_-]*\(?\d+\)?$")
_METADATA = "metadata.jsonl"
_CAPTION_KEYS = ("text", "caption", "prompt")
_CAPTION_ENDINGS = (".txt", ".caption")
_MASK_ENDINGS = ("-masklabel", "_mask", ".mask")
_MASK_FOLDER = "masks"


@dataclass(frozen=True)
class Reading:
    """How a subject's files are read.

    Attributes:
        captions: "files": from text files of the same name or metadata.jsonl; "file-names": the pictures' names;
            "prompt": the prompt for all.
        masks: "files": from files beside the pictures; "alpha": from these or the pictures' transparency; "off".
        repeats: How often a picture is taken in an epoch.
        token: What {token} in captions stands for.
        noun: What {class} stands for.
    """

    captions: CaptionSource = "files"
    masks: MaskSource = "files"
    repeats: int = 1
    token: str = ""
    noun: str = ""


@dataclass(frozen=True)
class PictureFile:
    """A picture file.

    Attributes:
        name: Its name, in a zip file with its folders.
        digest: Hexadecimal digest of its content.
        read: Reads its content.
        caption: Its own caption, or that of its folder; empty if it has none.
        mask: Reads its mask's file; None without.
        repeats: How often it is taken in an epoch.
    """

    name: str
    digest: str
    read: Callable[[], bytes]
    caption: str
    mask: Callable[[], bytes] | None
    repeats: int


def is_picture(name: str) -> bool:
    """Whether a file's name ends like a picture's, also of a format that can't be read."""
    ending = PurePosixPath(name).suffix.lower()
    return ending in _FOREIGN_ENDINGS or ending in Image.registered_extensions()


def find_picture_files(path: Path, reading: Reading, prompt: str, listener: Listener) -> list[PictureFile]:
    """The picture files of a folder or zip file, ordered by name.

    Args:
        path: The folder or zip file. Of a folder without pictures those folders in it are read that are named as
            kohya's trainer wants it: repeats, underscore, caption.
        reading: How.
        prompt: What stands for an empty caption, for messages.
        listener: Told what was skipped and what looks wrong.

    Raises:
        PicturesError: The place is missing, empty or unreadable, a zip entry points outside, or metadata.jsonl is
            damaged.
    """
    path = Path(str(path).strip().strip("\"'"))
    if not os.path.exists(path) and "\\" in str(path):  # unlike Path.exists, no error for a path that no system takes
        path = Path(str(path).replace("\\", "/"))
    try:
        if os.path.isdir(path):
            return _read_all(_folder_files(path), reading, prompt, listener)
        if os.path.isfile(path) and (zipfile.is_zipfile(path) or path.suffix.lower() == ".zip"):
            with zipfile.ZipFile(path) as archive:
                return _read_all(_zip_files(path, archive), reading, prompt, listener, keep=True)
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


Files = Mapping[str, Callable[[], bytes]]
"""Name within the place, with slashes → a way to read the file."""


def folder_files(folder: Path) -> dict[str, Path]:
    """The files that a subject's folder has, name → path: its own and those of its folder of masks.

    If it has no pictures itself, those of the folders in it that are named as kohya's trainer wants them: "10_sks dog".

    Raises:
        OSError: It can't be read.
    """
    below = sorted(folder.iterdir())
    found = {path.name: path for path in below if path.is_file()}
    kohya = not any(map(is_picture, found))
    for sub in below:
        if sub.is_dir() and (_REPEATED.fullmatch(sub.name) if kohya else sub.name == _MASK_FOLDER):
            found |= {f"{sub.name}/{path.name}": path for path in sorted(sub.iterdir()) if path.is_file()}
    return found


def pictures_among(names: Iterable[str]) -> list[str]:
    """Those of a place's files that are pictures to train on: no masks; ordered by name."""
    found = sorted(filter(is_picture, names))
    masks = set(_masks(found).values())
    return [name for name in found if name not in masks]


def _folder_files(folder: Path) -> Files:
    found = folder_files(folder)
    if not any(map(is_picture, found)):
        filled = [
            sub.name
            for sub in sorted(folder.iterdir())
            if sub.is_dir() and any(is_picture(file.name) for file in sub.iterdir())
        ]
        hint = (
            f"Did you mean its subfolder {', '.join(filled[:5])}?"
            if filled
            else "Put 3 to 20 pictures of the subject into it."
        )
        raise PicturesError(f"The folder {folder} holds no pictures.", hint)
    return {name: path.read_bytes for name, path in found.items()}


def _zip_files(path: Path, archive: zipfile.ZipFile) -> Files:
    found: dict[str, Callable[[], bytes]] = {}
    for entry in archive.infolist():
        name = entry.filename
        parts = PurePosixPath(name.replace("\\", "/"))
        if entry.is_dir():
            continue
        if parts.is_absolute() or ".." in parts.parts or ":" in name:
            raise PicturesError(f"{path.name} holds an entry that points outside: {name}.", "Make the zip file anew.")
        if entry.file_size > _MAX_FILE_BYTES:
            raise PicturesError(f"{path.name}: {name} unpacks to {entry.file_size / 1e6:.0f} MB.", "Leave it out.")
        if not name.startswith("__MACOSX/"):
            found[name] = partial(archive.read, name)
    return found


def _read_all(
    files: Files, reading: Reading, prompt: str, listener: Listener, *, keep: bool = False
) -> list[PictureFile]:
    """Read every picture once; `keep` its content where it can't be read again."""
    masks = _masks(filter(is_picture, files))
    described = _described(files) if reading.captions == "files" else {}
    found = []
    for name in pictures_among(files):
        try:
            content = files[name]()
            text, repeats = _caption(name, files, described, reading, prompt, listener)
            mask = files[masks[name]]() if name in masks and reading.masks != "off" else None
        except OSError as error:
            listener.tell(Note(f"{name} is left out: it can't be read ({error.strerror}).", warning=True))
            continue
        read = partial(bytes, content) if keep else files[name]
        caption, digest = filled(text, reading.token, reading.noun), hashlib.sha256(content).hexdigest()
        found.append(PictureFile(name, digest, read, caption, partial(bytes, mask) if mask else None, repeats))
    return found


def _masks(names: Iterable[str]) -> dict[str, str]:
    """Picture → its mask: x.jpg → x-masklabel.png, x_mask.png, x.mask.png or masks/x.png."""
    names = sorted(names)
    by_stem = {str(PurePosixPath(name).with_suffix("")): name for name in names}
    found = {}
    for name in names:
        path = PurePosixPath(name)
        stem = str(path.with_suffix(""))
        places = [f"{stem}{ending}" for ending in _MASK_ENDINGS] + [str(path.parent / _MASK_FOLDER / path.stem)]
        mask = next((by_stem[place] for place in places if place in by_stem), None)
        if mask is not None and mask != name:
            found[name] = mask
    return found


def _caption(
    name: str, files: Files, described: Mapping[str, str], reading: Reading, prompt: str, listener: Listener
) -> tuple[str, int]:
    """A picture's own caption, if it has one, and its repeats."""
    path = PurePosixPath(name)
    folder = _REPEATED.fullmatch(path.parent.name)
    repeats = reading.repeats * (int(folder[1]) or 1 if folder else 1)
    if reading.captions == "prompt":
        return "", repeats
    if reading.captions == "file-names":
        return " ".join(_COUNTED.sub("", path.stem).replace("_", " ").split()), repeats
    for ending in _CAPTION_ENDINGS:
        beside = str(path.with_suffix(ending))
        if beside in files:
            return _text(PurePosixPath(beside).name, files[beside](), prompt, listener), repeats
    return described.get(name, folder[2] if folder else ""), repeats


def _text(name: str, content: bytes, prompt: str, listener: Listener) -> str:
    """A caption file's text in one line; empty, and the listener is told, if it has none."""
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
    return text


def _described(files: Files) -> dict[str, str]:
    """Picture → caption, from the metadata.jsonl files as Hugging Face's datasets has them.

    Raises:
        PicturesError: A line is no JSON, or names no picture.
    """
    found = {}
    for name in files:
        if PurePosixPath(name).name != _METADATA:
            continue
        for number, line in enumerate(files[name]().decode("utf-8-sig", "replace").splitlines(), start=1):
            if line.strip():
                picture, caption = _described_line(line, f"line {number} of {name}")
                if caption:
                    found[str(PurePosixPath(name).parent / picture)] = " ".join(caption.split())
    return found


def _described_line(line: str, where: str) -> tuple[str, str]:
    remedy = 'Write one line for each picture: {"file_name": "1.jpg", "text": "a photo of sks dog"}.'
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise PicturesError(f"{where} is no JSON: {error}.", remedy) from error
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise PicturesError(f"{where} names no picture.", remedy)
    texts = [entry[key] for key in _CAPTION_KEYS if isinstance(entry.get(key), str)]
    return entry["file_name"], texts[0] if texts else ""
