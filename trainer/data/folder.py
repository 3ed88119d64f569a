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
    """Where the captions and masks of a subject's pictures come from, and how often the pictures are repeated.

    Attributes:
        captions: "files": from text files of the same name or metadata.jsonl; "file-names": the pictures' names;
            "prompt": the prompt for all.
        masks: "files": from files beside the pictures; "alpha": from these or the pictures' transparency; "off".
        repeats: How often a picture is taken in an epoch.
        token: What {token} in captions stands for.
        class_noun: What {class} stands for.
    """

    captions: CaptionSource = "files"
    masks: MaskSource = "files"
    repeats: int = 1
    token: str = ""
    class_noun: str = ""


@dataclass(frozen=True)
class PictureFile:
    """A picture file.

    Attributes:
        name: Its name, relative to the folder or zip file, with slashes.
        digest: Hexadecimal SHA-256 of its content.
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


FileReaders = Mapping[str, Callable[[], bytes]]
"""Name relative to the folder or zip file, with slashes → a function that reads the file."""


def is_picture(name: str) -> bool:
    """Whether a file's name ends like a picture's, also of a format that can't be read."""
    ending = PurePosixPath(name).suffix.lower()
    return ending in _FOREIGN_ENDINGS or ending in Image.registered_extensions()


def find_picture_files(path: Path, options: AnnotationOptions, prompt: str, listener: Listener) -> list[PictureFile]:
    """The picture files of a folder or zip file, ordered by name.

    Args:
        path: The folder or zip file. A folder without pictures of its own is searched for subfolders that are named as
            kohya's trainer wants it: repeats, underscore, caption.
        options: Where captions and masks come from.
        prompt: What stands for an empty caption, for messages.
        listener: Gets warnings about files that were skipped or look wrong.

    Raises:
        PicturesError: The path does not exist, is empty or unreadable, a zip entry points outside, or metadata.jsonl
            is damaged.
    """
    path = Path(str(path).strip().strip("\"'"))
    if not os.path.exists(path) and "\\" in str(path):  # unlike Path.exists, no error for a path that no system takes
        path = Path(str(path).replace("\\", "/"))
    try:
        if os.path.isdir(path):
            return _read_picture_files(_folder_readers(path, listener), options, prompt, listener)
        if os.path.isfile(path) and (zipfile.is_zipfile(path) or path.suffix.lower() == ".zip"):
            with zipfile.ZipFile(path) as archive:
                readers = _zip_readers(path, archive)
                return _read_picture_files(readers, options, prompt, listener, keep_content=True)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise PicturesError(f"The zip file {path} is damaged: {error}.", "Create the zip file again.") from error
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
    """Names of the pictures in a folder, without its masks, as `PictureFile.name`; none of them is opened.

    Raises:
        OSError: The folder can't be listed.
    """
    try:
        names = sorted(name for name in _folder_readers(folder, SilentListener()) if is_picture(name))
    except PicturesError:
        return []
    _, masks = _find_masks(names)
    return [name for name in names if name not in masks]


def _folder_readers(folder: Path, listener: Listener) -> FileReaders:
    """The files of a folder and of its folder of masks; if it has no pictures, of kohya's subfolders.

    Raises:
        PicturesError: There are no pictures.
        OSError: A folder can't be listed.
    """
    entries = sorted(folder.iterdir())
    readers = {file.name: file.read_bytes for file in entries if file.is_file()}
    subfolders = [entry for entry in entries if entry.is_dir()]
    repeated = [subfolder for subfolder in subfolders if _REPEATED.fullmatch(subfolder.name)]
    included = [folder / _MASK_FOLDER]
    if not any(map(is_picture, readers)):
        included = [path for subfolder in repeated for path in (subfolder, subfolder / _MASK_FOLDER)]
    elif ignored := _with_pictures(repeated):
        names = ", ".join(ignored[:5])
        listener.report(
            Note(f"{folder.name} holds pictures of its own, so those in {names} are left out.", warning=True)
        )
    for subfolder in included:
        prefix = subfolder.relative_to(folder).as_posix()
        files = sorted(subfolder.iterdir()) if subfolder.is_dir() else []
        readers |= {f"{prefix}/{file.name}": file.read_bytes for file in files if file.is_file()}
    if not any(map(is_picture, readers)):
        remedy = "Put 3 to 20 pictures of the subject into it."
        if with_pictures := _with_pictures(subfolders):
            remedy = f"Did you mean its subfolder {', '.join(with_pictures[:5])}?"
        raise PicturesError(f"The folder {folder} holds no pictures.", remedy)
    return readers


