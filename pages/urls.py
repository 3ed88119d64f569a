"""URLs of what the pages show, below the host's own address. Pages take them from here and build none themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

if TYPE_CHECKING:
    from ..trainer.training.runs.layout import RunLayout

PREFIX = "/dreambooth"


def file_url(run: Path, file: Path) -> str:
    """The URL of a file in the folder of a run."""
    relative = file.relative_to(run).as_posix()
    return f"{PREFIX}/runs/{quote(run.name, safe='')}/files/{quote(relative)}"


def thumbnail_url(folder: str, picture: str) -> str:
    """The URL of a small copy of a picture in a folder or zip file of ComfyUI's input folder."""
    return f"{PREFIX}/folders/thumbnail?{urlencode({'folder': folder, 'picture': picture})}"


def summary_with_urls(run: RunLayout, summary: Mapping[str, Any]) -> dict[str, Any]:
    """A run's summary, or its details, with the URL of the newest preview instead of its path."""
    preview = summary["preview"]
    return dict(summary) | {"preview": preview and file_url(run.path, run.path / preview)}


def details_with_urls(run: RunLayout, details: Mapping[str, Any]) -> dict[str, Any]:
    """A run's details (`RunIndex.details`) with URLs instead of names.

    "previews" (step → URLs), "subject" (URLs), "workflow" (URL or None), and of each of "adapters" also its "url".
    """
    previews = {
        step: [file_url(run.path, run.preview_path(step) / name) for name in names]
        for step, names in details["previews"].items()
    }
    return summary_with_urls(run, details) | {
        "previews": previews,
        "subject": [file_url(run.path, run.subject_path / name) for name in details["subject"]],
        "workflow": file_url(run.path, run.workflow_path) if details["workflow"] else None,
        "adapters": [
            adapter | {"url": file_url(run.path, run.path / adapter["file"])} for adapter in details["adapters"]
        ],
    }
