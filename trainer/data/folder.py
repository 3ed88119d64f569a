"""Picture files and what lies beside them, in a folder or a zip file: captions, masks, repeats."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image

from ..core.errors import PicturesError
from ..core.events import Listener, Note, SilentListener
from ..core.prompts import fill_placeholders

CaptionSource = Literal["files", "file-names", "prompt"]
MaskSource = Literal["files", "alpha", "off"]
_MAX_FILE_BYTES = 512 * 1024 * 1024
_FOREIGN_ENDINGS = {".heic", ".heif", ".avif", ".jxl", ".raw", ".cr2", ".nef", ".dng"}
_REPEATED = re.compile(r"(\d{1,3})_(.*\S)")  # kohya's folders: "10_sks dog"; longer numbers are years and dates
_COUNTED = re.compile(r"[\s_-]*\(?\d+\)?$")
_METADATA = "metadata.jsonl"
_CAPTION_KEYS = ("text", "caption", "prompt")
_CAPTION_ENDINGS = (".txt", ".caption")
_MASK_ENDINGS = ("-masklabel", "_mask", ".mask")
_MASK_FOLDER = "masks"


@dataclass(frozen=True)
class AnnotationOptions:
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


def find_picture_files(path: Path, reading: AnnotationOptions, prompt: str, listener: Listener) -> list[PictureFile]:
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
            return _read_all(_folder_files(path, listener), reading, prompt, listener)
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


def picture_names(folder: Path) -> list[str]:
    """Names of the pictures that a folder gives, without its masks; none of them is opened.

    Raises:
        OSError: The folder can't be listed.
    """
    try:
        names = sorted(name for name in _folder_files(folder, SilentListener()) if is_picture(name))
    except PicturesError:
        return []
    masks = _masks(names)[1]
    return [name for name in names if name not in masks]


Files = Mapping[str, Callable[[], bytes]]
"""Name within the place, with slashes → a way to read the file."""


def _folder_files(folder: Path, listener: Listener) -> Files:
    """The files of a folder and of its folder of masks; if it has no pictures, of kohya's folders in it."""
    below = sorted(folder.iterdir())
    own = {file.name: file.read_bytes for file in below if file.is_file()}
    subfolders = [sub for sub in below if sub.is_dir()]
    repeated = [sub for sub in subfolders if _REPEATED.fullmatch(sub.name)]
    taken = [folder / _MASK_FOLDER]
    if not any(map(is_picture, own)):
        taken = [place for sub in repeated for place in (sub, sub / _MASK_FOLDER)]
    elif full := _with_pictures(repeated):
        names = ", ".join(full[:5])
        listener.report(
            Note(f"{folder.name} holds pictures of its own, so those in {names} are left out.", warning=True)
        )
    for place in taken:
        start = place.relative_to(folder).as_posix()
        files = sorted(place.iterdir()) if place.is_dir() else []
        own |= {f"{start}/{file.name}": file.read_bytes for file in files if file.is_file()}
    if not any(map(is_picture, own)):
        full = _with_pictures(subfolders)
        hint = (
            f"Did you mean its subfolder {', '.join(full[:5])}?"
            if full
            else "Put 3 to 20 pictures of the subject into it."
        )
        raise PicturesError(f"The folder {folder} holds no pictures.", hint)
    return own


def _with_pictures(folders: Sequence[Path]) -> list[str]:
    return [folder.name for folder in folders if any(is_picture(file.name) for file in folder.iterdir())]


def _zip_files(path: Path, archive: zipfile.ZipFile) -> Files:
    found: dict[str, Callable[[], bytes]] = {}
    for entry in archive.infolist():
        name = entry.filename
        parts = PurePosixPath(name.replace("\\", "/"))  # old Windows programs write backslashes
        if entry.is_dir():
            continue
        if parts.is_absolute() or ".." in parts.parts or ":" in name:
            raise PicturesError(f"{path.name} holds an entry that points outside: {name}.", "Make the zip file anew.")
        if entry.file_size > _MAX_FILE_BYTES:
            raise PicturesError(f"{path.name}: {name} unpacks to {entry.file_size / 1e6:.0f} MB.", "Leave it out.")
        if parts.parts[0] != "__MACOSX":
            found[str(parts)] = partial(archive.read, entry)
    return found


def _read_all(
    files: Files, reading: AnnotationOptions, prompt: str, listener: Listener, *, keep: bool = False
) -> list[PictureFile]:
    """Read every picture once; `keep` its content where it can't be read again."""
    names = sorted(name for name in files if is_picture(name))
    masks, no_pictures = _masks(names)
    for name in sorted(no_pictures - set(masks.values())):
        listener.report(Note(f"{name} is named like a mask, but no picture uses it; it is left out.", warning=True))
    names = [name for name in names if name not in no_pictures]
    described = _described(files, names, listener) if reading.captions == "files" else {}
    beside = _captions_beside(files)
    found = []
    for name in names:
        try:
            content = files[name]()
            text, repeats = _caption(name, described, reading)
            if reading.captions == "files" and _stem(name) in beside:
                text = _text(beside[_stem(name)], files[beside[_stem(name)]](), prompt, listener)
            mask = files[masks[name]]() if name in masks and reading.masks != "off" else None
        except OSError as error:
            listener.report(Note(f"{name} is left out: it can't be read ({error.strerror}).", warning=True))
            continue
        read = partial(bytes, content) if keep else files[name]
        caption, digest = fill_placeholders(text, reading.token, reading.noun), hashlib.sha256(content).hexdigest()
        found.append(PictureFile(name, digest, read, caption, mask if mask is None else partial(bytes, mask), repeats))
    return found