def _with_pictures(folders: Sequence[Path]) -> list[str]:
    """Names of those folders that hold pictures."""
    return [folder.name for folder in folders if any(is_picture(file.name) for file in folder.iterdir())]


def _zip_readers(path: Path, archive: zipfile.ZipFile) -> FileReaders:
    """The files of a zip file.

    Raises:
        PicturesError: An entry points outside the archive, or is huge.
    """
    readers: dict[str, Callable[[], bytes]] = {}
    for entry in archive.infolist():
        if entry.is_dir():
            continue
        name = entry.filename
        inner_path = PurePosixPath(name.replace("\\", "/"))  # old Windows programs write backslashes
        if inner_path.is_absolute() or ".." in inner_path.parts or ":" in name:
            raise PicturesError(
                f"{path.name} holds an entry that points outside: {name}.", "Create the zip file again."
            )
        if entry.file_size > _MAX_FILE_BYTES:
            raise PicturesError(f"{path.name}: {name} unpacks to {entry.file_size / 1e6:.0f} MB.", "Leave it out.")
        if inner_path.parts[0] != "__MACOSX":
            readers[str(inner_path)] = partial(archive.read, entry)
    return readers


def _read_picture_files(
    readers: FileReaders,
    options: AnnotationOptions,
    prompt: str,
    listener: Listener,
    *,
    keep_content: bool = False,
) -> list[PictureFile]:
    """Read every picture once, with its caption and mask; `keep_content` where it can't be read again."""
    image_names = sorted(name for name in readers if is_picture(name))
    mask_of, masks = _find_masks(image_names)
    for name in sorted(masks - set(mask_of.values())):
        text = f"{name} is named like a mask, but no picture uses it; it is left out."
        listener.report(Note(text, warning=True, picture=name))
    names = [name for name in image_names if name not in masks]
    reads_files = options.captions == "files"
    metadata = _metadata_captions(readers, names, listener) if reads_files else {}
    caption_files = _caption_files(readers) if reads_files else {}
    pictures = []
    for name in names:
        try:
            content = readers[name]()
            caption = _caption_without_file(name, metadata, options)
            if caption_file := caption_files.get(_stem(name)):
                caption = _read_caption(caption_file, readers[caption_file](), name, prompt, listener)
            mask = readers[mask_of[name]]() if name in mask_of and options.masks != "off" else None
        except OSError as error:
            text = f"{name} is left out: it can't be read ({error.strerror})."
            listener.report(Note(text, warning=True, picture=name))
            continue
        pictures.append(
            PictureFile(
                name=name,
                digest=hashlib.sha256(content).hexdigest(),
                read=partial(bytes, content) if keep_content else readers[name],
                caption=fill_placeholders(caption, options.token, options.class_noun),
                mask=None if mask is None else partial(bytes, mask),
                repeats=options.repeats * _folder_repeats(name),
            )
        )
    return pictures


def _stem(name: str) -> str:
    """A name without its ending, with its folders."""
    return str(PurePosixPath(name).with_suffix(""))


