"""The pictures that a run would find in a folder, for whoever shows them before it."""

from __future__ import annotations

from pathlib import Path

from ..trainer.core.events import Event, Note
from ..trainer.data.folder import AnnotationOptions
from ..trainer.data.images import Picture, load_pictures


class _WarningCollector:
    """A listener that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[Note] = []

    def report(self, event: Event) -> None:
        if isinstance(event, Note) and event.warning:
            self.warnings.append(event)

    def should_stop(self) -> bool:
        return False


def checked_pictures(path: Path) -> tuple[list[tuple[Picture, tuple[int, int]]], list[Note]]:
    """The usable pictures of a folder or zip file with their sizes (width, height) in pixels, and warnings.

    Raises:
        PicturesError: There is none.
    """
    collector = _WarningCollector()
    pictures = load_pictures(path, "", collector, AnnotationOptions(keep_templates=True))
    return [(picture, picture.open().size) for picture in pictures], collector.warnings
