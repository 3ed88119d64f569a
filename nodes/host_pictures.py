"""The bridge to ComfyUI, continued: the picture folders in its input folder, as the pages show them."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from ..pages.pictures import checked_pictures
from ..pages.thumbnails import as_thumbnail
from ..pages.urls import thumbnail_url
from ..trainer.core.errors import PicturesError, worded
from ..trainer.core.events import Note
from ..trainer.data.folder import picture_names
from ..trainer.data.images import Picture
from . import host
from .wording import wording_of


def picture_folders() -> dict[str, Any]:
    """The folders and zip files of the input folder.

    "no_folder": what Subject's folder is called while its pictures come from another node. "folders": "name",
    "archive" (whether it is a zip file), and "count" of a folder's pictures (None for a zip file).
    """
    folders = []
    for name in host.subject_folders():
        if name == host.NO_FOLDER:
            continue
        path = host.input_path(name)
        is_archive = not path.is_dir()
        folders.append({"name": name, "archive": is_archive, "count": None if is_archive else len(picture_names(path))})
    return {"no_folder": host.NO_FOLDER, "folders": folders}


def picture_report(folder: str) -> dict[str, Any]:
    """What a run would find in a folder or zip file.

    "pictures" ("name", "caption", "width", "height", "thumbnail": a URL), "warnings" ("picture": the name of the one
    that it is about, or "", and "text"), and a "problem" or None.
    """
    from .subject import Subject

    wording = wording_of(Subject)
    path = _inside(folder)
    try:
        pictures, warnings = _checked_pictures(path, host.folder_stamp(path))
    except PicturesError as error:
        problem = f"{error.problem_in(wording)} {error.remedy_in(wording)}"
        return {"pictures": [], "warnings": [], "problem": problem}
    return {
        "pictures": [
            {
                "name": picture.name,
                "caption": picture.caption,
                "width": width,
                "height": height,
                "thumbnail": thumbnail_url(folder, picture.name),
            }
            for picture, (width, height) in pictures
        ],
        "warnings": [{"picture": note.picture, "text": worded(note.text, wording)} for note in warnings],
        "problem": None,
    }


def thumbnail(folder: str, name: str) -> bytes:
    """A small JPEG of a picture.

    Raises:
        PicturesError: There is no such picture.
    """
    path = _inside(folder)
    pictures, _ = _checked_pictures(path, host.folder_stamp(path))
    for picture, _ in pictures:
        if picture.name == name:
            return as_thumbnail(picture)
    raise PicturesError(f"There is no picture '{name[:80]}' in {folder}.", "Press R to refresh the list.")


def _inside(folder: str) -> Path:
    """The path of a folder or zip file that may be shown: not one that a link takes out of the input folder.

    Raises:
        PicturesError: It is elsewhere, or does not exist.
    """
    path = host.input_path(folder)
    root = host.input_path("").resolve()
    exists = path != root and os.path.exists(path)  # unlike Path.exists, no error for a path that no system takes
    if not exists or not path.resolve().is_relative_to(root):
        raise PicturesError(f"There is no folder '{folder[:80]}'.", "Press R to refresh the list.")
    return path


@functools.lru_cache(maxsize=8)
def _checked_pictures(path: Path, stamp: str) -> tuple[list[tuple[Picture, tuple[int, int]]], list[Note]]:
    """See `checked_pictures`; read again when the folder's files change (`stamp`)."""
    return checked_pictures(path)