def _find_masks(names: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """Picture → its mask: x.jpg → x-masklabel.png, x_mask.png, x.mask.png or masks/x.png; and all that are masks.

    What lies in a folder of masks beside pictures, or ends with -masklabel, is a mask also where no picture goes with
    it: nobody wants to train on it.
    """
    by_stem = {_stem(name): name for name in names}
    mask_stems = {name: _mask_stems(name) for name in names}
    all_mask_stems = {stem for stems in mask_stems.values() for stem in stems}
    picture_folders = {str(PurePosixPath(name).parent) for name in names}
    masks = {
        name for name in names if _stem(name) in all_mask_stems or _is_mask_alone(PurePosixPath(name), picture_folders)
    }
    mask_of = {}
    for name, stems in mask_stems.items():
        candidates = [by_stem[stem] for stem in stems if stem in by_stem]
        if candidates and name not in masks:
            mask_of[name] = candidates[0]
    return mask_of, masks


def _mask_stems(name: str) -> list[str]:
    """Names, without ending, that the mask of a picture may have; the first that exists is taken."""
    path = PurePosixPath(name)
    return [*(f"{_stem(name)}{ending}" for ending in _MASK_ENDINGS), str(path.parent / _MASK_FOLDER / path.stem)]


def _is_mask_alone(path: PurePosixPath, picture_folders: Collection[str]) -> bool:
    """Whether a file must be a mask although there may be no picture of its name."""
    in_mask_folder = path.parent.name == _MASK_FOLDER and str(path.parent.parent) in picture_folders
    return in_mask_folder or path.stem.endswith(_MASK_ENDINGS[0])


def _caption_files(readers: FileReaders) -> dict[str, str]:
    """Name without ending → caption file of that name; .txt comes before .caption."""
    caption_files: dict[str, str] = {}
    for ending in reversed(_CAPTION_ENDINGS):
        caption_files |= {_stem(name): name for name in sorted(readers) if PurePosixPath(name).suffix.lower() == ending}
    return caption_files


def _caption_without_file(name: str, metadata: Mapping[str, str], options: AnnotationOptions) -> str:
    """The caption of a picture that has no caption file: from metadata.jsonl or its name; empty if it has none."""
    if options.captions == "prompt":
        return ""
    if options.captions == "file-names":
        return " ".join(_COUNTED.sub("", PurePosixPath(name).stem).replace("_", " ").split())
    folder = _repeated_folder(name)
    return metadata.get(_normalized(name), folder[2] if folder else "")


def _folder_repeats(name: str) -> int:
    """How often a picture is repeated by its folder's name: 10 for "10_sks dog/1.png"; 0 counts as 1."""
    folder = _repeated_folder(name)
    return (int(folder[1]) or 1) if folder else 1


def _repeated_folder(name: str) -> re.Match[str] | None:
    """Repeats and caption in the name of a picture's folder, if it is one of kohya's."""
    return _REPEATED.fullmatch(PurePosixPath(name).parent.name)


def _read_caption(caption_file: str, content: bytes, picture: str, prompt: str, listener: Listener) -> str:
    """A caption file's text in one line; empty, with a warning, if it has none."""
    file_name = PurePosixPath(caption_file).name
    try:
        caption = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        caption = content.decode("cp1252", errors="replace")
        text = f"{file_name} is not UTF-8; it was read as Windows-1252. Caption: {caption.strip()[:60]}"
        listener.report(Note(text, warning=True, picture=picture))
    caption = " ".join(caption.split())
    if not caption:
        text = f"{file_name} is empty; the prompt '{prompt}' is used."
        listener.report(Note(text, warning=True, picture=picture))
    return caption


def _normalized(name: str) -> str:
    """A name as it compares: macOS stores umlauts in two parts."""
    return unicodedata.normalize("NFC", name)


def _metadata_captions(readers: FileReaders, pictures: Sequence[str], listener: Listener) -> dict[str, str]:
    """Normalized name of a picture → caption, from metadata.jsonl files in the format of Hugging Face's datasets.

    Raises:
        PicturesError: A line is no JSON, or names no picture.
    """
    captions = {}
    for name in sorted(readers):
        if PurePosixPath(name).name != _METADATA:
            continue
        content = readers[name]().removeprefix(codecs.BOM_UTF8)
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                picture, caption = _parse_metadata_line(line, f"line {number} of {name}")
                path = PurePosixPath(name).parent / picture.replace("\\", "/")
                captions[_normalized(str(path))] = " ".join(caption.split())
    missing = sorted(set(captions) - set(map(_normalized, pictures)))
    if missing:
        others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        text = f"{_METADATA} names pictures that are not there: {', '.join(missing[:3])}{others}."
        listener.report(Note(text, warning=True))
    return {picture: caption for picture, caption in captions.items() if caption}


def _parse_metadata_line(line: bytes, location: str) -> tuple[str, str]:
    """A picture's name and its caption, which may be empty.

    Raises:
        PicturesError: The line is no JSON, or names no picture.
    """
    remedy = 'Write one line for each picture, in UTF-8: {"file_name": "1.jpg", "text": "a photo of sks dog"}.'
    try:
        entry: Any = json.loads(line.decode())
    except ValueError as error:
        raise PicturesError(f"{location} is no JSON: {error}.", remedy) from error
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise PicturesError(f"{location} names no picture.", remedy)
    texts = [entry[key] for key in _CAPTION_KEYS if isinstance(entry.get(key), str)]
    return entry["file_name"], next(filter(str.strip, texts), "")
