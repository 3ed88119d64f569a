"""The bridge to ComfyUI, continued: the picture folders in its input folder, as the pages show them."""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path
from typing import Any

from ..trainer.core.errors import PicturesError
from ..trainer.core.events import Event, Note
from ..trainer.data.folder import picture_names
from ..trainer.data.images import Picture, load_pictures
from . import host

_THUMBNAIL = 192  # pixels


class _Notebook:
    """A listener that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def report(self, event: Event) -> None:
        if isinstance(event, Note) and event.warning:
            self.warnings.append(event.text)

    def should_stop(self) -> bool:
        return False


def picture_folders() -> list[dict[str, Any]]:
    """The folders and zip files of the input folder: "name", and "count" of a folder's pictures (None for a zip)."""
    found = []
    for name in host.subject_folders():
        if name == host.NO_FOLDER:
            continue
        path = host.input_path(name)
        found.append({"name": name, "count": len(picture_names(path)) if path.is_dir() else None})
    return found


def picture_report(folder: str) -> dict[str, Any]:
    """What a run would find there: "pictures" (name, caption, width, height), "warnings", and a "problem" or None."""
    path = _inside(folder)
    try:
        pictures, warnings = _looked_at(path, host.folder_stamp(path))
    except PicturesError as error:
        return {"pictures": [], "warnings": [], "problem": f"{error.problem} {error.remedy}"}
    shown = [
        {"name": one.name, "caption": one.caption, "width": width, "height": height}
        for one, (width, height) in pictures
    ]
    return {"pictures": shown, "warnings": warnings, "problem": None}


def thumbnail(folder: str, name: str) -> bytes:
    """A small JPEG of a picture.

    Raises:
        PicturesError: There is no such picture.
    """
    path = _inside(folder)
    pictures, _ = _looked_at(path, host.folder_stamp(path))
    for one, _ in pictures:
        if one.name == name:
            return as_thumbnail(one)
    raise PicturesError(f"There is no picture '{name[:80]}' in {folder}.", "Press R to refresh the list.")


def _inside(folder: str) -> Path:
    """The path of a folder or zip file that is shown on pages: not one that a link takes out of the input folder.

    Raises:
        PicturesError: It lies elsewhere, or is not there.
    """
    path, root = host.input_path(folder), host.input_path("").resolve()
    there = path != root and os.path.exists(path)  # unlike Path.exists, no error for a path that no system takes
    if not there or not path.resolve().is_relative_to(root):
        raise PicturesError(f"There is no folder '{folder[:80]}' to show.", "Press R to refresh the list.")
    return path


def as_thumbnail(picture: Picture) -> bytes:
    """A picture as a small JPEG."""
    image, stream = picture.open(), io.BytesIO()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()


@functools.lru_cache(maxsize=8)
def _looked_at(path: Path, stamp: str) -> tuple[list[tuple[Picture, tuple[int, int]]], list[str]]:
    """The good pictures with their sizes, and warnings; looked at anew when the folder's files change."""
    notebook = _Notebook()
    pictures = load_pictures(path, "", notebook)
    return [(one, one.open().size) for one in pictures], notebook.warnings