def _stem(name: str) -> str:
    """A name without its ending, with its folders."""
    return str(PurePosixPath(name).with_suffix(""))


def _masks(names: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """Picture → its mask: x.jpg → x-masklabel.png, x_mask.png, x.mask.png or masks/x.png; and all that are masks.

    What lies in a folder of masks beside pictures, or ends with -masklabel, is a mask also where no picture goes with
    it: nobody wants to train on it.
    """
    by_stem = {_stem(name): name for name in names}
    places = {}
    for name in names:
        path = PurePosixPath(name)
        ends = [f"{_stem(name)}{ending}" for ending in _MASK_ENDINGS]
        places[name] = [*ends, str(path.parent / _MASK_FOLDER / path.stem)]
    named = {place for own in places.values() for place in own}
    with_pictures = {str(PurePosixPath(name).parent) for name in names}
    masks = {name for name in names if _stem(name) in named or _is_mask_alone(PurePosixPath(name), with_pictures)}
    chosen = {name: [by_stem[place] for place in places[name] if place in by_stem] for name in names}
    return {name: found[0] for name, found in chosen.items() if found and name not in masks}, masks


def _is_mask_alone(path: PurePosixPath, with_pictures: Collection[str]) -> bool:
    """Whether a file must be a mask although there may be no picture of its name."""
    in_folder = path.parent.name == _MASK_FOLDER and str(path.parent.parent) in with_pictures
    return in_folder or path.stem.endswith(_MASK_ENDINGS[0])


def _captions_beside(files: Files) -> dict[str, str]:
    """Name without ending → caption file of that name; .txt comes before .caption."""
    found: dict[str, str] = {}
    for ending in reversed(_CAPTION_ENDINGS):
        found |= {_stem(name): name for name in sorted(files) if PurePosixPath(name).suffix.lower() == ending}
    return found


def _caption(name: str, described: Mapping[str, str], reading: AnnotationOptions) -> tuple[str, int]:
    """A picture's own caption, if it has one without a file beside it, and its repeats."""
    path = PurePosixPath(name)
    folder = _REPEATED.fullmatch(path.parent.name)
    repeats = reading.repeats * (int(folder[1]) or 1 if folder else 1)
    if reading.captions == "prompt":
        return "", repeats
    if reading.captions == "file-names":
        return " ".join(_COUNTED.sub("", path.stem).replace("_", " ").split()), repeats
    return described.get(_composed(name), folder[2] if folder else ""), repeats


def _text(name: str, content: bytes, prompt: str, listener: Listener) -> str:
    """A caption file's text in one line; empty, and the listener is told, if it has none."""
    name = PurePosixPath(name).name
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
        listener.report(
            Note(f"{name} is not UTF-8; it was read as Windows-1252. Caption: {text.strip()[:60]}", warning=True)
        )
    text = " ".join(text.split())
    if not text:
        listener.report(Note(f"{name} is empty; the prompt '{prompt}' is used.", warning=True))
    return text


def _composed(name: str) -> str:
    """A name as it compares: macOS stores umlauts in two parts."""
    return unicodedata.normalize("NFC", name)


def _described(files: Files, pictures: Sequence[str], listener: Listener) -> dict[str, str]:
    """Picture, composed → caption, from the metadata.jsonl files as Hugging Face's datasets has them.

    Raises:
        PicturesError: A line is no JSON, or names no picture.
    """
    found = {}
    for name in sorted(files):
        if PurePosixPath(name).name != _METADATA:
            continue
        content = files[name]().removeprefix(codecs.BOM_UTF8)
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                picture, caption = _described_line(line, f"line {number} of {name}")
                place = PurePosixPath(name).parent / picture.replace("\\", "/")
                found[_composed(str(place))] = " ".join(caption.split())
    missing = sorted(set(found) - set(map(_composed, pictures)))
    if missing:
        several = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        text = f"{_METADATA} names pictures that are not there: {', '.join(missing[:3])}{several}."
        listener.report(Note(text, warning=True))
    return {picture: caption for picture, caption in found.items() if caption}


def _described_line(line: bytes, where: str) -> tuple[str, str]:
    remedy = 'Write one line for each picture, in UTF-8: {"file_name": "1.jpg", "text": "a photo of sks dog"}.'
    try:
        entry: Any = json.loads(line.decode())
    except ValueError as error:
        raise PicturesError(f"{where} is no JSON: {error}.", remedy) from error
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise PicturesError(f"{where} names no picture.", remedy)
    texts = [entry[key] for key in _CAPTION_KEYS if isinstance(entry.get(key), str)]
    return entry["file_name"], next(filter(str.strip, texts), "")
