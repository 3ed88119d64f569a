"""Captions of pictures: text files of the same name, metadata.jsonl, metadata.csv; and the pictures' names.

`read_captions` finds the pictures with a caption of their own. Training on captions uses it, and so does writing
them, which must not replace any.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Generic, TypeVar

from ..core.errors import PicturesError, suggest
from ..core.events import Listener, Note
from ..core.prompts import split_prompts
from ..core.text import decode_text, listed
from .tree import TreeFile, UnreadableFileError

_CAPTION_ENDINGS = (".txt", ".caption")
_CAPTION_KEYS = ("text", "caption", "prompt")
_COUNTER = re.compile(r"[\s_-]*(?:\(\d+\)|[_-]\s*\d+|(?<!\d)0\d+)$|^\d+$")
Value = TypeVar("Value")
_LETTER = re.compile(r"[^\W\d_]")


@dataclass(frozen=True)
class OwnCaption:
    """The caption of a picture in a file.

    Attributes:
        text: Prompts as `parse_prompts` takes them; not blank.
        source: Name of the file.
    """

    text: str
    source: str


@dataclass
class Captions:
    """The captions of pictures in files.

    Attributes:
        own: Picture → its caption; pictures without one are missing.
        text_files: Picture → its .txt file, which may be empty.
        empty: Picture → an empty caption file of it, if it has no caption.
        unreadable: Picture → why its caption can't be read.
    """

    own: dict[str, OwnCaption] = field(default_factory=dict)
    text_files: dict[str, TreeFile] = field(default_factory=dict)
    empty: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


class NameIndex(Generic[Value]):
    """Values by name, with names compared as people read them.

    macOS stores umlauts as two code points, and case does not matter on most systems. An exact match comes first.
    """

    def __init__(self, entries: Iterable[tuple[str, Value]] = ()) -> None:
        """Take names and values; of several values of one name, the last comes first."""
        self._entries: dict[str, list[tuple[str, Value]]] = {}
        for name, value in entries:
            composed = unicodedata.normalize("NFC", name)
            self._entries.setdefault(composed.casefold(), []).insert(0, (composed, value))

    def all(self, name: str) -> list[Value]:
        """The values of a name."""
        composed = unicodedata.normalize("NFC", name)
        entries = self._entries.get(composed.casefold(), [])
        return [value for _, value in sorted(entries, key=lambda entry: entry[0] != composed)]


def stem_of(name: str) -> str:
    """A name with its folders, without its ending."""
    return str(PurePosixPath(name).with_suffix(""))


def words_of_name(name: str) -> tuple[str, str]:
    """The words in a picture's name, and the counter at its end: "a_red dog (3).jpg" → "a red dog", "(3)".

    A counter is a number in brackets, after `_` or `-`, or with a leading zero; so "Boeing 747" has none. A name
    without letters has no words.
    """
    stem = PurePosixPath(name).stem
    without = _COUNTER.sub("", stem)
    words = " ".join(without.replace("_", " ").split())
    return (words, stem[len(without) :].strip(" _-")) if _LETTER.search(words) else ("", "")


def read_captions(
    pictures: Sequence[str], beside: Sequence[TreeFile], metadata: Sequence[TreeFile], listener: Listener
) -> Captions:
    """The pictures' own captions: for each, the first that is not blank of .txt, .caption and metadata.

    Args:
        pictures: Their names.
        beside: The files in their folders.
        metadata: The files that `is_metadata`, in their folders and those above them.
        listener: Gets warnings about files that belong to no picture.

    Raises:
        PicturesError: A caption file is not in UTF-8 or UTF-16, or metadata is damaged.
    """
    captions = Captions()
    foreign: list[str] = []
    files = _files_of_pictures(pictures, beside, listener)
    described = _read_metadata(metadata, pictures, listener)
    for picture in pictures:
        for file in files.get(picture, []):
            if PurePosixPath(file.name).suffix.lower() == ".txt":
                captions.text_files.setdefault(picture, file)
            if picture in captions.own:
                continue
            try:
                text = decode_text(file.read()).strip()
            except UnreadableFileError as error:
                captions.unreadable[picture] = f"its caption {file.name}: {error}"
            except ValueError as error:
                foreign.append(f"{file.name} {error}")
            else:
                if split_prompts(text):
                    captions.own[picture] = OwnCaption(text, file.name)
                else:
                    captions.empty.setdefault(picture, file.name)
        entries = described.all(picture)
        if picture not in captions.own and entries and entries[0]:
            captions.own[picture] = entries[0]
    if foreign:
        raise PicturesError(
            f"{'; '.join(foreign[:3])}{f'; and {len(foreign) - 3} more' if len(foreign) > 3 else ''}.",
            "Save the captions as UTF-8 (in Notepad: Save as, Encoding), or use the prompt as the caption of every "
            f"picture: {suggest('captions', 'prompt')}.",
        )
    captions.empty = {picture: file for picture, file in captions.empty.items() if picture not in captions.own}
    return captions


def _files_of_pictures(
    pictures: Sequence[str], beside: Sequence[TreeFile], listener: Listener
) -> dict[str, list[TreeFile]]:
    """Picture → its caption files, the one that counts first; of those without a picture the listener hears."""
    caption_files = [file for file in beside if PurePosixPath(file.name).suffix.lower() in _CAPTION_ENDINGS]
    by_stem = NameIndex((stem_of(file.name), file) for file in caption_files)
    files = {
        picture: sorted(
            by_stem.all(stem_of(picture)),
            key=lambda file: _CAPTION_ENDINGS.index(PurePosixPath(file.name).suffix.lower()),
        )
        for picture in pictures
    }
    used = {file.name for of_picture in files.values() for file in of_picture}
    unused = [file.name for file in caption_files if file.name not in used]
    if unused:
        verb = "matches" if len(unused) == 1 else "match"
        listener.report(Note(f"{listed(unused)} {verb} no picture by name.", warning=True))
    return files


def is_metadata(name: str) -> bool:
    """Whether a file describes pictures as Hugging Face's datasets has it."""
    return PurePosixPath(name).name.lower() in ("metadata.jsonl", "metadata.csv")


def _read_metadata(
    files: Sequence[TreeFile], pictures: Sequence[str], listener: Listener
) -> NameIndex[OwnCaption | None]:
    """Picture → its caption in a metadata file, or None; metadata.jsonl counts before metadata.csv.

    Raises:
        PicturesError: A file or a line of it can't be read, or names no picture.
    """
    described: dict[str, OwnCaption | None] = {}
    for file in sorted(files, key=lambda file: (not file.name.lower().endswith(".csv"), file.name)):
        for row, location in _metadata_rows(file):
            picture = row.get("file_name")
            if not isinstance(picture, str) or not picture.strip():
                raise PicturesError(f"{location} names no picture.", _metadata_remedy(file))
            texts = [text for key in _CAPTION_KEYS if isinstance(text := row.get(key), str) and split_prompts(text)]
            path = PurePosixPath(file.name).parent / picture.replace("\\", "/")
            described[str(path)] = OwnCaption(texts[0], file.name) if texts else None
    existing = NameIndex((picture, picture) for picture in pictures)
    missing = sorted(picture for picture in described if not existing.all(picture))
    if missing:
        names = " and ".join(dict.fromkeys(PurePosixPath(file.name).name for file in files))
        verb = "name" if " and " in names else "names"
        text = f"{names} {verb} pictures that do not exist: {listed(missing, 3)}."
        listener.report(Note(text, warning=True))
    return NameIndex(described.items())


def _metadata_rows(file: TreeFile) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The rows of a metadata file, each with where it stands.

    Raises:
        PicturesError: The file or a row can't be read.
    """
    remedy = _metadata_remedy(file)
    try:
        text = decode_text(file.read())
    except UnreadableFileError as error:
        raise PicturesError(f"{file.name} is needed for captions, but {error}.", remedy) from error
    except ValueError as error:
        raise PicturesError(f"{file.name} {error}.", remedy) from error
    if file.name.lower().endswith(".csv"):
        rows = csv.DictReader(io.StringIO(text, newline=""))
        if "file_name" not in (rows.fieldnames or ()):
            raise PicturesError(f"{file.name} has no column file_name.", remedy)
        try:
            yield from ((row, f"line {rows.line_num} of {file.name}") for row in rows)
        except csv.Error as error:
            raise PicturesError(f"{file.name} is damaged: {error}.", remedy) from error
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            location = f"line {number} of {file.name}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise PicturesError(f"{location} is not valid JSON: {error}.", remedy) from error
            yield (row if isinstance(row, dict) else {}), location


def _metadata_remedy(file: TreeFile) -> str:
    if file.name.lower().endswith(".csv"):
        return "Save it as UTF-8, with the header file_name,text and then one line per picture: 1.jpg,a dog."
    return 'Write one line per picture, as UTF-8: {"file_name": "1.jpg", "text": "a photo of sks dog"}.'
